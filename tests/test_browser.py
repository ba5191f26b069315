"""The card in a real JupyterLab and a real Chromium, light and dark. Pictures are kept in build/browser."""

from __future__ import annotations

import importlib.util
import os
import re
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from browser import Lab, Page, chromium, find_chromium, lab
from stacks import ROOT

from yadtq_nb.local import LocalCluster

PICTURES = ROOT / "build" / "browser"
WIDGET = "application/vnd.jupyter.widget-view+json"
HOSTILE = "<img src=x onerror='window.owned=1'>"
WORK = f"""
import time
from yadtq_nb import Queue

queue = Queue()

def work(item):
    time.sleep(0.1)
    if item % 7 == 3:
        raise ValueError("{HOSTILE} bad item")
    if item == 1:  # sent alone, before the others
        time.sleep(60)
    return item
"""

_missing = [name for name in ("playwright", "jupyterlab") if importlib.util.find_spec(name) is None]
_missing += [] if find_chromium() else ["chromium"]
pytestmark = [
    pytest.mark.timeout(600),
    pytest.mark.skipif(bool(_missing) and "CI" not in os.environ, reason=f"not installed: {', '.join(_missing)}"),
    # Playwright's loop and its transport are closed by the garbage collector.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    with LocalCluster(slots=2, workers=2) as started:
        yield started


@pytest.fixture(scope="module")
def server(cluster: LocalCluster) -> Iterator[Lab]:
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        (directory / "config.json").write_bytes(msgspec.json.encode(cluster.config))
        environment = {"YADTQ_CONFIG": str(directory / "config.json"), "PYTHONPATH": str(ROOT)}
        with lab(directory, environment) as started:
            yield started


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as started:
        yield started


def _finished(page: Page, cell: int) -> int:
    return int(page.cell(cell).get_by_role("progressbar").get_attribute("aria-valuenow"))


def _assert_no_markup(page: Page) -> None:
    assert page.page.evaluate("window.owned") is None
    assert page.page.locator(".jp-OutputArea img").count() == 0


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_card_lives_through_a_lost_worker_a_reload_and_a_restart_and_cancels(
    server: Lab, cluster: LocalCluster, browser: Any, theme: str
) -> None:
    name = f"{HOSTILE} {theme}"
    attach = f"queue.job({name!r})"
    server.write(
        "card.ipynb", WORK, f"queue.map(work, range(3_000), name={name!r})", "queue", "queue.workers()", attach
    )
    with server.open(browser, "card.ipynb", dark=theme == "dark") as page:
        _watch(page, cluster, theme)
        _assert_no_markup(page)

        page.save()
        page.load()
        page.eventually(lambda: page.cell(1).get_by_role("progressbar").count() == 1)
        before = _finished(page, 1)
        page.eventually(lambda: _finished(page, 1) > before)

        page.restart()
        page.run(0)
        page.run(4)
        _cancel(page, 4, theme)
        _assert_no_markup(page)
        assert page.complaints == []
    (output,) = server.read("card.ipynb").cells[4].outputs
    assert set(output.data) == {"text/html", "text/plain"}
    assert f"{HOSTILE} {theme}  cancelled  3,000 of 3,000" in output.data["text/plain"]


def _watch(page: Page, cluster: LocalCluster, theme: str) -> None:
    """Run all cells; see the bar move, a panel stay open, and a worker be lost."""
    for cell in range(4):
        page.run(cell)
    card = page.cell(1)
    card.get_by_role("progressbar").wait_for()
    page.eventually(lambda: _finished(page, 1) > 8)
    before = _finished(page, 1)
    page.eventually(lambda: _finished(page, 1) > before)
    page.eventually(lambda: card.locator(".yadtq-error").count() == 1)
    assert card.locator(".yadtq-error .yadtq-type").inner_text().endswith("× ValueError (cell, line 9, in work)")
    for cell in (2, 3):
        page.cell(cell).get_by_text(re.compile("jobs? in the last day")).wait_for()
        assert page.cell(cell).locator(".yadtq-worker .yadtq-fill-live").count() == 2
    # A panel is opened by keyboard, and stays open and in focus while the card goes on.
    card.locator(".yadtq-error summary").focus()
    page.page.keyboard.press("Enter")
    before = _finished(page, 1)
    page.eventually(lambda: _finished(page, 1) > before + 10)
    assert card.locator(".yadtq-traceback").is_visible()
    assert page.page.evaluate("document.activeElement.tagName") == "SUMMARY"
    page.eventually(lambda: "task 1 · " in card.locator(".yadtq-panel > summary").nth(1).inner_text())

    workers = cluster.queue().workers()
    os.kill(int(workers.loc[workers["status"] == "live", "pid"].iloc[0]), signal.SIGKILL)
    page.eventually(lambda: card.locator(".is-lost").count() > 0)
    beat = card.locator(".is-lost").first
    before = beat.inner_text()
    assert before.startswith("lost, ")
    page.picture(PICTURES / f"{theme}-page.png")
    page.picture(PICTURES / f"{theme}-job.png", 1)
    page.picture(PICTURES / f"{theme}-queue.png", 2)
    page.eventually(lambda: beat.inner_text() != before)


def _cancel(page: Page, cell: int, theme: str) -> None:
    card = page.cell(cell)
    button = card.get_by_role("button", name="Cancel")
    button.wait_for()
    page.picture(PICTURES / f"{theme}-attached.png", cell)
    button.click()
    card.get_by_role("button", name="Really cancel?").click()
    # Then the display has become static.
    page.eventually(lambda: "cancelled" in card.inner_text() and card.get_by_role("button").count() == 0)
    page.picture(PICTURES / f"{theme}-cancelled.png", cell)
    page.save()


def test_card_of_many_workers_is_narrow_in_a_narrow_page(server: Lab, browser: Any) -> None:
    head = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
from fake_job import FakeJob, group
from yadtq_nb.notebook.live import display_job
FakeJob._ipython_display_ = lambda self: display_job(self) and None
job = FakeJob(100_000, name="a-long-name-for-a-job" * 3, workers=200, errors=(group("ValueError", "x" * 500),))
job.gone, job.lost, job.retryable = {{3, 190}}, 12, 1
job.step(succeeded=61_234, failed=1)
"""
    server.write("narrow.ipynb", head, "job", "import time; time.sleep(5)")
    with server.open(browser, "narrow.ipynb", width=480) as page:
        page.run(0)
        page.run(1)
        card = page.cell(1).locator(".yadtq-card")
        card.wait_for()
        page.run(2)
        too_wide = (
            "element => [...element.querySelectorAll('*')].filter(each => each.scrollWidth > each.clientWidth + 1 &&"
        )
        too_wide += " getComputedStyle(each).display !== 'inline' && !each.closest('.yadtq-traceback')).length"
        assert card.evaluate(too_wide) == 0
        assert card.locator(".yadtq-worker").count() == 52
        assert not card.locator(".yadtq-gauge").first.is_visible()
        page.picture(PICTURES / "narrow.png", 1)
        # Pressed while a cell runs: it is heard at once where the kernel has subshells, else when the cell has ended.
        card.get_by_role("button", name="Retry failed").click()
        page.eventually(lambda: card.locator(".yadtq-note").inner_text() != "")
        page.eventually(lambda: "1 task will run again" in card.locator(".yadtq-note").inner_text())
        assert page.complaints == []

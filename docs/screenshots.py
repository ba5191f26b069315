"""Make the README's pictures anew: the card of a job, light, and of a queue, dark, in a real JupyterLab.

make screenshots
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
from pathlib import Path
from typing import Any

import msgspec

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "tests"))

from browser import Page, chromium, lab  # noqa: E402  # it lies with the tests

from yadtq_nb.local import LocalCluster  # noqa: E402  # as above

JOB = '''
import random, time
from yadtq_nb import Queue

def fit(seed):
    """Fit one model; some settings are bad, some are slow."""
    time.sleep(0.1 + random.Random(seed).random() / 4)
    if seed % 23 == 7:
        raise ValueError(f"gamma must be positive, not {-seed / 100}")
    if seed % 61 == 20:
        return {"rbf": seed}["linear"]
    if seed == 70:
        time.sleep(30)
    return seed

queue = Queue()
'''.strip()
SHOW = 'job = queue.map(fit, range(400), name="sweep")\njob'
OTHERS = """
queue.map(fit, [1, 2, 3], name="warm-up").results()
queue.map(abs, range(-5_000, 5_000), name="distances").results()
queue.map(fit, range(30, 60), name="baseline", chunksize=1).wait()
job = queue.map(fit, range(300), name="ensemble")
""".strip()


def main() -> None:
    """Write docs/images/card.png and docs/images/queue.png."""
    images = HERE / "images"
    images.mkdir(exist_ok=True)
    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        cluster = stack.enter_context(LocalCluster(slots=2, workers=3))
        (directory / "config.json").write_bytes(msgspec.json.encode(cluster.config))
        environment = {"YADTQ_CONFIG": str(directory / "config.json"), "PYTHONPATH": str(HERE.parent)}
        server = stack.enter_context(lab(directory, environment))
        browser = stack.enter_context(chromium())
        server.write("card.ipynb", JOB, SHOW, "job.cancel()")
        server.write("queue.ipynb", JOB, OTHERS, "queue")
        with server.open(browser, "card.ipynb") as page:
            page.run(0)
            page.run(1)
            _wait(page, 1, 0.45)
            page.cell(1).locator(".yadtq-error summary").first.click()
            _take(page, 1, images / "card.png")
            page.run(2)
        with server.open(browser, "queue.ipynb", dark=True) as page:
            page.run(0)
            page.run(1)
            page.run(2)
            page.cell(2).get_by_text("ensemble").wait_for()
            page.page.wait_for_timeout(9_000)
            _take(page, 2, images / "queue.png")


def _wait(page: Page, cell: int, share: float) -> None:
    bar: Any = page.cell(cell).get_by_role("progressbar")
    bar.wait_for()
    page.eventually(
        60, lambda: int(bar.get_attribute("aria-valuenow")) >= share * int(bar.get_attribute("aria-valuemax"))
    )


def _take(page: Page, cell: int, path: Path) -> None:
    page.cell(cell).locator(".yadtq-card").screenshot(path=path)
    print(f"{path.relative_to(HERE.parent)}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()

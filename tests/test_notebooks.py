"""The notebooks run as a reader would run them, on the local stack with nothing configured, and show what they tell."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from stacks import ROOT

from yadtq_nb import Queue
from yadtq_nb.local.home import Home
from yadtq_nb.local.stack import Stack

pytestmark = pytest.mark.timeout(300)

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
#: Seconds that one cell may take.
_PATIENCE = 60


class Shown:
    """What the cells of a notebook have shown."""

    def __init__(self, cells: list[Any]) -> None:
        self._cells = [cell for cell in cells if cell.cell_type == "code"]

    def text(self, tag: str) -> str:
        """Return what the cell with this tag has printed and shown, as text."""
        (cell,) = [cell for cell in self._cells if tag in cell.metadata.get("tags", [])]
        return "".join(output.get("text") or output.data.get("text/plain", "") for output in cell.outputs)

    def card(self, tag: str = "card") -> str:
        """Return what stands on the card of the cell with this tag, in a notebook that was saved."""
        (cell,) = [cell for cell in self._cells if tag in cell.metadata.get("tags", [])]
        (output,) = cell.outputs
        assert "application/vnd.jupyter.widget-view+json" not in output.data, "a card that has ended is plain HTML"
        return re.sub(r"(<style.*?</style>|<[^>]*>|\s)+", " ", output.data["text/html"], flags=re.DOTALL)

    def pictures(self) -> int:
        """Return how many figures there are."""
        return sum("image/png" in output.get("data", {}) for cell in self._cells for output in cell.outputs)

    def complaints(self) -> list[str]:
        """Return the warnings that a reader would see."""
        streams = [output for cell in self._cells for output in cell.outputs if output.output_type == "stream"]
        return [output.text for output in streams if output.name == "stderr" and "font cache" not in output.text]


@pytest.fixture
def users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stack]:
    """The stack that Queue() finds when nothing is configured, with two slots whatever the machine has."""
    for name in ("YADTQ_CONFIG", "YADTQ_KAFKA", "YADTQ_REDIS", "YADTQ_SECRET"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("YADTQ_HOME", str(tmp_path / "stack"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "settings"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    stack = Stack(Home.of_this_environment(), slots=2)
    stack.ensure_up()
    yield stack
    stack.down()


def run(cells: list[Any], directory: Path) -> None:
    """Run cells in place, in a kernel of this Python, which is killed then: it has no time to close anything."""
    manager = AsyncKernelManager(kernel_name="python3", kernel_spec_manager=KernelSpecManager(kernel_dirs=[]))
    NotebookClient(
        nbformat.v4.new_notebook(cells=cells),
        km=manager,
        timeout=_PATIENCE,
        resources={"metadata": {"path": str(directory)}},
        extra_arguments=["--log-level=ERROR"],
        shutdown_kernel="immediate",
    ).execute(cleanup_kc=True)
    asyncio.run(manager.cleanup_resources())


def cells_of(name: str) -> list[Any]:
    return list(nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4).cells)


def place(cells: list[Any], tag: str) -> int:
    (found,) = [number for number, cell in enumerate(cells) if tag in cell.metadata.get("tags", [])]
    return found


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_kept_without_outputs(path: Path) -> None:
    kept = nbformat.read(path, as_version=4)
    nbformat.validate(kept)
    code = [cell for cell in kept.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in code)
    assert kept.metadata.kernelspec.name == "python3"
    assert path.read_text() == json.dumps(json.loads(path.read_text()), indent=1, ensure_ascii=False) + "\n"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_readme_names_every_notebook(path: Path) -> None:
    assert f"notebooks/{path.name}" in (ROOT / "README.md").read_text(), "no reader will find it"


def test_job_survives_its_worker_and_its_kernel(users: Stack, tmp_path: Path) -> None:
    cells = cells_of("survive")
    restart = place(cells, "workers") + 1
    run(cells[:restart], tmp_path)  # this kernel is killed in the middle of the job
    run(cells[restart:], tmp_path)
    shown = Shown(cells)
    victim = re.search(r"killed (\S+) while <Job 'biopsies': (\d+) of 100 succeeded", shown.text("kill"))
    assert victim is not None
    assert 30 <= int(victim[2]) < 100
    assert "lost" in shown.text("workers")
    assert "found: <Job 'biopsies': " in shown.text("again")
    assert "ended: <Job 'biopsies': 100 of 100 succeeded, 0 failed, 0 running>" in shown.text("again")
    assert "100 of 100" in shown.card("attach")
    assert victim[1] in shown.text("frame")
    assert shown.pictures() == 1
    assert shown.complaints() == []
    with Queue(config=users.ensure_up()) as queue:
        frame = queue.job("biopsies").to_frame()
    assert list(frame.index) == list(frame["input"]) == list(range(100))
    assert set(frame["state"]) == {"succeeded"}
    assert len(set(frame["worker"])) == 2
    assert frame["accuracy"].between(0.8, 1).all()


def test_sweep_shows_the_best_so_far_and_a_table_of_families(users: Stack, tmp_path: Path) -> None:
    cells = cells_of("sweep")
    run(cells, tmp_path)
    shown = Shown(cells)
    assert "120 of 120" in shown.card()
    best = [float(score) for score in re.findall(r"R² (\d\.\d{3})", shown.text("best"))]
    assert best == sorted(best)
    assert len(best) > 2
    table = [line.split() for line in shown.text("frame").splitlines()[2:]]
    assert {family for family, *_ in table} == {"Ridge", "SVR", "KNeighborsRegressor", "DecisionTreeRegressor"}
    assert max(float(inner) for _, inner, *_ in table) == best[-1]
    (_, _, first, spread, _), (_, _, second, *_) = table[:2]
    assert float(first) - float(second) < float(spread), "no winner: the text says to look at the spread"
    assert "Timeline" in shown.text("timeline")
    assert shown.pictures() == 2
    assert shown.complaints() == []


def test_hundreds_of_calls_of_an_api_that_is_busy_and_silent_now_and_then_all_have_an_answer(
    users: Stack, tmp_path: Path
) -> None:
    cells = cells_of("api")
    run(cells, tmp_path)
    shown = Shown(cells)
    assert "569 of 569" in shown.card()
    rate = re.search(r"569 answers from (\d+) calls, up to (\d+) at a time\nin ([\d.]+) s", shown.text("rate"))
    assert rate is not None
    assert int(rate[1]) >= 569 + 57 + 6, "57 were told that it is busy, and 6 nothing"
    assert 20 < int(rate[2]) <= 200
    assert float(rate[3]) < 57 / 2
    assert re.search(r"succeeded +1 +\d+", shown.text("attempts"))
    assert "failed" not in shown.text("attempts")
    assert "mean radius" in shown.text("frame")
    easy = re.search(r"up to (\d+) at a time, on 2 slots", shown.text("easy"))
    assert easy is not None
    assert int(easy[1]) <= 20
    assert shown.pictures() == 1
    assert shown.complaints() == []


def test_frames_go_out_by_group_row_and_block_and_come_back_as_frames(users: Stack, tmp_path: Path) -> None:
    cells = cells_of("frames")
    run(cells, tmp_path)
    shown = Shown(cells)
    assert "45 of 45" in shown.card()
    tickers = {"IBM", "AAPL", "MSFT", "XRX", "AMZN", "DELL", "GOOGL", "ADBE", "^GSPC", "^IXIC"}
    for tag in ("groups", "rows"):
        assert {line.split()[0] for line in shown.text(tag).splitlines()[2:]} == tickers
    assert len(shown.text("blocks").splitlines()) == 1 + 5
    states = dict(re.findall(r"(queued|succeeded) +(\d+)", shown.text("pairs")))
    assert int(states["succeeded"]) >= 10
    assert sum(map(int, states.values())) == 45
    months = next(line.split()[1:] for line in shown.text("dtypes").splitlines() if line.startswith("months"))
    assert months[1:] == ["int64", "Int64"]
    assert "^GSPC" in shown.text("frame")
    assert shown.pictures() == 1
    assert shown.complaints() == []


def test_errors_are_looked_at_and_only_what_failed_is_run_again(users: Stack, tmp_path: Path) -> None:
    cells = cells_of("errors")
    run(cells, tmp_path)
    shown = Shown(cells)
    assert re.search(r"ValueError .* 13\b", shown.text("grouped"))
    assert "13 of 569 have failed" in shown.text("log")
    assert "10 values, the smallest is 0.0" in shown.text("log")
    assert "ValueError" in shown.text("log")
    assert "13 tasks run again" in shown.text("retry")
    assert "569 of 569" in shown.text("retry")
    assert {line.split()[0] for line in shown.text("frame").splitlines()[2:]} == {"benign", "malignant"}
    assert "669 values, 0 failures" in shown.text("extend")
    assert shown.complaints() == []

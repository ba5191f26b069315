"""The figure of when which worker ran what."""

from __future__ import annotations

import sys
import time
from typing import Any

import numpy as np
import pytest

from yadtq_nb import Queue
from yadtq_nb.notebook import timeline

pytestmark = pytest.mark.one_stack

# Functions of the tests travel by value, as those of a notebook do.
__import__("cloudpickle").register_pickle_by_value(sys.modules[__name__])


def _draw(states: bytes, workers: list[str], started: list[float], seconds: list[float]) -> timeline.Timeline:
    return timeline.draw("sweep", states, workers, np.array(started) + 1.8e9, np.array(seconds))


def _bars(figure: timeline.Timeline) -> list[tuple[float, float, float]]:
    """Return (left, right, lane) of each bar, by lane."""
    corners = [path.vertices for collection in figure.axes[0].collections for path in collection.get_paths()]
    return sorted((float(c[0, 0]), float(c[2, 0]), float(c[:4, 1].mean())) for c in corners)


def _legend(figure: timeline.Timeline) -> list[str]:
    legend = figure.axes[0].get_legend()
    return [text.get_text() for text in legend.get_texts()] if legend else []


def test_tasks_that_ran_at_a_time_have_lanes_of_their_own_under_their_worker() -> None:
    figure = _draw(b"SSSF", ["b", "b", "a", "b"], [0, 0, 0, 1], [1, 2, 1, 1])
    assert [(round(left), round(right), round(lane)) for left, right, lane in _bars(figure)] == [
        (0, 1, 0),
        (0, 1, 2),
        (0, 2, 1),
        (1, 2, 0),
    ]
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["b", "a"]
    assert _legend(figure) == ["3 succeeded", "1 failed"]
    assert figure.axes[0].get_title("left") == "sweep: 4 tasks on 2 workers, 2.0 s, 83 % busy"


def test_ten_thousand_tasks_are_few_bars_and_one_failure_is_seen() -> None:
    number = 10_000
    started = np.arange(number) * 1e-3
    figure = _draw(b"S" * 5_000 + b"F" + b"S" * 4_999, ["a"] * number, list(started), [1e-3] * number)
    bars = _bars(figure)
    assert len(bars) < 10
    assert any(5 <= left <= 5.001 and right - left > 0.01 for left, right, _ in bars)
    assert _legend(figure) == ["9,999 succeeded", "1 failed"]
    assert "drawn as one bar" in figure.axes[0].get_xlabel()


def test_what_did_not_run_is_left_out_and_nothing_gives_an_empty_figure() -> None:
    nan = float("nan")
    assert len(_bars(_draw(b"SQC", ["a", "", ""], [0, nan, nan], [1, nan, nan]))) == 1
    for figure in (_draw(b"Q", [""], [nan], [nan]), _draw(b"", [], [], [])):
        assert figure.axes[0].texts[0].get_text() == "no task has run yet"
        assert figure._repr_png_().startswith(b"\x89PNG")


def test_two_hundred_workers_have_legible_names_and_a_figure_of_bounded_height() -> None:
    figure = _draw(b"S" * 200, [f"node-{i}" for i in range(200)], [0.0] * 200, [1.0] * 200)
    assert len(figure.axes[0].get_yticklabels()) <= 40
    assert figure.get_size_inches()[1] < 12


def test_job_shows_its_timeline_also_while_it_runs_and_pyplot_is_left_alone(queue: Queue) -> None:
    job = queue.map(time.sleep, [0.01] * 20, chunksize=2)
    assert job.timeline()._repr_png_().startswith(b"\x89PNG")
    job.results()
    figure = job.timeline()
    assert _legend(figure) == ["20 succeeded"]
    assert figure.axes[0].get_title("left").startswith(f"{job.name}: 20 tasks on 1 worker")


def test_missing_matplotlib_is_named(queue: Queue, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("matplotlib")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, "yadtq_nb.notebook.timeline")
    monkeypatch.delattr("yadtq_nb.notebook.timeline")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    job: Any = queue.map(abs, [1])
    with pytest.raises(ImportError, match="pip install matplotlib"):
        job.timeline()

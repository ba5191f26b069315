"""When which worker ran what: a Gantt figure, a group of lanes for each worker, a bar for each task.

Which slot ran a task is not recorded. A worker has as many lanes as it ever ran tasks at a time, and each task is in
the first lane that was free: with slots that run one task each, that is one lane a slot.

Importing this module imports matplotlib: import it where a figure is asked for.
"""

from __future__ import annotations

import heapq
import io
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from yadtq_nb.model import STATE_OF_CODE
from yadtq_nb.notebook.words import duration

#: Seconds by which a task may begin before the one before it in its lane has ended, at least and at most: a time since
#: the epoch has a resolution of its own, and clocks are read twice.
_OVERLAP: Final = (1e-6, 1e-4)
#: What is drawn of a time axis, in pixels: bars closer than one of these are drawn as one.
_PIXELS: Final = 2_000
#: Up to this number of tasks in a lane each has a bar of its own, with a gap between them.
_SINGLE: Final = 250
#: Lanes up to this number have their full height, in inches; more share what these have.
_LANES, _HEIGHT = 32, 0.26
#: Names of workers that are legible beside one another.
_NAMES: Final = 40
#: As the card has them; failures are drawn last, on top.
_COLOURS: Final = {
    "succeeded": (56 / 255, 142 / 255, 60 / 255),
    "cancelled": (0.55, 0.55, 0.55),
    "failed": (211 / 255, 47 / 255, 47 / 255),
}


class Timeline(Figure):
    """A figure that a notebook shows, whether or not pyplot was imported; none of pyplot's."""

    def _repr_png_(self) -> bytes:
        with io.BytesIO() as file:
            self.savefig(file, format="png", bbox_inches="tight")
            return file.getvalue()


def draw(
    name: str,
    states: bytes | bytearray,
    workers: Sequence[str],
    started: npt.NDArray[np.float64],
    seconds: npt.NDArray[np.float64],
) -> Timeline:
    """Return the figure of a job's tasks that have run.

    Args:
        name: of the job.
        states: one byte a task, as in STATE_CODES; what has none is left out.
        workers: the node that ran each task.
        started: seconds since the epoch, NaN for a task that did not start; such a task is left out.
        seconds: run time of each.
    """
    ran = np.flatnonzero(~np.isnan(started) & ~np.isnan(seconds))
    ran = ran[np.argsort(started[ran], kind="stable")]
    begin = started[ran] - (started[ran[0]] if len(ran) else 0.0)
    end = begin + seconds[ran]
    # In the order in which they began.
    node, nodes = pd.factorize(np.array([workers[i] for i in ran.tolist()], dtype=object))
    lane, counts = _lanes(begin, end, node, len(nodes))
    span = float(end.max()) if len(ran) else 0.0
    total = int(counts.sum())
    figure = Timeline(figsize=(9.6, 1.35 + _HEIGHT * min(max(total, 2), _LANES)), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    factor, unit = _unit(span or 1.0)
    first = np.concatenate([[0], np.cumsum(counts)[:-1]]) if len(nodes) else np.zeros(0, dtype=int)
    lane = first[node] + lane
    single = not len(ran) or int(np.bincount(lane).max()) <= _SINGLE
    gap = 0.0 if single else span / factor / _PIXELS
    _draw_bars(axes, begin / factor, end / factor, lane, np.frombuffer(states, dtype=np.uint8)[ran], gap)
    _draw_workers(axes, nodes, first, counts)
    alike = "" if single else "; tasks without a gap are drawn as one bar"
    axes.set_xlabel(f"{unit} since the first task began{alike}", fontsize=9)
    axes.set_xlim(0, span / factor or 1)
    if not len(ran):
        axes.text(0.5, 0.5, "no task has run yet", ha="center", va="center", color="grey", transform=axes.transAxes)
    busy = f", {100 * seconds[ran].sum() / (total * span):.0f} % busy" if span > 0 else ""
    axes.set_title(
        f"{name}: {_many(len(ran), 'task')} on {_many(len(nodes), 'worker')}, {duration(span)}{busy}",
        loc="left",
        fontsize=10,
    )
    return figure


def _many(number: int, thing: str) -> str:
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def _unit(span: float) -> tuple[float, str]:
    """Return the unit of time for an axis of so many seconds: how long it is, and its name."""
    units = ((1e-3, 1e-6, "µs"), (1.0, 1e-3, "ms"), (300.0, 1.0, "seconds"), (18_000.0, 60.0, "minutes"))
    return next(((factor, name) for most, factor, name in units if span < most), (3600.0, "hours"))


def _lanes(
    begin: npt.NDArray[np.float64], end: npt.NDArray[np.float64], node: npt.NDArray[np.intp], nodes: int
) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
    """Return the lane of each task within its worker, and how many lanes each worker has; tasks are sorted by begin."""
    free: list[list[int]] = [[] for _ in range(nodes)]
    ends: list[list[tuple[float, int]]] = [[] for _ in range(nodes)]
    counts = [0] * nodes
    lanes = []
    overlap = float(np.clip(0.2 * np.median(end - begin), *_OVERLAP)) if len(begin) else 0.0
    for first, last, who in zip(begin.tolist(), end.tolist(), node.tolist(), strict=True):
        while ends[who] and ends[who][0][0] <= first + overlap:
            heapq.heappush(free[who], heapq.heappop(ends[who])[1])
        if not free[who]:
            free[who].append(counts[who])
            counts[who] += 1
        lane = heapq.heappop(free[who])
        heapq.heappush(ends[who], (last, lane))
        lanes.append(lane)
    return np.array(lanes, dtype=np.intp), np.array(counts, dtype=np.intp)


def _draw_bars(
    axes: Axes,
    begin: npt.NDArray[np.float64],
    end: npt.NDArray[np.float64],
    lane: npt.NDArray[np.intp],
    codes: npt.NDArray[np.uint8],
    gap: float,
) -> None:
    pixel = float(end.max()) / _PIXELS if len(end) else 0.0
    names = {str(state): code for code, state in STATE_OF_CODE.items()}
    shown = []
    for state, colour in _COLOURS.items():
        of_state = codes == names[state]
        if not of_state.any():
            continue
        shown.append(Patch(color=colour, label=f"{int(of_state.sum()):,} {state}"))
        left, right, where = _merged(begin[of_state], end[of_state], lane[of_state], gap)
        # So that a short one is seen: a failure among ten thousand above all.
        right = np.maximum(right, left + (3 if state == "failed" else 1) * pixel)
        low, high = where - 0.42, where + 0.42
        corners = np.stack([left, low, left, high, right, high, right, low], axis=1).reshape(-1, 4, 2)
        edge = "none" if gap else "white"
        axes.add_collection(PolyCollection(list(corners), facecolors=[colour], edgecolors=edge, linewidths=0.6))
    if shown:
        axes.legend(
            handles=shown, loc="lower right", bbox_to_anchor=(1, 1), ncols=3, frameon=False, fontsize=8, borderpad=0.2
        )


def _merged(
    begin: npt.NDArray[np.float64], end: npt.NDArray[np.float64], lane: npt.NDArray[np.intp], gap: float
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64], npt.NDArray[np.intp]]:
    """Return bars as (begin, end, lane), those of one lane that are no more than gap apart as one; 0 merges none."""
    order = np.lexsort((begin, lane))
    begin, end, lane = begin[order], end[order], lane[order]
    if not gap:
        return begin, end, lane
    apart = np.concatenate([[True], (lane[1:] != lane[:-1]) | (begin[1:] - end[:-1] > gap)])
    starts = np.flatnonzero(apart)
    return begin[starts], np.maximum.reduceat(end, starts), lane[starts]


def _draw_workers(axes: Axes, nodes: Any, first: npt.NDArray[np.intp], counts: npt.NDArray[np.intp]) -> None:
    total = int(counts.sum())
    axes.set_ylim(max(total, 1) - 0.5, -0.5)
    for place in range(1, len(nodes), 2):
        axes.axhspan(
            first[place] - 0.5, first[place] + counts[place] - 0.5, color="black", alpha=0.05, linewidth=0, zorder=0
        )
    every = -(-len(nodes) // _NAMES)
    named = range(0, len(nodes), every) if every else range(0)
    axes.set_yticks([first[i] + (counts[i] - 1) / 2 for i in named], [nodes[i] for i in named], fontsize=8)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelsize=8)
    axes.grid(axis="x", alpha=0.25, linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)

"""Measure one task there and back, and the rate of a map, beside the floor and joblib, in the same run.

make bench                       the local stack
make bench ARGS="--stack kafka"  Apache Kafka, fetched by Maven
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import joblib
import numpy as np
import psutil

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "tests")]

import floor  # noqa: E402  # beside this file

from yadtq_nb import Config, LocalCluster, Queue  # noqa: E402  # sorted after it

SLOTS = 2
#: Tasks that are not counted, first.
_WARM = 30


def add_one(x: int) -> int:
    """What every task does: nothing to speak of."""
    return x + 1


def main() -> None:
    """Measure, and print a table and a line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stack", choices=["local", "kafka"], default="local")
    parser.add_argument("--tasks", type=int, default=300, help="tasks sent one at a time")
    parser.add_argument("--items", type=int, default=100_000, help="items of a map")
    parser.add_argument("--runs", type=int, default=5, help="maps, of which the median counts")
    given = parser.parse_args()
    with _cluster(given.stack) as cluster, cluster.queue() as queue:
        found = measure(cluster, queue, given)
    print(_table(given.stack, found))
    print(json.dumps({"stack": given.stack, **found}))


def measure(cluster: LocalCluster, queue: Queue, given: argparse.Namespace) -> dict[str, float]:
    """Return all figures by name. The floor is measured before and after, since a machine's speed drifts."""
    one: dict[str, list[float]] = {"ours": [], "floor": []}
    many: dict[str, list[float]] = {"ours": [], "floor": [], "joblib": []}
    _measure_floor(cluster, given, one["floor"], many["floor"])
    queue.map(add_one, range(1_000)).results(timeout=60)
    one["ours"] = [_timed(lambda: queue.submit(add_one, 1).result(30)) for _ in range(given.tasks + _WARM)][_WARM:]
    with joblib.Parallel(n_jobs=SLOTS) as pool:
        pool(joblib.delayed(add_one)(i) for i in range(1_000))
        for _ in range(given.runs):
            seconds = _timed(lambda: _check(queue.map(add_one, range(given.items)).results(60)))
            many["ours"].append(given.items / seconds)
            seconds = _timed(lambda: _check(pool(map(joblib.delayed(add_one), range(given.items)))))
            many["joblib"].append(given.items / seconds)
    _measure_floor(cluster, given, one["floor"], many["floor"])
    return {
        "floor_p50_ms": 1e3 * statistics.median(one["floor"]),
        "p50_ms": 1e3 * statistics.median(one["ours"]),
        "p99_ms": 1e3 * statistics.quantiles(one["ours"], n=100)[98],
        "floor_items_per_s": statistics.median(many["floor"]),
        "items_per_s": statistics.median(many["ours"]),
        "joblib_items_per_s": statistics.median(many["joblib"]),
        "frame_of_a_million_s": _timed(lambda: _frame(1_000_000)),
        **_idle(),
        "client_rss_mb": psutil.Process().memory_info().rss / 2**20,
    }


def _measure_floor(cluster: LocalCluster, given: argparse.Namespace, one: list[float], many: list[float]) -> None:
    # Its worker polls all the time it lives: it must not while something else is measured.
    with floor.Floor(cluster.config) as ground:
        one += [_timed(lambda: ground.there_and_back(1, 1)) for _ in range(given.tasks // 2 + _WARM)][_WARM:]
        many += [given.items / _timed(lambda: ground.there_and_back(given.items, 2_000)) for _ in range(given.runs)]


def _idle(seconds: float = 10.0) -> dict[str, float]:
    """Return what the stack's processes use while nothing happens: percent of one core, and MB, without Kafka."""
    processes = [p for p in psutil.Process().children(recursive=True) if "joblib" not in " ".join(p.cmdline())]
    time.sleep(2)  # what the maps have left to do is not idleness
    before = [sum(p.cpu_times()[:2]) for p in processes]
    time.sleep(seconds)
    used = sum(sum(p.cpu_times()[:2]) - b for p, b in zip(processes, before, strict=True))
    java = [p for p in processes if p.name() == "java"]
    memory = sum(p.memory_full_info().pss for p in processes if p not in java)
    return {"idle_cpu_percent": 100 * used / seconds, "stack_pss_mb": memory / 2**20}


def _frame(rows: int) -> None:
    from yadtq_nb.client import frame

    moments = np.full(rows, 1.8e9)
    frame.build_frame(
        list(range(rows)),
        [0.5 * row for row in range(rows)],
        b"S" * rows,
        {},
        ["node"] * rows,
        moments,
        np.full(rows, 0.5),
        np.ones(rows, dtype=np.int64),
    )


def _timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _check(results: list[int]) -> None:
    if results != list(range(1, len(results) + 1)):
        raise SystemExit("wrong results")


def _table(stack: str, f: dict[str, float]) -> str:
    return "\n".join(
        [
            f"| {stack} stack, {os.cpu_count()} cores, {SLOTS} slots | yadtq-nb | floor | joblib |",
            "| --- | ---: | ---: | ---: |",
            f"| one task there and back, p50 | {f['p50_ms']:.2f} ms | {f['floor_p50_ms']:.2f} ms | |",
            f"| no-op map, items a second | {f['items_per_s']:,.0f} | {f['floor_items_per_s']:,.0f} | "
            f"{f['joblib_items_per_s']:,.0f} |",
            f"| idle, percent of a core | {f['idle_cpu_percent']:.1f} | | |",
            f"| frame of 1,000,000 floats | {f['frame_of_a_million_s']:.2f} s | | |",
            f"| memory of the stack, MB | {f['stack_pss_mb']:.0f} | | |",
        ]
    )


@contextlib.contextmanager
def _cluster(stack: str) -> Iterator[LocalCluster]:
    if stack == "local":
        with LocalCluster(SLOTS) as cluster:
            yield cluster
        return
    import stacks

    with tempfile.TemporaryDirectory() as directory, stacks.start("kafka", Path(directory)) as servers:
        config: Config = servers.config
        with LocalCluster(
            SLOTS, kafka=config.kafka, redis=config.redis, settings={"partitions": config.partitions}
        ) as cluster:
            yield cluster


if __name__ == "__main__":
    main()

"""Measure what a death costs: 2,000 tasks of 10 ms on two workers of one slot, one of them killed about 30 % in.

python bench/deaths.py                  the local stack
python bench/deaths.py --stack kafka    Apache Kafka, fetched by Maven
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import time
from collections import Counter
from pathlib import Path

import psutil

from bench import servers
from yadtq_nb import LocalCluster, Queue

_TASKS = 2_000
_SECONDS = 0.01
_AT = 0.3


def traced(x: int, audit: str) -> int:
    """Write down that it runs, and take a moment."""
    file = os.open(audit, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(file, f"{x}\n".encode())
    os.close(file)
    time.sleep(_SECONDS)
    return x


def main() -> None:
    """Measure, and print a table and a line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stack", choices=["local", "kafka"], default="local")
    parser.add_argument("--runs", type=int, default=5, help="of each, of which the median counts")
    given = parser.parse_args()
    seconds: dict[str, list[float]] = {}
    again: Counter[str] = Counter()
    with servers(given.stack) as options, LocalCluster(1, 2, **options) as cluster, cluster.queue() as queue:
        queue.map(traced, range(20), kwargs={"audit": os.devnull}).results(30)
        for run in range(given.runs):
            for what in ("undisturbed", "slot killed", "node killed"):
                audit = cluster._home.path / f"audit-{run}-{what.split()[0]}"
                seconds.setdefault(what, []).append(_run(cluster, queue, what, audit))
                again[what] += sum(times > 1 for times in Counter(audit.read_text().split()).values())
    calm = statistics.median(seconds["undisturbed"])
    print(f"| {given.stack} stack, {_TASKS:,} tasks of {1e3 * _SECONDS:g} ms, 2 workers | s | over | run again |")
    print("| --- | ---: | ---: | ---: |")
    for what, found in seconds.items():
        median = statistics.median(found)
        print(f"| {what} | {median:.2f} | {median - calm:+.2f} | {again[what] / given.runs:g} |")
    print(json.dumps({"stack": given.stack, "seconds": seconds, "run_again": again}))


def _run(cluster: LocalCluster, queue: Queue, what: str, audit: Path) -> float:
    cluster.wait()
    start = time.perf_counter()
    job = queue.map(traced, range(_TASKS), kwargs={"audit": str(audit)})
    while job.progress.succeeded < _AT * _TASKS:
        time.sleep(0.02)
    node = psutil.Process(cluster.workers[0].pid)
    if what == "slot killed":
        (template,) = node.children()
        template.children()[0].kill()
    elif what == "node killed":
        os.kill(node.pid, signal.SIGKILL)
    if job.results(120) != list(range(_TASKS)):
        raise SystemExit("wrong results")
    return time.perf_counter() - start


if __name__ == "__main__":
    main()

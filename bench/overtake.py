"""Measure how long a job of high priority takes while many chunks of normal priority wait.

python bench/overtake.py                  the local stack
python bench/overtake.py --stack kafka    Apache Kafka, fetched by Maven
"""

from __future__ import annotations

import argparse
import time

from bench import SLOTS, servers
from yadtq_nb import LocalCluster


def main() -> None:
    """Measure, and print a line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stack", choices=["local", "kafka"], default="local")
    parser.add_argument("--chunks", type=int, default=100_000)
    given = parser.parse_args()
    with servers(given.stack) as options, LocalCluster(SLOTS, **options) as cluster, cluster.queue() as queue:
        backlog = queue.map(time.sleep, [0.02] * given.chunks, chunksize=1)
        store = queue._link().store
        while not (record := store.record(backlog.id)) or not record.sealed:
            time.sleep(0.1)
        seconds = []
        for _ in range(5):
            start = time.perf_counter()
            queue.map(abs, range(-20, 0), priority="high").results(60)
            seconds.append(time.perf_counter() - start)
        progress = backlog.progress
        told = ", ".join(f"{each:.2f}" for each in seconds)
        print(f"{given.stack}: {told} s for 20 high tasks, with {progress.queued:,} normal chunks before them")
        backlog.cancel()


if __name__ == "__main__":
    main()

"""Measure one task there and back, and the rate of a map, beside the floor and joblib, in the same run.

make bench                       the local stack
make bench ARGS="--stack kafka"  Apache Kafka, fetched by Maven
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import pickle
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import joblib
import msgspec
import numpy as np
import psutil
import redis
from confluent_kafka import Consumer, Producer, TopicPartition
from confluent_kafka.admin import AdminClient, NewTopic

from yadtq_nb import Config, LocalCluster, Queue

SLOTS = 2
_PARTITIONS = 4
#: Tasks that are not counted, first.
_WARM = 30
#: Times that ours and the floor are measured in turn.
_TURNS = 3


def add_one(x: int) -> int:
    """What every task does: nothing to speak of."""
    return x + 1


def main() -> None:
    """Measure, and print a table and a line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stack", choices=["local", "kafka"], default="local")
    parser.add_argument("--tasks", type=int, default=600, help="tasks sent one at a time")
    parser.add_argument("--items", type=int, default=100_000, help="items of a map")
    parser.add_argument("--runs", type=int, default=5, help="maps, of which the median counts")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve:
        _serve_kafka()
        return
    with servers(given.stack) as options, LocalCluster(SLOTS, **options) as cluster, cluster.queue() as queue:
        found = measure(cluster, queue, given)
    print(_table(given.stack, found))
    print(json.dumps({"stack": given.stack, **found}))


def measure(cluster: LocalCluster, queue: Queue, given: argparse.Namespace) -> dict[str, float]:
    """Return all figures by name. Ours and the floor are measured in turns, since a machine's speed drifts."""
    one: dict[str, list[float]] = {"ours": [], "floor": []}
    many: dict[str, list[float]] = {"ours": [], "floor": [], "joblib": []}
    # Both once that are not counted: a broker in Java is slow at first.
    _measure_floor(cluster, given, [], [])
    queue.map(add_one, range(1_000)).results(timeout=60)
    _measure_one(queue, given.tasks)
    for _ in range(_TURNS):
        one["ours"] += _measure_one(queue, given.tasks // _TURNS)
        _measure_floor(cluster, given, one["floor"], many["floor"])
    with joblib.Parallel(n_jobs=SLOTS) as pool:
        pool(joblib.delayed(add_one)(i) for i in range(1_000))
        for _ in range(given.runs):
            seconds = _timed(lambda: _check(queue.map(add_one, range(given.items)).results(60)))
            many["ours"].append(given.items / seconds)
            seconds = _timed(lambda: _check(pool(map(joblib.delayed(add_one), range(given.items)))))
            many["joblib"].append(given.items / seconds)
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


def _measure_one(queue: Queue, tasks: int) -> list[float]:
    return [_timed(lambda: queue.submit(add_one, 1).result(30)) for _ in range(tasks + _WARM)][_WARM:]


def _measure_floor(cluster: LocalCluster, given: argparse.Namespace, one: list[float], many: list[float]) -> None:
    # Its worker polls all the time it lives: it must not while something else is measured.
    with Floor(cluster.config) as ground:
        one += [_timed(lambda: ground.there_and_back(1, 1)) for _ in range(given.tasks // _TURNS + _WARM)][_WARM:]
        many += [given.items / _timed(lambda: ground.there_and_back(given.items, 2_000)) for _ in range(given.runs)]


def _idle(seconds: float = 10.0) -> dict[str, float]:
    """Return what idle processes of the stack use: percent of one core, and MB. Kafka's Java is left out."""
    others = [p for p in psutil.Process().children(recursive=True) if p.name() != "java"]
    processes = [p for p in others if "joblib" not in " ".join(p.cmdline())]
    time.sleep(2)  # what the maps have left to do is not idleness
    before = [sum(p.cpu_times()[:2]) for p in processes]
    time.sleep(seconds)
    used = sum(sum(p.cpu_times()[:2]) - b for p, b in zip(processes, before, strict=True))
    memory = sum(p.memory_full_info().pss for p in processes)
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
def servers(stack: str) -> Iterator[dict[str, Any]]:
    """Give the arguments of a LocalCluster on a stack."""
    if stack == "local":
        yield {}
        return
    # Started by another process: what is imported for it would travel with each task as local source.
    with subprocess.Popen(
        [sys.executable, str(Path(__file__)), "--serve"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as server:
        assert server.stdout is not None
        config = msgspec.json.decode(server.stdout.readline(), type=Config)
        yield {"kafka": config.kafka, "redis": config.redis, "settings": {"partitions": config.partitions}}
        server.communicate()


def _serve_kafka() -> None:
    """Run Apache Kafka and Valkey, as the tests do, until standard input ends."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    import stacks

    with tempfile.TemporaryDirectory() as directory, stacks.start("kafka", Path(directory)) as servers:
        print(msgspec.json.encode(servers.config).decode(), flush=True)
        sys.stdin.read()


class Floor:
    """The same hops with no task queue in them: a real queue can only be slower.

    A client produces records, a worker process consumes them and writes an answer for each to a Redis stream, which the
    client reads. No function travels, nothing is leased, signed or retried.
    """

    def __init__(self, config: Config) -> None:
        name = f"floor-{uuid.uuid4().hex[:8]}"
        admin = AdminClient({"bootstrap.servers": config.kafka})
        for future in admin.create_topics([NewTopic(name, _PARTITIONS, 1)]).values():
            future.result(20)
        context = multiprocessing.get_context("spawn")
        ready = context.Event()
        self._worker = context.Process(target=_floor_worker, args=(config, name, ready))
        self._worker.start()
        ready.wait(30)
        self._client = _FloorClient(config, name)

    def __enter__(self) -> Floor:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.send(b"stop")
        self._worker.join(10)
        self._client.close()

    def there_and_back(self, items: int, chunk: int) -> None:
        """Send items in chunks, and wait for all answers."""
        self._client.there_and_back(items, chunk)


class _FloorClient:
    def __init__(self, config: Config, name: str) -> None:
        self._redis: Any = redis.Redis.from_url(config.redis, protocol=2)
        settings = {"linger.ms": 0, "enable.idempotence": True, "queue.buffering.max.messages": 2_000_000}
        self._producer = Producer({"bootstrap.servers": config.kafka, **settings})
        self._producer.list_topics(name, timeout=10)
        self._name = name
        self._last = "0"
        self._sent = 0

    def send(self, body: bytes) -> None:
        self._producer.produce(self._name, body, partition=self._sent % _PARTITIONS)
        self._producer.poll(0)
        self._sent += 1

    def there_and_back(self, items: int, chunk: int) -> None:
        for first in range(0, items, chunk):
            self.send(pickle.dumps(list(range(first, first + chunk))))
        got = 0
        while got < items:
            for _, entries in self._redis.xread({self._name: self._last}, count=5000, block=5000) or []:
                for self._last, fields in entries:  # the last one read is where reading goes on
                    got += len(pickle.loads(fields[b"v"]))

    def close(self) -> None:
        self._producer.flush(10)
        self._redis.delete(self._name)
        self._redis.close()


def _floor_worker(config: Config, name: str, ready: Event) -> None:
    store: Any = redis.Redis.from_url(config.redis)
    wait = {"fetch.wait.max.ms": 1} if config.reading == "wake" else {}
    consumer = Consumer({"bootstrap.servers": config.kafka, "group.id": name, "enable.auto.commit": False, **wait})
    consumer.assign([TopicPartition(name, partition, 0) for partition in range(_PARTITIONS)])
    consumer.poll(1.0)
    ready.set()
    while True:
        first = consumer.poll(0.5)
        if first is None:
            continue
        pipe = store.pipeline(transaction=False)
        for message in [first, *consumer.consume(999, 0)]:
            body = message.value()
            if body == b"stop":
                pipe.execute()
                consumer.close()
                return
            pipe.xadd(name, {"v": pickle.dumps([x + 1 for x in pickle.loads(body)])})
        pipe.execute()


if __name__ == "__main__":
    main()

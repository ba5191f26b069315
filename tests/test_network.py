"""Cables are pulled while a map runs: a node, the broker or the store is cut off, and comes back.

On Apache Kafka only: the local stack lies in one machine. Each party has a network namespace of its own and a cable to
a bridge; a cable that is pulled swallows what is sent, as a broken switch does. Needs root and `ip`; skipped elsewhere.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import stacks
from waiting import runs, traced, wait_until

from yadtq_nb import LocalCluster
from yadtq_nb.local.servers import WORKER

LEASE = {"lease": 1.2, "heartbeat": 0.4}
#: Seconds that a cable is out: longer than the lease, the heartbeat and what TCP takes to try again.
AWAY = 3.0
COUNT = 600
LIMIT = 60


class Net:
    """A bridge, and whoever has joined it."""

    def __init__(self, ip: str) -> None:
        self._ip = ip
        self._tag = f"yq{os.getpid() % 100_000}"
        self._hub = f"{self._tag}-hub"
        self._subnet = f"198.18.{os.getpid() % 250}"
        self._names: list[str] = []
        self._run("netns", "add", self._hub)
        self._run("-n", self._hub, "link", "add", "bridge", "type", "bridge")
        self._run("-n", self._hub, "link", "set", "bridge", "up")

    def join(self, name: str, *, here: bool = False) -> stacks.Place:
        """Lay a cable to a namespace of that name, or to this process's own."""
        self._names.append(name)
        host, cable = f"{self._subnet}.{len(self._names)}", f"{self._tag}{name}"
        inside: tuple[str, ...] = ()
        if not here:
            self._run("netns", "add", cable)
            inside = ("-n", cable)
            self._run(*inside, "link", "set", "lo", "up")
        self._run(*inside, "link", "add", cable, "type", "veth", "peer", "name", name, "netns", self._hub)
        self._run("-n", self._hub, "link", "set", "dev", name, "master", "bridge", "up")
        self._run(*inside, "addr", "add", f"{host}/24", "dev", cable)
        self._run(*inside, "link", "set", "dev", cable, "up")
        return stacks.Place(host, () if here else (self._ip, "netns", "exec", cable))

    def cut(self, name: str) -> None:
        """Pull a cable."""
        self._run("-n", self._hub, "link", "set", "dev", name, "down")

    def mend(self, name: str) -> None:
        """Put it back."""
        self._run("-n", self._hub, "link", "set", "dev", name, "up")

    def close(self) -> None:
        """Remove all, once nobody lives there any more."""
        for name in (*(f"{self._tag}{name}" for name in self._names), self._hub):
            subprocess.run([self._ip, "netns", "del", name], capture_output=True, check=False)

    def _run(self, *arguments: str) -> None:
        done = subprocess.run([self._ip, *arguments], capture_output=True, text=True, check=False)
        if done.returncode:
            raise OSError(f"ip {' '.join(arguments)}: {done.stderr}")


@pytest.fixture(scope="module")
def net() -> Iterator[Net]:
    ip = shutil.which("ip")
    if ip is None or os.geteuid():
        pytest.skip("network namespaces need `ip` and root")
    try:
        net = Net(ip)
    except OSError as exc:
        pytest.skip(f"no network namespaces here: {exc}")
    try:
        net.join("client", here=True)
        yield net
    finally:
        net.close()


@pytest.fixture(scope="module")
def servers(
    request: pytest.FixtureRequest, net: Net, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[stacks.Servers]:
    """A broker and a store, each in a namespace of its own."""
    if request.config.getoption("--stack") not in ("both", "kafka"):
        pytest.skip("not among the stacks that were asked for")
    places = {"broker_at": net.join("broker"), "store_at": net.join("store")}
    with stacks.start("kafka", tmp_path_factory.mktemp("network"), **places) as started:
        yield started


@pytest.fixture
def make_nodes(servers: stacks.Servers, queue_name: str) -> Iterator[Callable[..., LocalCluster]]:
    """Make a worker of one slot, in a namespace or here."""
    made: list[LocalCluster] = []

    def make(*before: str) -> LocalCluster:
        given: dict[str, Any] = {name: getattr(servers.config, name) for name in servers.config.__struct_fields__}
        kafka, redis = given.pop("kafka"), given.pop("redis")
        settings = {**given, **LEASE}
        command = (*before, *WORKER)
        made.append(LocalCluster(1, 1, queue_name, kafka=kafka, redis=redis, settings=settings, worker_command=command))
        return made[-1]

    yield make
    for cluster in made:
        cluster.close()


def cut_for_a_while(net: Net, name: str) -> None:
    net.cut(name)
    try:
        time.sleep(AWAY)
    finally:
        net.mend(name)


def check(results: list[int], audit: Path, *, again: int) -> None:
    assert results == [x * x for x in range(COUNT)]
    ran = Counter(runs(audit))
    assert ran.keys() == set(range(COUNT))
    assert sum(ran.values()) - COUNT <= again


def test_node_that_is_cut_off_for_longer_than_its_lease_and_comes_back(
    net: Net, servers: stacks.Servers, make_nodes: Callable[..., LocalCluster], audit: Path
) -> None:
    near, far = make_nodes(), make_nodes(*net.join("node").command)
    with near.queue() as queue:
        job = queue.map(traced, range(COUNT), kwargs={"audit": str(audit)}, chunksize=5)
        wait_until(lambda: len(runs(audit)) > COUNT // 10, "tasks run")
        net.cut("node")
        try:
            wait_until(lambda: sorted(queue.workers().status) == ["live", "lost"], "it is missed")
            time.sleep(AWAY)
        finally:
            net.mend("node")
        check(job.results(timeout=LIMIT), audit, again=10)
        assert (job.progress.succeeded, job.progress.failed) == (COUNT, 0)
        wait_until(lambda: sorted(queue.workers().status) == ["live", "live"], "it is back")
        assert far.workers[0].restarts == 0
        where = queue.map(lambda _: time.sleep(0.05) or os.readlink("/proc/self/ns/net"), range(30), chunksize=1)
        assert len(set(where.results(LIMIT))) == 2, "it works again"
        assert (job.progress.succeeded, job.progress.failed) == (COUNT, 0), "what it still had to say changed nothing"


def test_broker_that_is_cut_off_and_comes_back(
    net: Net, servers: stacks.Servers, make_nodes: Callable[..., LocalCluster], audit: Path
) -> None:
    with make_nodes().queue() as queue:
        job = queue.map(traced, range(COUNT), kwargs={"audit": str(audit)}, chunksize=5)
        wait_until(lambda: len(runs(audit)) > COUNT // 10, "tasks run")
        net.cut("broker")
        try:
            meanwhile = queue.map(abs, range(-100, 0))
            time.sleep(AWAY)
        finally:
            net.mend("broker")
        check(job.results(timeout=LIMIT), audit, again=0)
        assert meanwhile.results(timeout=LIMIT) == list(range(100, 0, -1))


def test_store_that_is_cut_off_and_comes_back(
    net: Net, servers: stacks.Servers, make_nodes: Callable[..., LocalCluster], audit: Path
) -> None:
    nodes = make_nodes()
    with nodes.queue() as queue:
        job = queue.map(traced, range(COUNT), kwargs={"audit": str(audit)}, chunksize=5)
        wait_until(lambda: len(runs(audit)) > COUNT // 10, "tasks run")
        cut_for_a_while(net, "store")
        check(job.results(timeout=LIMIT), audit, again=0)
        assert (job.progress.succeeded, job.progress.failed) == (COUNT, 0)
        assert nodes.workers[0].restarts == 0

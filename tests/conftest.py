"""What tests share: the servers, once a process; a queue name of its own for each test; workers where they are cheap.

stack         the servers, once for each of --stack and each process
cluster       the servers with one worker of two slots, for one test
queue         a queue served by such a worker, for all tests of a module
start_script  another program on that queue
audit         the file in which tasks write down that they run
"""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import stacks
from stacks import MakeCluster

from yadtq_nb import Queue, pending
from yadtq_nb.local import LocalCluster, servers

_numbers = itertools.count(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--stack",
        choices=["local", "kafka", "both", "testcontainers"],
        default="both",
        help="which servers the tests run on (default: both, the local stack and Apache Kafka)",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Give each of pytest-xdist's processes ports of its own: a server that is down keeps its port."""
    config.addinivalue_line("markers", "one_stack: no broker makes a difference here, so that one stack is enough")
    number = os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")
    count = os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")
    servers._PORTS = servers._PORTS[int(number) :: int(count)]  # type: ignore[misc]  # it is final


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "stack" in metafunc.fixturenames:
        chosen = metafunc.config.getoption("--stack")
        names = ["local", "kafka"] if chosen == "both" else [chosen]
        if metafunc.definition.get_closest_marker("one_stack"):
            names = names[:1]
        metafunc.parametrize("stack", names, indirect=True, scope="session")


@pytest.fixture(scope="session")
def stack(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[stacks.Servers]:
    """A broker and a store, shared by the tests of this process."""
    with stacks.start(request.param, tmp_path_factory.mktemp(request.param)) as started:
        yield started


@pytest.fixture(autouse=True)
def _no_client_is_left() -> Iterator[None]:
    """Close what a test has left open: clients whose broker has gone go on looking for it."""
    before = set(pending._open)
    yield
    for client in [client for id, client in pending._open.items() if id not in before]:
        client.leave()  # type: ignore[attr-defined]  # a Link


@pytest.fixture
def queue_name(request: pytest.FixtureRequest) -> str:
    """A name that no other test has: jobs, chunks and workers of other tests are not seen under it."""
    readable = re.sub(r"[^a-z0-9]+", "-", request.node.name.lower())[:40].strip("-")
    return f"{readable}-{next(_numbers)}"


@pytest.fixture
def audit(tmp_path: Path) -> Path:
    """The file in which tasks write down that they run: see waiting.traced."""
    path = tmp_path / "audit"
    path.touch()
    return path


StartScript = Callable[..., "subprocess.Popen[str]"]
RunScript = Callable[..., list[str]]


@pytest.fixture
def make_cluster(stack: stacks.Servers, queue_name: str) -> Iterator[MakeCluster]:
    """Make clusters on the session's servers: LocalCluster's arguments, closed with the test."""
    made: list[LocalCluster] = []

    def make(slots: int = 2, workers: int = 1, *, queue: str = queue_name, **options: Any) -> LocalCluster:
        settings = {**_differences(stack), **options.pop("settings", {})}
        cluster = LocalCluster(
            slots,
            workers,
            queue,
            kafka=stack.config.kafka,
            redis=stack.config.redis,
            settings=settings,
            **options,
        )
        made.append(cluster)
        return cluster

    yield make
    for cluster in made:
        cluster.close()


@pytest.fixture
def cluster(make_cluster: MakeCluster) -> LocalCluster:
    """One worker with two slots on the session's servers, and a queue of its own."""
    return make_cluster()


@pytest.fixture(scope="module")
def shared_cluster(stack: stacks.Servers, request: pytest.FixtureRequest) -> Iterator[LocalCluster]:
    """One worker with two slots for all tests of a module that do not disturb each other."""
    name = f"{request.node.path.stem}-{next(_numbers)}"
    kafka, redis = stack.config.kafka, stack.config.redis
    with LocalCluster(2, 1, name, kafka=kafka, redis=redis, settings=_differences(stack)) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def queue(shared_cluster: LocalCluster) -> Iterator[Queue]:
    """The queue that a module's tests share; jobs have names and ids of their own."""
    with shared_cluster.queue() as queue:
        queue._link()  # opened here, it is not a test's to close
        yield queue


@pytest.fixture
def start_script(shared_cluster: LocalCluster, tmp_path: Path) -> Iterator[StartScript]:
    """Start a program of its own, which has `queue`, in an empty directory; killed with the test."""
    settings = tmp_path / ".settings.json"
    settings.write_bytes(msgspec.json.encode(shared_cluster.config))
    name = shared_cluster.queue().name
    started: list[subprocess.Popen[str]] = []

    def start(source: str, *arguments: str) -> subprocess.Popen[str]:
        script = tmp_path / f"script{len(started)}.py"
        head = f"import sys\nfrom yadtq_nb import *\nqueue = Queue({name!r})\n"
        script.write_text(head + textwrap.dedent(source))
        process = subprocess.Popen(
            [sys.executable, "-W", "error", str(script), *arguments],
            cwd=tmp_path,
            env={**os.environ, "YADTQ_CONFIG": str(settings), "PYTHONPATH": str(stacks.ROOT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture
def run_script(start_script: StartScript) -> RunScript:
    """Run a program to its end, and return its lines of output."""

    def run(source: str, *arguments: str) -> list[str]:
        output, errors = (process := start_script(source, *arguments)).communicate(timeout=60)
        assert process.returncode == 0, errors
        return output.splitlines()

    return run


def _differences(stack: stacks.Servers) -> dict[str, Any]:
    given = stack.config
    return {
        "secret": given.secret,
        "reading": given.reading,
        "partitions": given.partitions,
        "watermark_chunks": given.watermark_chunks,
        "watermark_bytes": given.watermark_bytes,
    }


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    report = yield
    stack = getattr(item, "funcargs", {}).get("stack")
    if report.failed and isinstance(stack, stacks.Servers):
        report.sections.append(("logs of the servers", stack.tails()))
    return report

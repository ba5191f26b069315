"""What tests share: the servers, once a session; a queue name of its own for each test; workers where they are cheap.

stack     the servers, once for each of --stack
cluster   the servers with one worker of two slots, for one test
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from typing import Any

import pytest
import stacks
from stacks import MakeCluster

from yadtq_nb.local import LocalCluster

_numbers = itertools.count(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--stack",
        choices=["local", "kafka", "both", "testcontainers"],
        default="both",
        help="which servers the tests run on (default: both, the local stack and Apache Kafka)",
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "stack" in metafunc.fixturenames:
        chosen = metafunc.config.getoption("--stack")
        names = ["local", "kafka"] if chosen == "both" else [chosen]
        metafunc.parametrize("stack", names, indirect=True, scope="session")


@pytest.fixture(scope="session")
def stack(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[stacks.Servers]:
    """A broker and a store, shared by the session."""
    with stacks.start(request.param, tmp_path_factory.mktemp(request.param)) as servers:
        yield servers


@pytest.fixture
def queue_name(request: pytest.FixtureRequest) -> str:
    """A name that no other test has: jobs, chunks and workers of other tests are not seen under it."""
    readable = re.sub(r"[^a-z0-9]+", "-", request.node.name.lower())[:40].strip("-")
    return f"{readable}-{next(_numbers)}"


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
    servers = getattr(item, "funcargs", {}).get("stack")
    if report.failed and isinstance(servers, stacks.Servers):
        report.sections.append(("logs of the servers", servers.tails()))
    return report

"""The servers that the tests run on: the local stack, and Apache Kafka with Valkey.

local            Tansu and Valkey, as Queue() starts them
kafka            Apache Kafka from Maven's jars, Valkey from its wheel
testcontainers   both from images, where a Docker engine answers; not run in our CI, which has none
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NoReturn

import msgspec
import pytest

from yadtq_nb.config import Config
from yadtq_nb.local import LocalCluster, servers
from yadtq_nb.local.home import Home
from yadtq_nb.local.keeper import answers

StackName = Literal["local", "kafka", "testcontainers"]
#: What the fixture make_cluster gives: LocalCluster on the session's servers.
MakeCluster = Callable[..., LocalCluster]

ROOT = Path(__file__).parents[1]
LIBS = ROOT / ".cache" / "kafka" / "libs"
KAFKA_IMAGE = "apache/kafka:4.3.1"
VALKEY_IMAGE = "valkey/valkey:9.0-alpine"
SECRET = "a secret for tests only"

_PROPERTIES = """\
process.roles=broker,controller
node.id=1
controller.quorum.bootstrap.servers=127.0.0.1:{controller}
controller.listener.names=CONTROLLER
listeners=PLAINTEXT://127.0.0.1:{port},CONTROLLER://127.0.0.1:{controller}
advertised.listeners=PLAINTEXT://127.0.0.1:{port},CONTROLLER://127.0.0.1:{controller}
listener.security.protocol.map=CONTROLLER:PLAINTEXT,PLAINTEXT:PLAINTEXT
inter.broker.listener.name=PLAINTEXT
log.dirs={data}
offsets.topic.replication.factor=1
offsets.topic.num.partitions=1
transaction.state.log.replication.factor=1
transaction.state.log.min.isr=1
group.initial.rebalance.delay.ms=0
auto.create.topics.enable=false
broker.heartbeat.interval.ms=1000
broker.session.timeout.ms=3000
"""


class Servers(msgspec.Struct, frozen=True):
    """A broker and a store that answer."""

    name: StackName
    config: Config
    #: Logs of the servers, to be shown when a test fails.
    logs: tuple[Path, ...] = ()

    def tails(self, *, lines: int = 15) -> str:
        """Return the end of each log."""
        return "\n".join(f"--- {log.name}\n" + "\n".join(log.read_text().splitlines()[-lines:]) for log in self.logs)


@contextlib.contextmanager
def start(name: StackName, directory: Path) -> Iterator[Servers]:
    """Start a broker and a store, and end them with the block."""
    home = Home(directory)
    home.make()
    match name:
        case "local":
            with _valkey(home) as redis, _tansu(home) as kafka:
                yield Servers(name, _settings(kafka, redis, "wake"), (home.log("broker"), home.log("store")))
        case "kafka":
            with _valkey(home) as redis, _kafka(home) as kafka:
                yield Servers(name, _settings(kafka, redis, "poll"), (home.log("kafka"), home.log("store")))
        case "testcontainers":
            with _containers() as (kafka, redis):
                yield Servers(name, _settings(kafka, redis, "poll"))


@contextlib.contextmanager
def start_store(directory: Path) -> Iterator[Config]:
    """Start a store alone, for what needs no broker."""
    home = Home(directory)
    home.make()
    with _valkey(home) as redis:
        yield _settings("127.0.0.1:1", redis, "poll")


def _settings(kafka: str, redis: str, reading: Literal["wake", "poll"]) -> Config:
    watermark = {"watermark_chunks": None, "watermark_bytes": None} if reading == "wake" else {}
    return msgspec.convert(
        {"kafka": kafka, "redis": redis, "secret": SECRET, "reading": reading, "partitions": 4, **watermark}, Config
    )


@contextlib.contextmanager
def _valkey(home: Home) -> Iterator[str]:
    port = servers.free_port()
    with _process(home, servers.store(home, port, "password")):
        yield f"redis://:password@127.0.0.1:{port}/0"


@contextlib.contextmanager
def _tansu(home: Home) -> Iterator[str]:
    port = servers.free_port()
    with _process(home, servers.broker(home, port)):
        yield f"127.0.0.1:{port}"


@contextlib.contextmanager
def _kafka(home: Home) -> Iterator[str]:
    java = _java()
    port = servers.free_port()
    properties = home.path / "server.properties"
    properties.write_text(
        _PROPERTIES.format(port=port, controller=servers.free_port(taken=port), data=home.path / "kafka")
    )
    tool = [java, "-cp", f"{LIBS}/*", "kafka.tools.StorageTool"]
    subprocess.run(
        [*tool, "format", "--standalone", "-t", "MkU3OEVBNTcwNTJENDM2Qg", "-c", str(properties)],
        check=True,
        capture_output=True,
    )
    broker = servers.broker(home, port)
    options = [
        "-Xms256m",
        "-Xmx512m",
        "-XX:+UseSerialGC",
        "-XX:TieredStopAtLevel=1",
        "-Dorg.slf4j.simpleLogger.defaultLogLevel=warn",
    ]
    spec = {
        **broker,
        "name": "kafka",
        "argv": [java, *options, "-cp", f"{LIBS}/*", "kafka.Kafka", str(properties)],
    }
    with _process(home, spec):
        yield f"127.0.0.1:{port}"


@contextlib.contextmanager
def _process(home: Home, spec: dict[str, Any], *, timeout: float = 60.0) -> Iterator[None]:
    """Run a server of the plan until the block ends, and kill it then: its data is in a temporary directory."""
    log = home.log(str(spec["name"]))
    with log.open("wb") as output:
        process = subprocess.Popen(spec["argv"], cwd=home.path, stdout=output, stderr=output)
    try:
        deadline = time.monotonic() + timeout
        while not answers(spec):
            if process.poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"{spec['name']} did not start:\n{home.tail(str(spec['name']), lines=30)}")
            time.sleep(0.01)
        yield
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()


def _java() -> str:
    """Return java, with Kafka's jars in place."""
    java = shutil.which("java")
    if java is None:
        missing("Apache Kafka needs java")
    fetched = subprocess.run(["make", "kafka"], cwd=ROOT, capture_output=True, text=True, check=False)
    if fetched.returncode:
        missing(f"Apache Kafka could not be fetched by `make kafka`: {(fetched.stdout + fetched.stderr)[-2000:]}")
    return java


@contextlib.contextmanager
def _containers() -> Iterator[tuple[str, str]]:
    import docker
    from testcontainers.kafka import KafkaContainer
    from testcontainers.redis import RedisContainer

    try:
        docker.from_env().ping()
    except docker.errors.DockerException as exc:
        missing(f"no Docker engine answers: {exc}")
    kafka = KafkaContainer(KAFKA_IMAGE).with_kraft()
    redis = RedisContainer(VALKEY_IMAGE).with_command("valkey-server --appendonly yes --maxmemory-policy noeviction")
    with kafka, redis:
        port = redis.get_exposed_port(6379)
        yield kafka.get_bootstrap_server(), f"redis://{redis.get_container_host_ip()}:{port}/0"


def missing(reason: str) -> NoReturn:
    """A service that is missing skips on a laptop and fails in CI.

    Raises:
        Skipped, Failed: always.
    """
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)

"""The servers that the tests run on: the local stack, and Apache Kafka with Valkey.

local            Tansu and Valkey, as Queue() starts them
kafka            Apache Kafka from Maven's jars, Valkey from its wheel
testcontainers   both from images, where a Docker engine answers; not run in our CI, which has none
"""

from __future__ import annotations

import contextlib
import fcntl
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
PASSWORD = "password"

_PROPERTIES = """\
process.roles=broker,controller
node.id=1
controller.quorum.bootstrap.servers={host}:{controller}
controller.listener.names=CONTROLLER
listeners=PLAINTEXT://{host}:{port},CONTROLLER://{host}:{controller}
advertised.listeners=PLAINTEXT://{host}:{port},CONTROLLER://{host}:{controller}
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


class Place(msgspec.Struct, frozen=True):
    """Where a server runs."""

    host: str = "127.0.0.1"
    #: What its command begins with, to run it there.
    command: tuple[str, ...] = ()


HERE = Place()


class Server:
    """A server of the plan, which can be ended and started again on its port, with its data."""

    def __init__(self, home: Home, spec: dict[str, Any], place: Place = HERE) -> None:
        self.name = str(spec["name"])
        self.address = f"{place.host}:{spec['port']}"
        self._home = home
        self._spec = {**spec, "host": place.host, "argv": [*place.command, *spec["argv"]]}
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """Its process."""
        assert self._process is not None
        return self._process.pid

    def start(self, *, timeout: float = 60.0) -> None:
        """Start it, and wait until it answers."""
        with self._home.log(self.name).open("ab") as output:
            self._process = subprocess.Popen(self._spec["argv"], cwd=self._home.path, stdout=output, stderr=output)
        deadline = time.monotonic() + timeout
        while not answers(self._spec):
            if self._process.poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"{self.name} did not start:\n{self._home.tail(self.name, lines=30)}")
            time.sleep(0.01)

    def end(self, number: signal.Signals) -> None:
        """Send it a signal, and wait for its end."""
        if self._process is not None:
            self._process.send_signal(number)
            self._process.wait()

    def wipe(self) -> None:
        """Kill the store, and start it with nothing in it."""
        self.end(signal.SIGKILL)
        shutil.rmtree(self._home.store)
        self._home.make()
        self.start()

    @contextlib.contextmanager
    def running(self) -> Iterator[Server]:
        """Run it until the block ends, and kill it then: its data is in a temporary directory."""
        try:
            self.start()
            yield self
        finally:
            self.end(signal.SIGKILL)


class Servers(msgspec.Struct, frozen=True):
    """A broker and a store that answer."""

    name: StackName
    config: Config
    #: Logs of the servers, to be shown when a test fails.
    logs: tuple[Path, ...] = ()
    #: The broker and the store, where they are processes of ours.
    processes: tuple[Server, ...] = ()

    @property
    def broker(self) -> Server:
        """The broker's process."""
        return self.processes[0]

    @property
    def store(self) -> Server:
        """The store's process."""
        return self.processes[1]

    def tails(self, *, lines: int = 15) -> str:
        """Return the end of each log."""
        return "\n".join(f"--- {log.name}\n" + "\n".join(log.read_text().splitlines()[-lines:]) for log in self.logs)


@contextlib.contextmanager
def start(name: StackName, directory: Path, *, broker_at: Place = HERE, store_at: Place = HERE) -> Iterator[Servers]:
    """Start a broker and a store, and end them with the block."""
    if name == "testcontainers":
        with _containers() as (kafka, redis):
            yield Servers(name, _settings(kafka, redis, "poll"))
        return
    home = Home(directory)
    home.make()
    broker, reading = (tansu(home, broker_at), "wake") if name == "local" else (kafka_broker(home, broker_at), "poll")
    with valkey(home, store_at).running() as store, broker.running():
        yield Servers(
            name,
            _settings(broker.address, f"redis://:{PASSWORD}@{store.address}/0", reading),
            (home.log(broker.name), home.log(store.name)),
            (broker, store),
        )


@contextlib.contextmanager
def start_store(directory: Path) -> Iterator[Config]:
    """Start a store alone, for what needs no broker."""
    home = Home(directory)
    home.make()
    with valkey(home).running() as store:
        yield _settings("127.0.0.1:1", f"redis://:{PASSWORD}@{store.address}/0", "poll")


def _settings(kafka: str, redis: str, reading: Literal["wake", "poll"]) -> Config:
    watermark = {"watermark_chunks": None, "watermark_bytes": None} if reading == "wake" else {}
    return msgspec.convert(
        {"kafka": kafka, "redis": redis, "secret": SECRET, "reading": reading, "partitions": 4, **watermark}, Config
    )


def valkey(home: Home, place: Place = HERE) -> Server:
    """Return the store, not started yet."""
    spec = servers.store(home, servers.free_port(), PASSWORD)
    return Server(home, {**spec, "argv": [*spec["argv"], "--bind", place.host]}, place)


def tansu(home: Home, place: Place = HERE) -> Server:
    """Return the local stack's broker, not started yet."""
    spec = servers.broker(home, servers.free_port())
    return Server(home, {**spec, "argv": [word.replace(HERE.host, place.host) for word in spec["argv"]]}, place)


def kafka_broker(
    home: Home,
    place: Place = HERE,
    *,
    more: Callable[[int, int], str] = lambda port, controller: "",
    users: tuple[str, ...] = (),
) -> Server:
    """Return Apache Kafka, its storage formatted, not started yet.

    Args:
        more: given its port and its controller's, returns further lines of its settings, which win.
        users: credentials for SCRAM.
    """
    plan = kafka_plan(home, servers.free_port(), name="kafka", place=place, more=more, users=users)
    return Server(home, plan, place)


def kafka_plan(
    home: Home,
    port: int,
    *,
    name: str,
    place: Place = HERE,
    more: Callable[[int, int], str] = lambda port, controller: "",
    users: tuple[str, ...] = (),
) -> dict[str, Any]:
    """Return the plan of an Apache Kafka as keeper.py reads it, and make its directory ready; see kafka_broker."""
    java = _java()
    properties = home.path / "server.properties"
    controller = servers.free_port(taken=port)
    data = home.path / f"kafka-{port}"
    written = _PROPERTIES.format(host=place.host, port=port, controller=controller, data=data)
    properties.write_text(written + more(port, controller))
    tool = [java, "-cp", f"{LIBS}/*", "kafka.tools.StorageTool"]
    scram = [word for user in users for word in ("--add-scram", user)]
    subprocess.run(
        [*tool, "format", "--standalone", "-t", "MkU3OEVBNTcwNTJENDM2Qg", "-c", str(properties), *scram],
        check=True,
        capture_output=True,
    )
    options = [
        "-Xms256m",
        "-Xmx512m",
        "-XX:+UseSerialGC",
        "-XX:TieredStopAtLevel=1",
        "-Dorg.slf4j.simpleLogger.defaultLogLevel=warn",
    ]
    argv = [java, *options, "-cp", f"{LIBS}/*", "kafka.Kafka", str(properties)]
    return {**servers.broker(home, port), "name": name, "argv": argv}


def _java() -> str:
    """Return java, with Kafka's jars in place."""
    java = shutil.which("java")
    if java is None:
        missing("Apache Kafka needs java")
    with (ROOT / "tests" / "kafka" / "pom.xml").open() as pom:
        fcntl.flock(pom, fcntl.LOCK_EX)  # pytest-xdist's processes may come here at once
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

"""TLS and SASL (SCRAM) to Apache Kafka, TLS and a password to Valkey, with certificates that are made here.

The Valkey of the wheel is built without TLS: here it stands behind a small server that takes TLS off.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import stacks
import trustme
from cryptography.hazmat.primitives import serialization

from yadtq_nb import BacklogError, ConfigError, Queue, WorkbenchError, WorkbenchRefusedError
from yadtq_nb import config as configuration
from yadtq_nb.config import Config
from yadtq_nb.local import servers
from yadtq_nb.local.home import Home

USER, SCRAM_PASSWORD = "alice", "wonderland"

#: Kafka's listener for clients; the plain one is its own.
_LISTENER = """\
listeners=PLAINTEXT://127.0.0.1:{plain},CONTROLLER://127.0.0.1:{controller},SECURED://127.0.0.1:{port}
advertised.listeners=PLAINTEXT://127.0.0.1:{plain},CONTROLLER://127.0.0.1:{controller},SECURED://127.0.0.1:{port}
listener.security.protocol.map=CONTROLLER:PLAINTEXT,PLAINTEXT:PLAINTEXT,SECURED:SASL_SSL
sasl.enabled.mechanisms=SCRAM-SHA-512
listener.name.secured.scram-sha-512.sasl.jaas.config=\
org.apache.kafka.common.security.scram.ScramLoginModule required;
listener.name.secured.ssl.keystore.type=PEM
listener.name.secured.ssl.keystore.location={certificate}
"""


class Secured(msgspec.Struct, frozen=True):
    """Servers that take nobody without TLS and password."""

    config: Config
    #: An authority that has signed none of their certificates.
    stranger: Path

    def with_kafka(self, **options: str) -> Config:
        """Return settings with other options for Kafka; a dot is written as two underscores."""
        changed = {name.replace("__", "."): value for name, value in options.items()}
        return msgspec.structs.replace(self.config, kafka_options={**self.config.kafka_options, **changed})


@pytest.fixture(scope="module")
def secured(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secured]:
    if request.config.getoption("--stack") not in ("both", "kafka"):
        pytest.skip("the local stack listens on loopback only, without TLS")
    directory = tmp_path_factory.mktemp("secured")
    authority, stranger = directory / "authority.pem", directory / "stranger.pem"
    trustme.CA().cert_pem.write_to_path(str(stranger))
    signer = trustme.CA()
    signer.cert_pem.write_to_path(str(authority))
    certificate = directory / "server.pem"
    certificate.write_bytes(_certificate(signer))
    home = Home(directory / "home")
    home.make()
    port = servers.free_port()
    broker = stacks.kafka_broker(
        home,
        more=lambda plain, controller: _LISTENER.format(
            plain=plain, controller=controller, port=port, certificate=certificate
        ),
        users=(f"SCRAM-SHA-512=[name={USER},password={SCRAM_PASSWORD}]",),
    )
    with stacks.valkey(home).running() as store, broker.running(), _tls_before(store.address, certificate) as redis:
        config = Config(
            kafka=f"127.0.0.1:{port}",
            redis=f"rediss://:{stacks.PASSWORD}@{redis}/0",
            secret=stacks.SECRET,
            partitions=2,
            kafka_options={
                "security.protocol": "SASL_SSL",
                "sasl.mechanism": "SCRAM-SHA-512",
                "sasl.username": USER,
                "sasl.password": SCRAM_PASSWORD,
                "ssl.ca.location": str(authority),
            },
            redis_options={"ssl_ca_certs": str(authority)},
        )
        yield Secured(config, stranger)


def _certificate(signer: trustme.CA) -> bytes:
    """Return a key, in the form that Java reads, and its certificate."""
    issued = signer.issue_cert("127.0.0.1")
    key = serialization.load_pem_private_key(issued.private_key_pem.bytes(), None).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return key + b"".join(pem.bytes() for pem in issued.cert_chain_pems)


@contextlib.contextmanager
def _tls_before(address: str, certificate: Path) -> Iterator[str]:
    """Take TLS off what is sent to a server. Yields the address to connect to."""
    port = servers.free_port()
    command = [sys.executable, str(Path(__file__).with_name("untls.py")), str(certificate), str(port), address]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            yield f"127.0.0.1:{port}"
        finally:
            process.kill()


# How settings are given.


def in_file(config: Config, directory: Path) -> dict[str, str]:
    """Write yadtq.toml where a program starts."""
    kafka = "\n".join(f'"{name}" = "{value}"' for name, value in config.kafka_options.items())
    redis = "\n".join(f'{name} = "{value}"' for name, value in config.redis_options.items())
    (directory / "yadtq.toml").write_text(
        f'kafka = "{config.kafka}"\nredis = "{config.redis}"\nsecret = "{config.secret}"\npartitions = 2\n'
        f"[kafka_options]\n{kafka}\n[redis_options]\n{redis}\n"
    )
    return {}


def in_environment(config: Config, directory: Path) -> dict[str, str]:
    """Return variables that say it all."""
    return {
        "YADTQ_KAFKA": config.kafka,
        "YADTQ_REDIS": config.redis,
        "YADTQ_SECRET": config.secret,
        "YADTQ_KAFKA_OPTIONS": json.dumps(config.kafka_options),
        "YADTQ_REDIS_OPTIONS": json.dumps(config.redis_options),
    }


def in_both(config: Config, directory: Path) -> dict[str, str]:
    """Have the certificates in the file, and passwords in the environment."""
    public = {name: value for name, value in config.kafka_options.items() if name != "sasl.password"}
    in_file(msgspec.structs.replace(config, kafka_options=public, redis="redis://elsewhere"), directory)
    password = {"sasl.password": config.kafka_options["sasl.password"]}
    return {"YADTQ_REDIS": config.redis, "YADTQ_KAFKA_OPTIONS": json.dumps(password)}


Given = Callable[[Config, Path], dict[str, str]]
Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start a program with settings that were given in one of the ways above."""
    started: list[subprocess.Popen[str]] = []

    def run(given: Given, config: Config, *arguments: str) -> subprocess.Popen[str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("YADTQ_")}
        process = subprocess.Popen(
            [sys.executable, *arguments],
            cwd=tmp_path,
            env={**kept, "PYTHONPATH": os.pathsep.join(sys.path), **given(config, tmp_path)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield run
    for process in started:
        process.send_signal(signal.SIGTERM)
        try:
            process.communicate(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()


def worker(queue: str) -> list[str]:
    return ["-m", "yadtq_nb.cli", "worker", "--slots", "2", "--queue", queue]


@pytest.mark.parametrize("given", [in_file, in_both])
def test_map_runs_over_tls_with_passwords(
    secured: Secured, start: Start, queue_name: str, given: Given, tmp_path: Path
) -> None:
    start(given, secured.config, *worker(queue_name))
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(f"""
            from yadtq_nb import Queue
            with Queue({queue_name!r}) as queue:
                print(sum(queue.map(abs, range(-200, 0)).results(timeout=60)))
                print(queue.workers().status.tolist())
        """)
    )
    client = start(given, secured.config, str(script))
    output, errors = client.communicate(timeout=60)
    assert client.returncode == 0, errors
    assert output.split("\n")[:2] == ["20100", "['live']"]


def test_passwords_and_certificates_can_be_given_to_the_queue_itself(
    secured: Secured, start: Start, queue_name: str
) -> None:
    given = secured.config
    start(in_environment, given, *worker(queue_name))
    with Queue(
        queue_name,
        kafka=given.kafka,
        redis=given.redis,
        secret=given.secret,
        kafka_options=given.kafka_options,
        redis_options=given.redis_options,
    ) as queue:
        assert queue.map(abs, range(-50, 0)).results(60) == list(range(50, 0, -1))

        def inside(x: int) -> int:
            return int(queue.submit(abs, x).result(30))

        assert queue.submit(inside, -3).result(60) == 3, "a task has the queue's settings"


# What is wrong is named, soon.


def refused_by_kafka(secured: Secured, wrong: str) -> Config:
    match wrong:
        case "password":
            return secured.with_kafka(sasl__password="guessed")
        case "user":
            return secured.with_kafka(sasl__username="bob")
        case "mechanism":
            return secured.with_kafka(sasl__mechanism="PLAIN")
        case "authority":
            return secured.with_kafka(ssl__ca__location=str(secured.stranger))
        case "no such file":
            return secured.with_kafka(ssl__ca__location="/nowhere/ca.pem")
        case "misspelt":
            return secured.with_kafka(sasl__pasword="x")
    raise AssertionError(wrong)


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ("password", "invalid credentials.*sasl.password.*YADTQ_KAFKA_OPTIONS"),
        ("user", "invalid credentials.*sasl.username.*YADTQ_KAFKA_OPTIONS"),
        ("mechanism", "sasl.mechanism.*YADTQ_KAFKA_OPTIONS"),
        ("authority", "certificate.*ssl.ca.location.*YADTQ_KAFKA_OPTIONS"),
        ("no such file", "ssl.ca.location.*YADTQ_KAFKA_OPTIONS"),
        ("misspelt", "sasl.pasword.*YADTQ_KAFKA_OPTIONS"),
    ],
)
def test_kafka_that_refuses_is_an_error_at_once_that_names_the_setting(
    secured: Secured, queue_name: str, wrong: str, named: str
) -> None:
    with Queue(queue_name, config=refused_by_kafka(secured, wrong)) as queue:
        began = time.monotonic()
        with pytest.raises(BacklogError, match=named) as caught:
            queue.map(abs, [1])
    assert time.monotonic() - began < 9, "sooner than the library itself gives up"
    assert "guessed" not in str(caught.value)


@pytest.mark.parametrize("protocol", ["PLAINTEXT", "SSL"])
def test_other_protocol_than_the_broker_s_is_named(
    secured: Secured, queue_name: str, monkeypatch: pytest.MonkeyPatch, protocol: str
) -> None:
    monkeypatch.setattr("yadtq_nb.backlog.connection.TIMEOUT", 1.5)
    with (
        Queue(queue_name, config=secured.with_kafka(security__protocol=protocol)) as queue,
        pytest.raises(BacklogError, match=r"security.protocol in kafka_options"),
    ):
        queue.map(abs, [1])


@pytest.mark.parametrize(
    ("wrong", "error", "named"),
    [
        ("password", WorkbenchRefusedError, "password.*YADTQ_REDIS"),
        ("authority", WorkbenchRefusedError, "certificate.*ssl_ca_certs.*YADTQ_REDIS_OPTIONS"),
        ("no authority", WorkbenchRefusedError, "certificate.*ssl_ca_certs.*YADTQ_REDIS_OPTIONS"),
        ("no such file", WorkbenchRefusedError, "No such file.*ssl_ca_certs.*YADTQ_REDIS_OPTIONS"),
        ("misspelt", WorkbenchError, "ssl_ca_cert.*redis_options"),
    ],
)
def test_redis_that_refuses_is_an_error_at_once_that_names_the_setting(
    secured: Secured, queue_name: str, wrong: str, error: type[Exception], named: str
) -> None:
    changed: dict[str, Any] = {
        "password": {"redis": secured.config.redis.replace(stacks.PASSWORD, "guessed")},
        "authority": {"redis_options": {"ssl_ca_certs": str(secured.stranger)}},
        "no authority": {"redis_options": {}},
        "no such file": {"redis_options": {"ssl_ca_certs": "/nowhere/ca.pem"}},
        "misspelt": {"redis_options": {"ssl_ca_cert": "x"}},
    }[wrong]
    with Queue(queue_name, config=msgspec.structs.replace(secured.config, **changed)) as queue:
        began = time.monotonic()
        with pytest.raises(error, match=named) as caught:
            queue.map(abs, [1])
    assert time.monotonic() - began < 9, "sooner than the library itself gives up"
    assert "guessed" not in str(caught.value)


def test_redis_url_without_tls_where_the_server_wants_it_is_named(secured: Secured, queue_name: str) -> None:
    plain = msgspec.structs.replace(
        secured.config, redis=secured.config.redis.replace("rediss:", "redis:"), redis_options={}
    )
    with Queue(queue_name, config=plain) as queue, pytest.raises(WorkbenchError, match="rediss://"):
        queue.jobs()


@pytest.mark.parametrize("server", ["kafka", "redis"])
def test_worker_that_is_refused_ends_with_one_line(
    secured: Secured, start: Start, queue_name: str, server: str
) -> None:
    redis = secured.config.redis.replace(stacks.PASSWORD, "guessed")
    wrong = {
        "kafka": refused_by_kafka(secured, "password"),
        "redis": msgspec.structs.replace(secured.config, redis=redis),
    }[server]
    process = start(in_environment, wrong, *worker(queue_name))
    output, errors = process.communicate(timeout=30)
    assert process.returncode == 1
    (line,) = (line for line in errors.splitlines() if line.startswith("yadtq:"))
    assert "password" in line
    assert f"YADTQ_{server.upper()}" in line
    assert "Traceback" not in errors
    assert "guessed" not in output + errors


# Settings that are none.


@pytest.mark.parametrize("text", ["sasl.password=wonderland", '["wonderland"]', "{"])
def test_options_of_the_environment_that_are_no_json_object_are_named_and_not_shown(
    monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.setenv("YADTQ_KAFKA_OPTIONS", text)
    with pytest.raises(ConfigError, match="YADTQ_KAFKA_OPTIONS must be a JSON object") as caught:
        configuration.load(kafka="host:9092", redis="redis://host", secret="x")
    assert "wonderland" not in str(caught.value)


def test_options_are_put_together_from_arguments_environment_and_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "yadtq.toml").write_text('[redis_options]\na = 1\nb = 1\nc = 1\n[kafka_options]\n"client.id" = "me"\n')
    monkeypatch.setenv("YADTQ_REDIS_OPTIONS", '{"b": 2, "c": 2}')
    loaded = configuration.load(kafka="host:9092", redis="redis://host", secret="x", redis_options={"c": 3})
    assert loaded is not None
    assert loaded.redis_options == {"a": 1, "b": 2, "c": 3}
    assert loaded.kafka_options == {"client.id": "me"}


def test_options_in_the_file_that_are_no_table_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "yadtq.toml").write_text("kafka_options = 3\n")
    with pytest.raises(ConfigError, match=r"\[kafka_options\]"):
        configuration.load(kafka="host:9092", redis="redis://host", secret="x")


@pytest.mark.parametrize("options", [{"acks": 0}, {"request.required.acks": "0"}])
def test_options_with_which_kafka_would_tell_nothing_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="acks=0"):
        configuration.load(kafka="host:9092", redis="redis://host", secret="x", kafka_options=options)

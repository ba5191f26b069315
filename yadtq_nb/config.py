"""Settings: arguments, then environment, then yadtq.toml. The only reader of os.environ.

    YADTQ_KAFKA    host:port of a Kafka bootstrap server, or several with commas
    YADTQ_REDIS    redis://host:6379/0, or rediss:// for TLS
    YADTQ_SECRET   what chunks and results are signed with; the same everywhere
    YADTQ_KAFKA_OPTIONS, YADTQ_REDIS_OPTIONS
                   settings for librdkafka and redis-py, such as passwords and certificates, as JSON objects
    YADTQ_BROKER   another Kafka-compatible broker binary for the local stack
    YADTQ_IDLE     seconds without work after which the local stack stops by itself; 0 for never
    YADTQ_HOME     where the local stack keeps its state, instead of the user's state directory

    YADTQ_CONFIG   a file with all settings, and
    YADTQ_ACTIVE   a file to touch while there is work: set by the local stack for its nodes and what they start

yadtq.toml, in the working directory, one of its parents, or the user's configuration directory:

    kafka = "broker:9092"
    redis = "redis://store:6379/0"
    secret = "..."
    partitions = 16
    [kafka_options]                # passed to librdkafka as they are
    "security.protocol" = "SASL_SSL"
    [redis_options]                # passed to redis-py as they are
    ssl_ca_certs = "/etc/ssl/ca.pem"

Options are put together one by one: the file may name the certificates, and the environment the password.
"""

from __future__ import annotations

import json
import os
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Literal

import msgspec
import platformdirs

from yadtq_nb.errors import ConfigError

#: How a feeder waits for records. "wake": assigned only when rung for, for a broker that does not wake a waiting fetch
#: (Tansu); "poll": long poll, for Apache Kafka.
Reading = Literal["wake", "poll"]

_FILE: Final = "yadtq.toml"
#: Keys of the file that are about the local stack only.
_LOCAL_KEYS: Final = ("broker", "idle")
_IDLE: Final = 30 * 60.0
_LEAST_MEMORY: Final = 64 * 1024 * 1024
_SECRET_HELP: Final = (
    "set YADTQ_SECRET (or secret=) to the same value in the notebook and on every worker; "
    "make one with: python -c 'import secrets; print(secrets.token_hex(32))'"
)


class Config(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where a queue's servers are, and how they are used. Times are in seconds."""

    #: Bootstrap servers, host:port with commas between.
    kafka: str
    #: URL of the Redis or Valkey server.
    redis: str
    #: What pickles are signed with.
    secret: str
    #: Settings for librdkafka, passed as they are.
    kafka_options: dict[str, str | int | bool] = {}
    #: Settings for redis-py, passed as they are.
    redis_options: dict[str, Any] = {}
    reading: Reading = "poll"
    #: Partitions of a tasks topic that is made here.
    partitions: int = 16
    #: Replicas of a topic that is made here; None leaves it to the broker.
    replication: int | None = None
    #: How often a node tells that it lives.
    heartbeat: float = 1.0
    #: How long a lease holds without a heartbeat.
    lease: float = 2.5
    #: How long a job must stand still, with everything fed, before the rest of it is called lost.
    doubt: float = 10.0
    #: Chunks that may lie ready in the workbench before feeders stop reading; None for no limit.
    watermark_chunks: int | None = 1_000
    #: Bytes that may lie ready in the workbench before feeders stop reading; None for no limit.
    watermark_bytes: int | None = 64 * 1024 * 1024
    #: A task that has killed its slot or its node this often is not tried again.
    max_crashes: int = 2
    #: How long a finished job stays.
    keep: float = 7 * 86_400.0

    def __post_init__(self) -> None:
        if not self.secret:
            raise ConfigError(f"this queue has no secret: {_SECRET_HELP}")
        if self.partitions < 1:
            raise ConfigError(f"partitions must be at least 1, not {self.partitions}")
        if self.lease <= self.heartbeat:
            raise ConfigError(
                f"a lease of {self.lease} s would lapse between heartbeats of {self.heartbeat} s: "
                "make it 2.5 times as long"
            )
        if any(str(self.kafka_options.get(name)) == "0" for name in ("acks", "request.required.acks")):
            raise ConfigError("acks=0 in kafka_options: Kafka would not tell what it has, and tasks could be lost")

    @property
    def key(self) -> bytes:
        """The secret as bytes."""
        return self.secret.encode()


def load(
    *,
    kafka: str | None = None,
    redis: str | None = None,
    secret: str | None = None,
    kafka_options: Mapping[str, Any] | None = None,
    redis_options: Mapping[str, Any] | None = None,
) -> Config | None:
    """Return the settings of the team's cluster, or None when none is configured: then the local stack serves.

    Raises:
        ConfigError: only one of Kafka and Redis is given, there is no secret, or the file or an option is wrong.
    """
    handed_down = os.environ.get("YADTQ_CONFIG")
    if handed_down and not (kafka or redis):
        return read(Path(handed_down))
    file, settings = _read_file()
    for name in _LOCAL_KEYS:
        settings.pop(name, None)
    for name in ("kafka_options", "redis_options"):
        _table(file, settings, name)
    # A misspelt one must not mean the local stack.
    for name in sorted(settings.keys() - set(Config.__struct_fields__)):
        known = ", ".join(sorted({*Config.__struct_fields__, *_LOCAL_KEYS}))
        raise ConfigError(f"{file}: {name!r} is no setting; there are {known}")
    try:
        # The file by itself, whatever arguments say.
        msgspec.convert({"kafka": "-", "redis": "-", "secret": "-", **settings}, Config)
    except (msgspec.ValidationError, ConfigError) as exc:
        raise ConfigError(f"{file or 'settings'}: {exc}") from exc
    given = {"kafka": kafka, "redis": redis, "secret": secret}
    for name, argument in given.items():
        value = argument or os.environ.get(f"YADTQ_{name.upper()}") or settings.get(name)
        if value:
            settings[name] = value
    for name, options in (("kafka_options", kafka_options), ("redis_options", redis_options)):
        settings[name] = {**_table(file, settings, name), **_options_of_environment(name), **(options or {})}
    if not settings.get("kafka") and not settings.get("redis"):
        return None
    for name in ("kafka", "redis"):
        if not settings.get(name):
            raise ConfigError(
                f"{name} is not set, but the other of the two is: give Queue({name}=...), YADTQ_{name.upper()} "
                f"or {name} in {_FILE}"
            )
    if not settings.get("secret"):
        raise ConfigError(f"no secret is set: {_SECRET_HELP}")
    try:
        return msgspec.convert(settings, Config)
    except msgspec.ValidationError as exc:
        raise ConfigError(f"{file or 'settings'}: {exc}") from exc


def read(path: Path) -> Config:
    """Return the settings that a local stack wrote to a file.

    Raises:
        ConfigError: the file is missing or wrong.
    """
    try:
        return msgspec.json.decode(path.read_bytes(), type=Config)
    except (OSError, msgspec.MsgspecError) as exc:
        raise ConfigError(f"{path}, which YADTQ_CONFIG or the local stack names, cannot be read: {exc}") from exc


def parse_size(text: str) -> int:
    """Return a number of bytes, from such as "2G", "512 MiB" or "1500000"; K, M, G and T are powers of 1024.

    Raises:
        ConfigError: it is none.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:([KMGT])I?)?B?\s*", text.upper())
    size = int(float(found[1]) * 1024 ** (" KMGT".index(found[2] or " "))) if found else 0
    if size < 1:
        raise ConfigError(f"{text!r} is no size: give bytes, or a number with K, M, G or T, such as 2G or 512M")
    return size


def parse_memory_limit(value: str | int | None) -> int | None:
    """Return the bytes that a slot may use; None for no limit.

    Raises:
        ConfigError: it is no size, or less than a slot needs by itself.
    """
    if value is None:
        return None
    size = parse_size(str(value))
    if size < _LEAST_MEMORY:
        raise ConfigError(f"a memory limit of {value} is less than a slot needs by itself: give it 64M at least")
    return size


def worker_environment() -> dict[str, str]:
    """Return the environment for a stack's processes: this one, without what belongs to a notebook kernel."""
    dropped = ("YADTQ_", "JPY_", "IPY_", "MPLBACKEND", "PYDEVD_", "PYTHONSTARTUP")
    return {name: value for name, value in os.environ.items() if not name.startswith(dropped)}


def python_path() -> str:
    """Return PYTHONPATH as it is set, or nothing."""
    return os.environ.get("PYTHONPATH", "")


def activity_file() -> Path | None:
    """Return the file that a node touches while it has work, or None outside of a local stack."""
    path = os.environ.get("YADTQ_ACTIVE")
    return Path(path) if path else None


def idle_limit() -> float | None:
    """Return the seconds without work after which the local stack stops by itself, None for never.

    Raises:
        ConfigError: the setting is not a number.
    """
    value = os.environ.get("YADTQ_IDLE") or _read_file()[1].get("idle", _IDLE)
    try:
        idle = float(value)
        if not idle >= 0:  # nor NaN
            raise ValueError
        return idle or None
    except (TypeError, ValueError) as exc:
        raise ConfigError(f"YADTQ_IDLE, or idle in {_FILE}, is {value!r}: give seconds, or 0 for never") from exc


def broker_binary() -> str | None:
    """Return the broker binary that a setting names for the local stack, or None for the bundled one."""
    return os.environ.get("YADTQ_BROKER") or _read_file()[1].get("broker") or None


def state_directory() -> Path:
    """Return where the local stack keeps its state and logs, not made yet."""
    home = os.environ.get("YADTQ_HOME")
    return Path(home) if home else platformdirs.user_state_path("yadtq-nb", appauthor=False)


def _table(file: Path | None, settings: Mapping[str, Any], name: str) -> dict[str, Any]:
    table = settings.get(name, {})
    if not isinstance(table, dict):
        raise ConfigError(f"{file}: {name} must be a table: [{name}]")
    return table


def _options_of_environment(name: str) -> dict[str, Any]:
    variable = f"YADTQ_{name.upper()}"
    text = os.environ.get(variable)
    if not text:
        return {}
    # What it holds is not shown: it may be a password.
    wanted = f'{variable} must be a JSON object, such as {{"name": "value"}}'
    try:
        options = json.loads(text)
    except ValueError:
        raise ConfigError(wanted) from None
    if not isinstance(options, dict):
        raise ConfigError(wanted)
    return options


def _read_file() -> tuple[Path | None, dict[str, Any]]:
    here = Path.cwd()
    places = [here, *here.parents, platformdirs.user_config_path("yadtq-nb", appauthor=False)]
    for place in places:
        path = place / _FILE
        if path.is_file():
            try:
                return path, tomllib.loads(path.read_text(encoding="utf-8"))
            except (tomllib.TOMLDecodeError, UnicodeDecodeError) as exc:
                raise ConfigError(f"{path} is not valid TOML: {exc}") from exc
    return None, {}

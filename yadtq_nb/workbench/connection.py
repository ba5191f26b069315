"""One connection to Redis: its errors become ours at this door, and each verb is one Lua script."""

from __future__ import annotations

import contextlib
import logging
import os
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from functools import cache
from importlib.resources import files
from typing import Any, Final, TypeVar

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from yadtq_nb.config import Config
from yadtq_nb.errors import WorkbenchError, WorkbenchFullError, WorkbenchRefusedError
from yadtq_nb.model import Lane

VERBS: Final = (
    *("feed", "take", "finish", "release", "retry", "mark", "beat", "reap", "init", "restore"),
    *("create", "seal", "cancel", "drop", "reopen", "reopened", "withdraw", "keep", "delete", "late"),
)

_T = TypeVar("_T")

log = logging.getLogger(__name__)

_OPTIONS: Final = "redis_options (YADTQ_REDIS_OPTIONS, or [redis_options] in yadtq.toml)"
#: Seconds between tries while Redis is away, or reads its file after a start.
_PAUSE: Final = 0.02
#: Seconds that a call may take before the server counts as gone.
_TIMEOUT: Final = 10.0
#: Bytes that a value may have in any server, and in one whose setting is not known.
ALWAYS_FITS: Final = 1024 * 1024
_LARGEST: Final = 512 * 1024 * 1024


@contextlib.contextmanager
def translate_redis_errors() -> Iterator[None]:
    """Raise ours, from theirs."""
    try:
        yield
    except redis.AuthenticationError as exc:
        raise WorkbenchRefusedError(
            f"Redis refused the password or user in its URL: {exc}; check YADTQ_REDIS (or redis=)"
        ) from exc
    except redis.OutOfMemoryError as exc:
        raise WorkbenchFullError(
            "Redis is full (maxmemory): delete old jobs or raise maxmemory; tasks in hand go on"
        ) from exc
    except redis.ResponseError as exc:
        raise WorkbenchError(f"Redis refused a command: {exc}") from exc
    except redis.BusyLoadingError as exc:
        raise WorkbenchError(
            f"Redis has been started, and is still reading its file ({exc}): try again in a moment"
        ) from exc
    except (redis.ConnectionError, redis.TimeoutError) as exc:
        if isinstance(exc.__context__, ssl.SSLCertVerificationError | FileNotFoundError):
            raise WorkbenchRefusedError(
                f"Redis's certificate cannot be trusted: {exc}; check ssl_ca_certs in {_OPTIONS}: "
                "a file that names the authority that signed it"
            ) from exc
        raise WorkbenchError(
            f"Redis cannot be reached: {exc}; check YADTQ_REDIS (or redis=; rediss:// for TLS) and the server"
        ) from exc
    except (redis.RedisError, ValueError) as exc:
        raise WorkbenchError(f"Redis cannot be used: {exc}") from exc


def patiently(call: Callable[[], _T], seconds: float) -> _T:
    """Return what a call returns that may be made twice; while Redis is away, try again for so many seconds.

    Raises:
        WorkbenchFullError, WorkbenchRefusedError: it is full, or refuses this client: waiting does not help.
        WorkbenchError: it was away for too long.
    """
    deadline = time.monotonic() + seconds
    while True:
        try:
            return call()
        except (WorkbenchFullError, WorkbenchRefusedError):
            raise
        except WorkbenchError as exc:
            if time.monotonic() > deadline:
                raise
            log.warning("waiting: %s", exc)
            time.sleep(_PAUSE)


class Connection:
    """A client of one queue's keys, for one thread at a time; a call from a second thread waits for the first."""

    def __init__(self, config: Config, queue: str, *, timeout: float = _TIMEOUT) -> None:
        self.prefix = f"{{yadtq:{queue}}}"
        self._lock = threading.Lock()
        with translate_redis_errors():
            # No retries in the library: whoever calls knows what may be sent twice.
            ours = {
                "protocol": 2,
                "socket_timeout": timeout,
                "socket_connect_timeout": 5.0,
                "socket_keepalive": True,
                "retry": Retry(NoBackoff(), 0),
                "max_connections": 4,
            }
            self.client: Any = redis.Redis.from_url(config.redis, **{**ours, **config.redis_options})
        _check_options(self.client.connection_pool)
        #: What verbs are sent on, and of which process.
        self._held: Any = None
        self._holder = 0
        self._scripts = {verb: self.client.register_script(_source(verb)) for verb in VERBS}

    def lane_key(self, name: str, lane: Lane) -> str:
        """Name of a key that each lane has."""
        return self.key(name) if lane == "normal" else self.key(name, lane)

    def key(self, *parts: str) -> str:
        """Name of a key of this queue."""
        return ":".join((self.prefix, *parts))

    def call(self, verb: str, *args: Any) -> Any:
        """Run one verb.

        Raises:
            WorkbenchError: Redis cannot be reached or refused.
        """
        script = self._scripts[verb]
        with translate_redis_errors(), self._lock:
            try:
                return self._send("EVALSHA", script.sha, 1, self.prefix, *args)
            except redis.exceptions.NoScriptError:
                self._send("SCRIPT", "LOAD", script.script)
                return self._send("EVALSHA", script.sha, 1, self.prefix, *args)

    def send(self, *command: Any) -> Any:
        """Return the bare answer to a plain command that is sent for every task; see use for all others.

        Raises:
            WorkbenchError: Redis cannot be reached or refused.
        """
        with translate_redis_errors(), self._lock:
            return self._send(*command)

    @contextlib.contextmanager
    def use(self) -> Iterator[Any]:
        """Lend the library's client for plain commands, its errors translated."""
        with translate_redis_errors(), self._lock:
            self._give_back()
            yield self.client

    def _send(self, *command: Any) -> Any:
        """Send a command past the library's pool, which counts and keeps records each time: a tenth of a task's way."""
        if self._held is None or self._holder != os.getpid():
            self._give_back()
            self._held, self._holder = self.client.connection_pool.get_connection(), os.getpid()
        elif _is_stale(self._held):
            self._held.disconnect()  # it connects again as it sends
        # Put back once the answer is read: one that comes after Ctrl-C would be taken for that to the next command.
        held, self._held = self._held, None
        try:
            held.send_command(*command)
            answer = held.read_response()
        except redis.ResponseError:
            self._held = held
            raise
        except BaseException:
            held.disconnect()
            self.client.connection_pool.release(held)
            raise
        self._held = held
        return answer

    def _give_back(self) -> None:
        held, self._held = self._held, None
        if held is not None:
            self.client.connection_pool.release(held)

    def largest(self) -> int:
        """Return how many bytes one value may have: more would break the connection, again and again."""
        try:
            with self.use() as client:
                return int(client.config_get("proto-max-bulk-len")["proto-max-bulk-len"])
        except (WorkbenchError, KeyError):  # a service that does not let one ask
            return _LARGEST

    def run_id(self) -> str:
        """Name of the server's present life: another one after a restart."""
        with self.use() as client:
            return str(client.info("server")["run_id"])

    def close(self) -> None:
        """Close the sockets."""
        with contextlib.suppress(redis.RedisError):
            self.client.close()


def _is_stale(connection: Any) -> bool:
    """Tell whether the server has closed a connection, or an answer that nobody waits for lies there."""
    try:
        return bool(connection.can_read())
    except (redis.RedisError, OSError):
        return True


def _check_options(pool: Any) -> None:
    """Find an option that the library does not have before it is in the way of the first command.

    Raises:
        WorkbenchError: there is one.
    """
    try:
        pool.connection_class(**pool.connection_kwargs)
    except TypeError as exc:
        raise WorkbenchError(f"Redis cannot be used: {exc}; check {_OPTIONS}") from exc


@cache
def _source(verb: str) -> str:
    """Return a verb's script with the common part between its first line, which Redis wants first, and the rest."""
    folder = files("yadtq_nb.workbench") / "lua"
    shebang, _, body = (folder / f"{verb}.lua").read_text(encoding="utf-8").partition("\n")
    return f"{shebang}\n{(folder / 'common.lua').read_text(encoding='utf-8')}\n{body}"

"""The connection to Redis: after Ctrl-C, a fork, a socket that was closed, in a server that has forgotten scripts."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import stacks

from yadtq_nb.errors import WorkbenchError
from yadtq_nb.workbench.connection import Connection

pytestmark = pytest.mark.one_stack


@pytest.fixture
def redis(stack: stacks.Servers, queue_name: str) -> Iterator[Connection]:
    """A connection that has been used."""
    found = Connection(stack.config, queue_name)
    assert found.send("PING") == b"PONG"
    yield found
    found.close()


def test_interrupted_command_leaves_no_answer_for_the_next(redis: Connection) -> None:
    for _ in range(5):
        threading.Timer(0.1, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            redis.send("BLPOP", redis.key("never"), 0.2)
        assert redis.send("ECHO", "next") == b"next"


def test_command_that_takes_too_long_leaves_no_answer_for_the_next(stack: stacks.Servers, queue_name: str) -> None:
    redis = Connection(stack.config, queue_name, timeout=0.2)
    with pytest.raises(WorkbenchError):
        redis.send("BLPOP", redis.key("never"), 0.4)
    time.sleep(0.4)
    assert redis.send("ECHO", "next") == b"next"
    redis.close()


def test_child_that_was_forked_has_a_socket_of_its_own(redis: Connection) -> None:
    mine = redis.send("CLIENT", "ID")
    reading, writing = os.pipe()
    if (child := os.fork()) == 0:
        os.write(writing, b"%d" % redis.send("CLIENT", "ID"))
        os._exit(0)
    os.waitpid(child, 0)
    assert int(os.read(reading, 100)) != mine == redis.send("CLIENT", "ID")
    os.close(reading)
    os.close(writing)


def test_socket_that_was_closed_while_nobody_used_it_costs_nothing(stack: stacks.Servers, redis: Connection) -> None:
    # Not one command: where connections are cut again and again, each would find its socket closed.
    for _ in range(20):
        _kill(stack, redis)
        assert redis.send("ECHO", "again") == b"again"


def test_verb_is_loaded_again_into_a_server_that_has_forgotten_it(redis: Connection) -> None:
    arguments: tuple[Any, ...] = ("no such job", 60)
    first = redis.call("keep", *arguments)
    redis.send("SCRIPT", "FLUSH")
    assert redis.call("keep", *arguments) == first


def test_refused_command_keeps_its_socket(redis: Connection) -> None:
    mine = redis.send("CLIENT", "ID")
    with pytest.raises(WorkbenchError, match="refused a command"):
        redis.send("NOSUCHCOMMAND")
    assert redis.send("CLIENT", "ID") == mine


def test_plain_and_quick_commands_share_a_socket(redis: Connection) -> None:
    mine = redis.send("CLIENT", "ID")
    with redis.use() as client:
        assert client.client_id() == mine
    assert redis.send("CLIENT", "ID") == mine


def _kill(stack: stacks.Servers, redis: Connection) -> None:
    other = Connection(stack.config, "other")
    other.send("CLIENT", "KILL", "ID", redis.send("CLIENT", "ID"))
    other.close()

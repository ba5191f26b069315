"""Errors: a task's own, those of its slot, other secrets, and servers that are not there."""

from __future__ import annotations

import sys
import time
import traceback
from typing import Any

import msgspec
import pytest
import redis
from confluent_kafka import Consumer, TopicPartition
from conftest import MakeCluster, RunScript

from yadtq_nb import (
    BacklogError,
    JobError,
    LocalCluster,
    Queue,
    RemoteTraceback,
    SignatureError,
    TaskCrashedError,
    TaskError,
    WorkbenchError,
    YadtqError,
)
from yadtq_nb.local import servers

pytestmark = pytest.mark.one_stack

# Functions of the tests travel by value, as those of a notebook do.
__import__("cloudpickle").register_pickle_by_value(sys.modules[__name__])

#: Seconds after which something hangs.
LIMIT = 30


class KeywordOnlyError(Exception):
    """Pickles, but does not unpickle."""

    def __init__(self, *, code: int) -> None:
        super().__init__(f"code {code}")


class LockedError(Exception):
    """Does not pickle."""

    def __init__(self, message: str) -> None:
        import threading

        super().__init__(message)
        self.lock = threading.Lock()


def divide(x: int) -> float:
    return 1 / x  # the line that the traceback names


# A task's own.


def test_error_comes_back_as_its_own_type_with_the_remote_traceback_as_cause(queue: Queue) -> None:
    for error in (
        queue.submit(divide, 0).exception(LIMIT),
        queue.map(divide, [1, 0]).results(LIMIT, errors="return")[1],
    ):
        assert type(error) is ZeroDivisionError
        assert isinstance(error.__cause__, RemoteTraceback)
        shown = "".join(traceback.format_exception(error))
        assert "1 / x  # the line that the traceback names" in shown
        assert "test_errors.py" in shown
        assert "yadtq_nb/worker" not in shown, "the frames of the worker tell the user nothing"


def test_error_with_a_cause_shows_it(queue: Queue) -> None:
    def reads(path: str) -> None:
        try:
            divide(0)
        except ZeroDivisionError as exc:
            raise RuntimeError(f"cannot use {path}") from exc

    with pytest.raises(RuntimeError, match="cannot use this") as caught:
        queue.map(reads, ["this"]).results(LIMIT)
    assert "ZeroDivisionError" in str(caught.value.__cause__)


@pytest.mark.parametrize(
    ("make", "type_name", "words"),
    [
        (lambda: KeywordOnlyError(code=7), "KeywordOnlyError", "code 7"),
        (lambda: LockedError("held"), "LockedError", "held"),
    ],
    ids=["does not unpickle", "does not pickle"],
)
def test_error_that_cannot_travel_comes_as_a_task_error(queue: Queue, make: Any, type_name: str, words: str) -> None:
    def fail(_: int) -> None:
        raise make()

    (error,) = queue.map(fail, [1]).results(LIMIT, errors="return")
    assert type(error) is TaskError
    assert error.index == 0
    assert error.type_name.endswith(type_name)
    assert type_name in str(error)
    assert words in str(error)
    assert "raise make()" in error.remote_traceback
    assert "raise make()" in "".join(traceback.format_exception(error))


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt(), GeneratorExit()], ids=repr)
def test_task_that_exits_fails_and_does_not_end_the_notebook(queue: Queue, error: BaseException) -> None:
    def leave(x: int) -> int:
        if x == 1:
            raise error
        return x

    found = queue.map(leave, range(3)).results(LIMIT, errors="return")
    assert (found[0], found[2]) == (0, 2)
    assert type(found[1]) is TaskError
    assert found[1].type_name == type(error).__name__
    assert str(found[1]) == f"{type(error).__name__}: {error}".removesuffix(": ")
    assert type(queue.submit(sys.exit, "bye").exception(LIMIT)) is TaskError


@pytest.mark.parametrize(
    "error", [StopIteration(5), StopAsyncIteration(), TimeoutError("t"), AssertionError()], ids=repr
)
def test_errors_with_a_meaning_of_their_own_come_back_as_errors(queue: Queue, error: Exception) -> None:
    def fail(_: int) -> None:
        raise error

    job = queue.map(fail, [1])
    assert type(job[0].exception(LIMIT)) is type(error)
    with pytest.raises(type(error)):
        job.results(LIMIT)


def test_error_raised_by_an_await_of_a_job_is_the_tasks_own(queue: Queue) -> None:
    import asyncio

    async def main() -> Any:
        return await queue.map(divide, [0])

    with pytest.raises(ZeroDivisionError) as caught:
        asyncio.run(main())
    assert isinstance(caught.value.__cause__, RemoteTraceback)


def test_endless_recursion_fails_its_task(queue: Queue) -> None:
    def dig(n: int) -> int:
        return dig(n + 1)

    job = queue.map(lambda n: dig(n) if n == 1 else n, range(3))
    assert isinstance(job[1].exception(LIMIT), RecursionError)
    assert job.results(LIMIT, errors="skip") == [0, 2]


def test_error_of_many_tasks_is_each_ones_own(queue: Queue) -> None:
    def fail(x: int) -> None:
        raise ValueError(x)

    found = queue.map(fail, range(2000)).results(LIMIT, errors="return")
    assert [error.args for error in found] == [(x,) for x in range(2000)]


def test_huge_message_is_cut_and_arrives(queue: Queue) -> None:
    def fail(_: int) -> None:
        raise LockedError("x" * 10_000_000)

    error = queue.submit(fail, 1).exception(LIMIT)
    assert isinstance(error, TaskError)
    assert len(str(error)) < 200_000


def test_task_that_kills_its_slot_twice_fails_and_its_mates_come(queue: Queue) -> None:
    import os

    def crash(x: int) -> int:
        if x == 3:
            os._exit(1)
        return x

    job = queue.map(crash, range(10))
    error = job[3].exception(LIMIT)
    assert isinstance(error, TaskCrashedError)
    assert error.index == 3
    assert job.results(LIMIT, errors="skip") == [x for x in range(10) if x != 3]


def test_function_that_cannot_be_imported_on_the_worker_fails_its_tasks(run_script: RunScript) -> None:
    output = run_script(
        """
        import types
        lost = types.ModuleType("lost_module")
        exec("def f(x):\\n    return x", lost.__dict__)
        sys.modules["lost_module"] = lost
        job = queue.map(lost.f, [1, 2])
        errors = job.results(30, errors="return")
        print([type(e).__name__ for e in errors], "lost_module" in str(errors[0]))
        """
    )
    assert output == ["['ModuleNotFoundError', 'ModuleNotFoundError'] True"]


# Other secrets.


def test_client_with_another_secret_is_told_so_at_once(queue: Queue) -> None:
    queue.map(divide, [1], name="of the right secret").results(LIMIT)
    wrong = Queue(queue.name, config=msgspec.structs.replace(queue._settings(), secret="another secret"))
    for use in (lambda: wrong.map(divide, [1]), lambda: wrong.job("of the right secret")):
        with pytest.raises(SignatureError, match="YADTQ_SECRET"):
            use()


def forget_secret(queue: Queue) -> None:
    """As after a change of the secret, by someone who knows what lies in the queue."""
    client = redis.Redis.from_url(queue._settings().redis)
    client.delete(f"{{yadtq:{queue.name}}}:secret")
    client.close()


def test_worker_refuses_what_another_secret_signed_and_never_unpickles_it(
    make_cluster: MakeCluster, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("yadtq_nb.client.link._SAFE", 0.5)  # nobody feeds what is sent
    cluster = make_cluster(1)
    cluster.workers[0].stop()
    mark = tmp_path / "unpickled"

    class Trap:
        def __reduce__(self) -> Any:
            return open, (str(mark), "w")

    queue = cluster.queue()
    forget_secret(queue)
    with Queue(queue.name, config=msgspec.structs.replace(cluster.config, secret="another")) as wrong:
        job = wrong.map(divide, [Trap()], name="trapped")
        assert not job.wait(0.5)
    forget_secret(queue)
    cluster.workers[0].start()
    assert queue.map(divide, [1]).results(LIMIT) == [1.0]
    assert not mark.exists()
    assert "not signed with this queue's secret" in cluster.log("node-1") + _events(queue)
    assert "YADTQ_SECRET" in cluster.log("node-1") + _events(queue)


def test_client_with_another_secret_cannot_read_results(make_cluster: MakeCluster) -> None:
    cluster = make_cluster(1)
    assert cluster.queue().map(divide, [1], name="secret").results(LIMIT) == [1.0]
    cluster.workers[0].stop()
    forget_secret(cluster.queue())
    with Queue(cluster.queue().name, config=msgspec.structs.replace(cluster.config, secret="another")) as wrong:
        job = wrong.job("secret")
        for ask in (
            job.results,
            lambda: job.results(errors="skip"),
            lambda: job.results(errors="return"),
            lambda: job[0].result(LIMIT),
            lambda: list(job.as_completed()),
            job.to_frame,
        ):
            with pytest.raises(JobError, match="YADTQ_SECRET") as caught:
                ask()
            assert isinstance(caught.value.__cause__, SignatureError)


def _events(queue: Queue) -> str:
    """Return the flight recorder."""
    consumer = Consumer({"bootstrap.servers": queue._settings().kafka, "group.id": "test", "fetch.wait.max.ms": 10})
    lines = []
    try:
        place = TopicPartition(f"yadtq.{queue.name}.events", 0, 0)
        _, end = consumer.get_watermark_offsets(place, timeout=10)
        consumer.assign([place])
        while len(lines) < end:
            message = consumer.poll(10)
            assert message is not None
            lines.append((message.value() or b"").decode())
    finally:
        consumer.close()
    return "\n".join(lines)


# Servers that are not there.


def nowhere() -> str:
    return f"127.0.0.1:{servers.free_port()}"


def test_redis_that_is_not_there_is_named_with_its_setting(
    shared_cluster: LocalCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("yadtq_nb.client.link.PATIENCE", 1.0)
    queue = Queue("q", config=msgspec.structs.replace(shared_cluster.config, redis=f"redis://{nowhere()}/0"))
    began = time.monotonic()
    for use in (lambda: queue.map(divide, [1]), lambda: queue.submit(divide, 1), queue.jobs, lambda: queue.job("j")):
        with pytest.raises(WorkbenchError, match="YADTQ_REDIS") as caught:
            use()
        assert isinstance(caught.value, ConnectionError)
    assert time.monotonic() - began < LIMIT


def test_redis_that_refuses_the_password_says_so(shared_cluster: LocalCluster) -> None:
    redis = shared_cluster.config.redis.replace(":password@", ":wrong@")
    queue = Queue("q", config=msgspec.structs.replace(shared_cluster.config, redis=redis))
    with pytest.raises(WorkbenchError, match="password"):
        queue.jobs()


def test_kafka_that_is_not_there_is_named_with_its_setting(
    shared_cluster: LocalCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("yadtq_nb.backlog.connection.TIMEOUT", 2.0)
    queue = Queue("q", config=msgspec.structs.replace(shared_cluster.config, kafka=nowhere()))
    began = time.monotonic()
    with pytest.raises(BacklogError, match="YADTQ_KAFKA") as caught:
        queue.map(divide, [1])
    assert isinstance(caught.value, YadtqError)
    assert isinstance(caught.value, ConnectionError)
    assert time.monotonic() - began < LIMIT


@pytest.mark.parametrize("redis", ["nonsense", "http://host/0", "redis://host:port/0"])
def test_redis_url_that_is_none_is_refused(shared_cluster: LocalCluster, redis: str) -> None:
    queue = Queue("q", config=msgspec.structs.replace(shared_cluster.config, redis=redis))
    with pytest.raises(WorkbenchError, match="Redis"):
        queue.map(divide, [1])

"""Tasks run as they would in the cell: functions, classes and modules of a notebook, its directory, its queue."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import MakeCluster, RunScript

from yadtq_nb import Queue

# Functions of the tests travel by value, as those of a notebook do.
__import__("cloudpickle").register_pickle_by_value(sys.modules[__name__])

#: Seconds after which something hangs.
LIMIT = 30


def test_closures_lambdas_and_methods_are_called(queue: Queue) -> None:
    offset = {"by": 10}

    def add(x: int) -> int:
        return recurse(x) + offset["by"]

    def recurse(x: int) -> int:
        return 0 if x == 0 else 1 + recurse(x - 1)

    class Scaler:
        def __init__(self, factor: int) -> None:
            self.factor = factor

        def scale(self, x: int) -> int:
            return x * self.factor

        def __call__(self, x: int) -> int:
            return self.scale(x) + 1

    for function, expected in [
        (add, [11, 12]),
        (lambda x: -x, [-1, -2]),
        (Scaler(3).scale, [3, 6]),
        (Scaler(3), [4, 7]),
        (str, ["1", "2"]),
        ("{}!".format, ["1!", "2!"]),
    ]:
        assert queue.map(function, [1, 2]).results(LIMIT) == expected  # type: ignore[arg-type]


def test_coroutine_functions_are_awaited(queue: Queue) -> None:
    import asyncio

    async def answer(x: int, *, plus: int = 0) -> int:
        await asyncio.sleep(0.01)
        return x + plus

    assert queue.map(answer, range(50), kwargs={"plus": 1}).results(LIMIT) == list(range(1, 51))
    assert queue.submit(answer, 3, plus=2).result(LIMIT) == 5


def test_functions_and_classes_of_a_script_come_back_as_the_same_classes(run_script: RunScript) -> None:
    output = run_script(
        """
        import enum
        from dataclasses import dataclass, replace

        class Color(enum.Enum):
            RED = 1

        @dataclass
        class Item:
            size: int
            color: Color = Color.RED

            def grown(self):
                return replace(self, size=self.size + GROWTH)

        class OwnError(Exception):
            def __init__(self, code, *, hint):
                super().__init__(code)
                self.hint = hint
            def __reduce__(self):
                return rebuild, (self.args[0], self.hint)

        def rebuild(code, hint):
            return OwnError(code, hint=hint)

        GROWTH = 5

        def grow(item):
            if item.size == 3:
                raise OwnError(7, hint="smaller")
            return item.grown()

        job = queue.map(grow, [Item(1), Item(2), Item(3)])
        one, two, error = job.results(30, errors="return")
        print(type(one) is Item, one == Item(6), one.color is Color.RED, type(error) is OwnError, error.hint)
        GROWTH = 6
        print(queue.map(grow, [Item(1)]).results(30) == [Item(7)])
        """
    )
    assert output == ["True True True True smaller", "True"]


def test_assignment_to_a_class_or_global_of_a_script_is_seen_by_the_next_job(run_script: RunScript) -> None:
    output = run_script(
        """
        class Model:
            threshold = 1
            def passes(self, x):
                return x >= self.threshold + OFFSET

        OFFSET = 0

        def count(x):
            return Model().passes(x)

        found = []
        for Model.threshold, OFFSET in [(1, 0), (2, 0), (1, 0), (1, 1), (1, 0)]:
            found.append(sum(queue.map(count, range(4), chunksize=1).results(30)))
            model = queue.submit(Model).result(30)
            assert type(model) is Model and Model.threshold in (1, 2)
        print(found)
        """
    )
    assert output == ["[3, 2, 3, 2, 3]"]


def test_modules_beside_a_script_travel_and_edits_are_seen(run_script: RunScript, tmp_path: Path) -> None:
    (tmp_path / "ping.py").write_text(
        "import pong\nLIMIT = 1\ndef ping(n):\n    return ['ping'] + (pong.pong(n - 1) if n else [])\n"
    )
    (tmp_path / "pong.py").write_text(
        "import ping\ndef pong(n):\n    return ['pong'] + (ping.ping(n - 1) if n else [])\n"
    )
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "__init__.py").write_text("from inner.deep import VALUE\n")
    (tmp_path / "inner" / "deep.py").write_text("VALUE = 1\n")
    output = run_script(
        """
        import importlib, pathlib
        import ping

        def inside(x):
            import inner
            return inner.VALUE + x

        print(queue.map(ping.ping, [2]).results(30), queue.map(inside, [1]).results(30))
        for edit in (2, 3):
            pathlib.Path("inner/deep.py").write_text(f"VALUE = {edit}\\n")
            pathlib.Path("pong.py").write_text(f"def pong(n):\\n    return ['pang{edit}']\\n")
            importlib.reload(ping.pong)
            print(queue.map(ping.ping, [2]).results(30), queue.map(inside, [1]).results(30))
        """
    )
    assert output == [
        "[['ping', 'pong', 'ping']] [2]",
        "[['ping', 'pang2']] [3]",
        "[['ping', 'pang3']] [4]",
    ]


def test_class_of_a_local_module_comes_back_as_itself(run_script: RunScript, tmp_path: Path) -> None:
    (tmp_path / "shapes.py").write_text("class Shape:\n    def __init__(self, n):\n        self.n = n\n")
    output = run_script(
        """
        import shapes
        (shape,) = queue.map(shapes.Shape, [4]).results(30)
        print(type(shape) is shapes.Shape, shape.n)
        """
    )
    assert output == ["True 4"]


def test_tasks_run_in_the_directory_of_their_sender(run_script: RunScript, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "input.txt").write_text("from the file")
    output = run_script(
        """
        import os
        print(queue.map(lambda path: open(path).read() and os.getcwd(), ["data/input.txt"]).results(30))
        os.chdir("data")
        print(queue.map(lambda path: open(path).read(), ["input.txt"]).results(30))
        """
    )
    assert output == [str([str(tmp_path)]), "['from the file']"]


def test_path_that_is_not_there_names_host_and_directory(queue: Queue) -> None:
    error = queue.submit(open, "not/there").exception(LIMIT)
    assert isinstance(error, FileNotFoundError)
    assert str(Path.cwd()) in "\n".join(error.__notes__)


def test_directory_that_a_task_changes_to_is_left_again(queue: Queue) -> None:
    import os

    assert queue.map(os.chdir, ["/"] * 20).results(LIMIT) == [None] * 20
    assert set(queue.map(lambda _: os.getcwd(), range(20)).results(LIMIT)) == {os.getcwd()}


def test_what_a_task_puts_on_the_path_hides_nothing_from_others(make_cluster: MakeCluster, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"

    def careless(_: int) -> None:
        sys.path.insert(0, str(elsewhere))

    def look(_: int) -> tuple[int, int]:
        return sys.path.index(str(elsewhere)), len(sys.path)

    queue = make_cluster(slots=1).queue()
    queue.submit(careless, 0).result(LIMIT)
    place, length = queue.submit(look, 0).result(LIMIT)
    assert place == length - 1, "it is still there, and comes last"


def test_what_a_task_prints_does_not_disturb(queue: Queue, capfd: pytest.CaptureFixture[str]) -> None:
    def loud(x: int) -> int:
        for stream in (sys.stdout, sys.stderr):
            stream.write("x" * 100_000 + "\n")
        return x

    assert queue.map(loud, range(10)).results(LIMIT) == list(range(10))
    assert "x" * 100 not in "".join(capfd.readouterr())


# The queue in other places.


def test_queue_can_be_used_inside_a_task(queue: Queue) -> None:
    def outer(x: int) -> Any:
        return queue.submit(lambda y: y + 1, x).result(LIMIT), len(queue.workers())

    assert queue.submit(outer, 1).result(LIMIT) == (2, 1)


def test_work_sent_by_a_task_that_has_ended_is_not_lost(queue: Queue) -> None:
    def outer(x: int) -> str:
        return queue.map(lambda y: y * y, range(x)).name

    name = queue.submit(outer, 2000).result(LIMIT)
    assert queue.job(name).results(LIMIT) == [y * y for y in range(2000)]


def test_task_is_not_done_before_what_it_sends_is_sent(queue: Queue) -> None:
    class Slow:
        def __init__(self, value: int) -> None:
            self.value = value

        def __reduce__(self) -> Any:
            time.sleep(1.0)  # the slot's node hears meanwhile which chunks are closed
            return Slow, (self.value,)

    def outer(x: int) -> str:
        return queue.map(lambda slow: slow.value, [Slow(n) for n in range(x)], chunksize=1).name

    name = queue.submit(outer, 4).result(LIMIT)
    assert queue.job(name).results(LIMIT) == list(range(4))


def test_queue_can_be_used_in_a_forked_process(run_script: RunScript) -> None:
    output = run_script(
        """
        import os, multiprocessing, warnings
        warnings.simplefilter("ignore")  # newer Pythons warn of any fork beside threads

        def square(x):
            return x * x

        def child(results):
            results.put(queue.map(square, range(5)).results(30))

        before = queue.map(square, range(3))
        print(before.results(30))
        context = multiprocessing.get_context("fork")
        results = context.Queue()
        process = context.Process(target=child, args=(results,))
        process.start()
        print(results.get(timeout=30))
        process.join(30)
        print(process.exitcode)
        sys.stdout.flush()
        pid = os.fork()
        if pid == 0:
            print(queue.submit(square, 9).result(30), flush=True)
            queue.map(square, range(1000), name="by the child")
            sys.exit(7)  # an orderly end, which must neither hang nor lose what was sent
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
        print(len(queue.job("by the child").results(30)), queue.map(square, [4]).results(30))
        """
    )
    assert output == ["[0, 1, 4]", "[0, 1, 4, 9, 16]", "0", "81", "7", "1000 [16]"]


def test_queue_can_be_used_by_many_threads(queue: Queue) -> None:
    from concurrent.futures import ThreadPoolExecutor

    def work(n: int) -> Any:
        return queue.map(lambda x: x + n, range(50)).results(LIMIT), queue.submit(abs, -n).result(LIMIT)

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(work, range(40)))
    assert found == [([x + n for x in range(50)], n) for n in range(40)]

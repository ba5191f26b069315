"""What a careless user does: it works, or the message says what was wrong."""

from __future__ import annotations

import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from conftest import RunScript

from yadtq_nb import ConfigError, LocalCluster, config

# Functions of the tests travel by value, as those of a notebook do.
__import__("cloudpickle").register_pickle_by_value(sys.modules[__name__])

#: Seconds after which something hangs.
LIMIT = 30


def test_cached_functions_and_properties_of_a_script_travel(run_script: RunScript) -> None:
    output = run_script(
        """
        import functools

        @functools.cache
        def fib(n):
            return n if n < 2 else fib(n - 1) + fib(n - 2)

        @functools.lru_cache(maxsize=3)
        def double(n):
            return 2 * n

        class Thing:
            @functools.cached_property
            def size(self):
                return 5

            def grown(self, x):
                return self.size + self.size + x

        print(queue.map(fib, [5, 60]).results(30))
        print(queue.map(double, [5, 6]).results(30))
        print(queue.map(lambda _: (double.cache_info().maxsize, double.__name__), [0]).results(30))
        print(queue.map(Thing().grown, [5, 6]).results(30))
        """
    )
    assert output == ["[5, 1548008755920]", "[10, 12]", "[(3, 'double')]", "[15, 16]"]


def test_functions_of_a_script_travel_from_a_process_that_it_spawned(run_script: RunScript) -> None:
    output = run_script(
        """
        import functools, multiprocessing

        class Item:
            def __init__(self, size):
                self.size = size

        @functools.cache
        def grow(item):
            return Item(item.size + 1)

        def child():
            found = queue.map(grow, [Item(1)]).results(30)[0]
            print(__name__, type(found) is Item, found.size, flush=True)

        if __name__ == "__main__":
            process = multiprocessing.get_context("spawn").Process(target=child)
            process.start()
            process.join()
        """
    )
    assert output == ["__mp_main__ True 2"]


def test_frame_of_a_job_with_a_broken_item_has_a_row_that_says_so(cluster: LocalCluster) -> None:
    queue = cluster.queue()
    frame = queue.starmap(divmod, [(7, 2), (threading.Lock(), 1)]).to_frame()
    assert frame.state.tolist() == ["succeeded", "failed"]
    assert frame.x[0] == 7
    assert frame.x.isna().tolist() == [False, True]
    frame = queue.starmap(abs, [1, 2]).to_frame()  # no arguments at all
    assert frame.state.tolist() == ["failed", "failed"]
    frame = queue.map(lambda row: row["a"], [{"a": 1, "b": 2}, {"a": threading.Lock()}]).to_frame()
    assert frame.input_a[0] == 1
    assert frame.state.tolist() == ["succeeded", "failed"]
    single = queue.submit(abs, threading.Lock())
    assert single.exception(LIMIT) is not None
    assert single.job.to_frame().state.tolist() == ["failed"]


def test_misspelt_setting_is_named_instead_of_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "yadtq.toml").write_text('kafka_server = "host:9092"\nredis_url = "redis://host"\n')
    monkeypatch.chdir(tmp_path)
    for name in ("YADTQ_CONFIG", "YADTQ_KAFKA", "YADTQ_REDIS"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigError, match=r"'kafka_server' is no setting; there are .*kafka, kafka_options"):
        config.load()
    (tmp_path / "yadtq.toml").write_text("kafka = 5\n")
    with pytest.raises(ConfigError, match=r"kafka"):
        config.load()


def test_job_whose_servers_are_gone_is_shown_as_one_line() -> None:
    with LocalCluster(slots=1) as own:
        job = own.queue().map(abs, range(3))
        job.results(LIMIT)
    bundle = job._repr_mimebundle_()
    assert "cannot be reached" in bundle["text/plain"]
    assert "cannot be reached" in bundle["text/html"]
    job._ipython_display_()


@pytest.mark.parametrize(
    ("wrong", "error", "named"),
    [
        (lambda queue: LocalCluster(slots=0), ValueError, "slots"),
        (lambda queue: LocalCluster(workers=-1), ValueError, "workers"),
        (lambda queue: LocalCluster(slots="2"), TypeError, "str"),
        (lambda queue: queue.job(5), TypeError, "name or id"),
        (lambda queue: queue.map(abs, [1])[1.0], TypeError, "float"),
        (lambda queue: queue.map(abs, [1], kwargs=[1]), TypeError, "kwargs"),
    ],
)
def test_wrong_argument_is_named(cluster: LocalCluster, wrong: Any, error: type[Exception], named: str) -> None:
    with pytest.raises(error, match=named):
        wrong(cluster.queue())


def test_negative_idle_time_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("YADTQ_IDLE", "-5")
    with pytest.raises(ConfigError, match="YADTQ_IDLE"):
        config.idle_limit()

"""What a careless user does: it works, or the message says what was wrong."""

from __future__ import annotations

import sys

from conftest import RunScript

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

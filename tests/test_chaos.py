"""What `make chaos` is worth: its plan can be replayed, and its checker sees what it is there to see."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import msgspec
import pytest

CHAOS = Path(__file__).parents[1] / "chaos"
NAME = "7-c1-0-failing"


@pytest.fixture(scope="module")
def chaos() -> Iterator[ModuleType]:
    """The folder's modules, for these tests only: what is imported travels with tasks as local source."""
    before = set(sys.modules)
    sys.path.insert(0, str(CHAOS))
    import check
    import faults  # noqa: F401  # found by sys.modules below

    yield check
    sys.path.remove(str(CHAOS))
    for name in set(sys.modules) - before:
        if getattr(sys.modules[name], "__file__", None) and str(CHAOS) in str(sys.modules[name].__file__):
            del sys.modules[name]


def outcome_of_all(check: ModuleType) -> tuple[object, Counter[tuple[str, int]]]:
    """A job as it is when all went well, and its audit."""
    items = check.load.items_of(NAME)
    outcomes = [(item[0], check.load.expected(NAME, item)) for item in items]
    failed = sum(outcome == "ValueError" for _, outcome in outcomes)
    found = check.Found(
        total=len(items),
        sealed=True,
        ended=True,
        cancelled=False,
        succeeded=len(items) - failed,
        failed=failed,
        fed=len(items),
        running=0,
        arrived=[item[0] for item in items],
        outcomes=outcomes,
    )
    return found, check.read_audit(f"{NAME} {item[0]} 1 0.0" for item in items)


def verdict(check: ModuleType, *, orphan: bool = False, forgetful: bool = False, **changes: object) -> object:
    found, audit = outcome_of_all(check)
    sent = check.Sent(NAME, claimed=True, orphan=orphan, given=changes.pop("given", []))
    audit = changes.pop("audit", audit)
    tally = check.Tally()
    check.check_job(tally, sent, msgspec.structs.replace(found, **changes), audit, forgetful=forgetful)
    return tally


def test_job_whose_outcomes_are_all_there_is_good(chaos: ModuleType) -> None:
    assert verdict(chaos).good
    assert verdict(chaos).tasks == 100


def test_task_without_an_outcome_is_lost(chaos: ModuleType) -> None:
    found, _ = outcome_of_all(chaos)
    assert verdict(chaos, outcomes=found.outcomes[:-1], succeeded=87, ended=False).lost


def test_two_outcomes_of_a_task_are_doubled(chaos: ModuleType) -> None:
    found, _ = outcome_of_all(chaos)
    assert verdict(chaos, outcomes=[*found.outcomes, found.outcomes[5]], succeeded=89).doubled


def test_another_value_than_expected_is_wrong_in_the_store_and_at_a_client(chaos: ModuleType) -> None:
    found, _ = outcome_of_all(chaos)
    assert verdict(chaos, outcomes=[(0, "17"), *found.outcomes[1:]]).wrong
    assert verdict(chaos, given=[["17"] * 100]).wrong


def test_outcome_of_a_task_that_never_ran_is_wrong(chaos: ModuleType) -> None:
    assert verdict(chaos, audit=Counter()).wrong


@pytest.mark.parametrize("change", [{"succeeded": 3}, {"fed": 101}, {"running": 1}, {"ended": False}, {"total": 99}])
def test_counters_that_do_not_agree_are_odd(chaos: ModuleType, change: dict[str, object]) -> None:
    assert verdict(chaos, **change).odd


def test_job_that_is_not_sealed_is_odd_unless_its_client_was_killed_and_what_was_sent_is_done(
    chaos: ModuleType,
) -> None:
    found, _ = outcome_of_all(chaos)
    half = {"sealed": False, "ended": False, "arrived": list(range(50)), "fed": 50, "outcomes": found.outcomes[:50]}
    half |= {"succeeded": 44, "failed": 6}
    assert verdict(chaos, **half).odd
    tally = verdict(chaos, orphan=True, **half)
    assert tally.good
    assert (tally.tasks, tally.unsent, tally.incomplete) == (50, 50, 1)
    assert verdict(chaos, orphan=True, **{**half, "arrived": list(range(51)), "fed": 51}).lost


def test_only_a_broker_without_a_disk_may_forget_what_nobody_had_fed(chaos: ModuleType) -> None:
    found, _ = outcome_of_all(chaos)
    gone = {"ended": False, "arrived": list(range(99)), "fed": 99, "outcomes": found.outcomes[:99]}
    gone |= {
        "succeeded": 88 - (found.outcomes[99][1] != "ValueError"),
        "failed": 12 - (found.outcomes[99][1] == "ValueError"),
    }
    assert verdict(chaos, orphan=True, **gone).lost
    assert verdict(chaos, forgetful=True, **gone).lost, "its client lived, and would have sent it again"
    assert verdict(chaos, orphan=True, forgetful=True, **gone).good


def test_plan_is_the_same_for_the_same_seed_and_another_for_another(chaos: ModuleType) -> None:
    faults = sys.modules["faults"]
    assert faults.draw_plan(5, 600) == faults.draw_plan(5, 600)
    assert faults.draw_plan(5, 600) != faults.draw_plan(6, 600)
    assert {fault.kind for fault in faults.draw_plan(5, 3600)} == set(faults.KINDS), "each kind comes in an hour"

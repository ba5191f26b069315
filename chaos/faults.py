"""The faults: each a small function that does one thing to one victim and undoes it. Another one is another function.

A plan is drawn from a seed before anything starts: which kind, when, which victim by its number, for how long.
"""

from __future__ import annotations

import contextlib
import random
import signal
import time
from collections.abc import Callable
from typing import Final

import msgspec
import psutil
import redis
from ground import Client, Ground, MissedError

#: Seconds to wait for a client to be where it is to be hit.
_WAIT: Final = 4.0


class Fault(msgspec.Struct, frozen=True):
    """One entry of a plan."""

    #: Seconds after the start of the disturbance.
    at: float
    kind: str
    #: Taken modulo the number of candidates.
    victim: int
    #: For how long.
    seconds: float


class Kind(msgspec.Struct, frozen=True):
    """A kind of fault."""

    do: Callable[[Ground, int, float], None]
    #: How often it comes, against the others.
    weight: float
    #: Shortest and longest time that it lasts.
    seconds: tuple[float, float]


KINDS: Final[dict[str, Kind]] = {}


def fault(
    weight: float, seconds: tuple[float, float] = (0.0, 0.0)
) -> Callable[[Callable[[Ground, int, float], None]], None]:
    """Register a kind of fault under its function's name."""

    def register(do: Callable[[Ground, int, float], None]) -> None:
        KINDS[do.__name__.replace("_", " ")] = Kind(do, weight, seconds)

    return register


def draw_plan(seed: int, seconds: float, *, every: float = 2.0) -> list[Fault]:
    """Return the faults of so many seconds, one every so many in the mean; the same for the same arguments."""
    rng = random.Random(seed)
    names = list(KINDS)
    weights = [KINDS[name].weight for name in names]
    plan, at = [], 0.0
    while (at := at + rng.expovariate(1 / every)) < seconds:
        kind = rng.choices(names, weights)[0]
        plan.append(Fault(at, kind, rng.randrange(1000), rng.uniform(*KINDS[kind].seconds)))
    return plan


# Slots.


@fault(6)
def slot_killed(ground: Ground, victim: int, _: float) -> None:
    slots = ground.slots(ground.node(victim))
    if not slots:
        raise MissedError("slot")
    with contextlib.suppress(psutil.NoSuchProcess):
        slots[victim // 7 % len(slots)].kill()


@fault(1, (0.5, 4.0))
def slot_frozen(ground: Ground, victim: int, seconds: float) -> None:
    slots = ground.slots(ground.node(victim))
    if not slots:
        raise MissedError("slot")
    ground.freeze([slots[victim // 7 % len(slots)]], seconds)


@fault(2)
def template_killed(ground: Ground, victim: int, _: float) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        ground.template(ground.node(victim)).kill()


# Nodes, and the feeders in them.


@fault(3)
def node_killed(ground: Ground, victim: int, _: float) -> None:
    name = ground.node(victim)
    with ground.hold(name):
        ground.cluster._end(name, do="kill", hold=False)


@fault(2, (1.0, 6.0))
def node_killed_and_down(ground: Ground, victim: int, seconds: float) -> None:
    name = ground.node(victim)
    with ground.hold(name):
        ground.cluster._end(name, do="kill", hold=True)
        ground.pause(seconds)
        ground.cluster._start(name)


@fault(2, (0.0, 2.0))
def node_asked_to_stop(ground: Ground, victim: int, seconds: float) -> None:
    name = ground.node(victim)
    with ground.hold(name):
        ground.cluster._end(name, do="stop")
        ground.pause(seconds)
        ground.cluster._start(name)


@fault(3, (3.0, 7.0))
def node_frozen_beyond_its_lease(ground: Ground, victim: int, seconds: float) -> None:
    name = ground.node(victim)
    with ground.hold(name):
        ground.freeze([ground.process(name)], seconds)


@fault(1, (3.0, 7.0))
def node_frozen_with_its_slots(ground: Ground, victim: int, seconds: float) -> None:
    name = ground.node(victim)
    with ground.hold(name):
        node = ground.process(name)
        ground.freeze([node, *ground._below(node)], seconds)


@fault(1, (0.1, 2.0))
def node_frozen_for_a_moment(ground: Ground, victim: int, seconds: float) -> None:
    name = ground.node(victim)
    with ground.hold(name):
        ground.freeze([ground.process(name)], seconds)


# Clients.


@fault(2)
def client_killed_while_it_sends(ground: Ground, victim: int, _: float) -> None:
    deadline = time.monotonic() + _WAIT
    before = {client.name: _sends(client) for client in ground.living()}
    while time.monotonic() < deadline and not ground.ending.is_set():
        for client in ground.living():
            if _sends(client) > before.get(client.name, 0):
                ground.pause(victim / 1000 * 0.4)
                _kill(client)
                return
        time.sleep(0.005)
    raise MissedError("client")


@fault(2)
def client_killed_while_it_waits(ground: Ground, victim: int, _: float) -> None:
    waiting = [c for c in ground.living() if (lines := c.lines()) and lines[-1]["what"] == "waits"]
    if not waiting:
        raise MissedError("client")
    _kill(waiting[victim % len(waiting)])


@fault(1, (0.5, 12.0))
def client_frozen(ground: Ground, victim: int, seconds: float) -> None:
    living = ground.living()
    if not living:
        raise MissedError("client")
    client = living[victim % len(living)]
    with ground.hold(client.name):
        ground.freeze([psutil.Process(client.process.pid)], seconds)


def _sends(client: Client) -> int:
    return sum(line["what"] == "sends" for line in client.lines())


def _kill(client: Client) -> None:
    client.killed = True
    client.process.send_signal(signal.SIGKILL)


# Servers.


@fault(2, (0.0, 8.0))
def broker_killed(ground: Ground, _: int, seconds: float) -> None:
    with ground.hold("broker"):
        ground.cluster.kill_broker()
        ground.pause(seconds)
        ground.cluster.restart_broker()


@fault(1, (0.5, 8.0))
def broker_frozen(ground: Ground, _: int, seconds: float) -> None:
    with ground.hold("broker"):
        ground.freeze([ground.process("broker")], seconds)


@fault(2, (0.0, 5.0))
def store_killed(ground: Ground, _: int, seconds: float) -> None:
    with ground.hold("store"):
        ground.cluster.kill_store()
        ground.pause(seconds)
        ground.cluster.restart_store()


@fault(2, (0.2, 6.0))
def store_frozen(ground: Ground, _: int, seconds: float) -> None:
    with ground.hold("store"):
        ground.freeze([ground.process("store")], seconds)


@fault(3, (0.1, 2.0))
def store_cuts_all_connections(ground: Ground, _: int, seconds: float) -> None:
    # Replies are lost: who asked does not know whether it was done.
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with contextlib.suppress(redis.RedisError):
            ground.redis().execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
        ground.pause(0.05)


@fault(1, (0.0, 3.0))
def broker_and_store_killed(ground: Ground, _: int, seconds: float) -> None:
    with ground.hold("broker"), ground.hold("store"):
        ground.cluster.kill_broker()
        ground.cluster.kill_store()
        ground.pause(seconds)
        ground.cluster.restart_store()
        ground.cluster.restart_broker()

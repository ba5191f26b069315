"""What a slot's death leads to: which task is charged, what is tried again, and what ends."""

from __future__ import annotations

import collections
from collections.abc import Callable
from typing import Final, Protocol

import msgspec

from yadtq_nb.config import Config
from yadtq_nb.errors import Crash
from yadtq_nb.model import WHOLE, Lease, Retry
from yadtq_nb.slots import hints
from yadtq_nb.slots.pool import Died
from yadtq_nb.workbench.bench import Workbench
from yadtq_nb.worker import crash

#: How much of what a slot has written last is kept of a crash, in characters.
_STDERR: Final = 4096


#: What the reason ends with, of a death in which the task had not begun.
_UNBEGUN: Final = ", before its task had begun"


class Post(Protocol):
    """Sends outcomes to the workbench, sooner or later."""

    def __call__(self, lease: Lease, offsets: range | list[int], states: bytes, frame: bytes) -> None: ...


def _is_unbegun(lease: Lease, offset: int) -> bool:
    deaths = lease.deaths.get(offset, ())
    return bool(deaths) and deaths[-1].reason.endswith(_UNBEGUN)


class Part(msgspec.Struct, frozen=True):
    """Tasks of a chunk that are run together."""

    offsets: tuple[int, ...]
    #: Whether the slot must be one in which nothing has run: what others have left there is not to be blamed on this.
    fresh: bool = False
    #: Nothing is run, but the item is described.
    describe: bool = False


class Deaths:
    """Settles deaths for a node. Called by the main thread only: what the feeder starts has no past."""

    def __init__(
        self,
        config: Config,
        node: str,
        workbench: Workbench,
        *,
        post: Post,
        later: Callable[[Callable[[], object]], object],
    ) -> None:
        """Take the parts that are passed in.

        Args:
            node: id of this node, for the outcomes.
            post: is given outcomes.
            later: is given calls of the workbench, which are made in order, and again while it is away.
        """
        self._config, self._node, self._bench = config, node, workbench
        self._post, self._later = post, later

    def settle(self, lease: Lease, event: Died) -> None:
        """Charge the task that ran in a slot that has died, and let its chunk-mates go on elsewhere."""
        if event.describes is not None:
            self.end(lease, [event.describes], None)
        elif event.ran and not event.told and event.timed_out is not None:
            self._end_late(lease, event.timed_out, event.log)
            return
        elif event.ran and not event.told:
            offset = event.offset
            reason = event.reason if offset is not None and not event.read else event.reason + _UNBEGUN
            if offset is None:
                offset = WHOLE if lease.head.count > 1 else 0
            death = Crash(hints.HOST, self._node, reason, event.memory, 0.0, event.stderr[-_STDERR:])
            # Also when it was the last time: whoever takes the chunk next finds out what its item is, and ends it.
            self._later(lambda: self._bench.release(lease, crashed=(offset, death)))
            return
        self._later(lambda: self._bench.release(lease))

    def end(self, lease: Lease, offsets: list[int], item: str | None) -> None:
        """End tasks that have killed their slot or node too often. item: what it looks like, None if nobody can say."""
        self._post(lease, offsets, *crash.outcome(self._config.key, self._node, lease, offsets, item))

    def parts(self, lease: Lease, left: list[int]) -> collections.deque[Part]:
        """Return what is to be run of a chunk over which slots or nodes have died, part after part.

        First what is above suspicion, all together; then each suspect alone, so that the next death is charged to the
        right one and touches nobody else. In the end, each that is not tried again has its item described.

        Where a slot has died before a task had begun, the next one reads item by item, so that one of them is charged.
        If it is none of them, but the function, all tasks end, after one death more than a task is allowed.
        """
        allowed = lease.head.policy.max_crashes or self._config.max_crashes
        if left and lease.crashes.get(WHOLE, 0) > allowed:
            self.end(lease, left, None)
            return collections.deque()
        hopeless = [o for o in left if lease.crashes.get(o, 0) >= allowed]
        # One more than is allowed: its item was being described when the node died.
        mute = {o for o in hopeless if lease.crashes[o] > allowed or _is_unbegun(lease, o)}
        for offset in mute:
            self.end(lease, [offset], None)
        others = () if lease.lapses else tuple(o for o in left if o not in lease.crashes)
        suspects = left if lease.lapses else [o for o in left if o in lease.crashes]
        parts = [Part(others)] if others else []
        parts += [Part((o,), fresh=o in lease.crashes) for o in suspects if lease.crashes.get(o, 0) < allowed]
        parts += [Part((o,), describe=True) for o in hopeless if o not in mute]
        return collections.deque(parts)

    def _end_late(self, lease: Lease, offset: int, log: bytes) -> None:
        """A task took too long: it fails, or is tried again; its chunk-mates go on elsewhere."""
        policy, tries = lease.head.policy, lease.tries.get(offset, 0)
        if policy.retry_timeouts and tries < policy.retries:
            note = f"attempt on {self._node}: yadtq_nb.errors.TaskTimeoutError: longer than {policy.timeout:g} s"
            retry = Retry(offset, tries + 1, policy.delay(tries), note)
            self._later(lambda: self._bench.retry(lease, [retry]))
        else:
            self._post(lease, [offset], *crash.late(self._config.key, self._node, lease, offset, log))
        self._later(lambda: self._bench.release(lease))

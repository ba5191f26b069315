"""What a slot's death leads to: which task is charged, what is tried again, and what ends."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from yadtq_nb.config import Config
from yadtq_nb.model import Lease, Retry
from yadtq_nb.slots.pool import Died
from yadtq_nb.workbench.bench import Workbench
from yadtq_nb.worker import crash


class Post(Protocol):
    """Sends outcomes to the workbench, sooner or later."""

    def __call__(self, lease: Lease, offsets: range | list[int], states: bytes, frame: bytes) -> None: ...


class Deaths:
    """Called by the main thread only."""

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
        offset = next((o for o in range(lease.head.count) if o not in lease.done), 0)
        offset = event.offset if event.offset is not None else offset
        times = lease.crashes.get(offset, 0) + 1
        if not event.ran or event.told:
            self._later(lambda: self._bench.release(lease))
        elif event.timed_out is not None:
            self._end_late(lease, event.timed_out)
        elif times < self.allowed(lease):
            self._later(lambda: self._bench.release(lease, crashed=offset))
        else:
            states, frame = crash.outcome(
                self._config.key, self._node, lease, {offset: times}, event.reason, event.stderr
            )
            self._post(lease, [offset], states, frame)
            self._later(lambda: self._bench.release(lease))

    def allowed(self, lease: Lease) -> int:
        """Return how often a task may kill its slot or node."""
        return lease.head.policy.max_crashes or self._config.max_crashes

    def _end_late(self, lease: Lease, offset: int) -> None:
        """A task took too long: it fails, or is tried again; its chunk-mates go on elsewhere."""
        policy, tries = lease.head.policy, lease.tries.get(offset, 0)
        if policy.retry_timeouts and tries < policy.retries:
            note = f"attempt on {self._node}: yadtq_nb.errors.TaskTimeoutError: longer than {policy.timeout:g} s"
            retry = Retry(offset, tries + 1, policy.delay(tries), note)
            self._later(lambda: self._bench.retry(lease, [retry]))
        else:
            self._post(lease, [offset], *crash.late(self._config.key, self._node, lease, offset))
        self._later(lambda: self._bench.release(lease))

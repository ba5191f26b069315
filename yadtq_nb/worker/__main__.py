"""How the local stack starts a node: settings from the environment, the rest from arguments; "ready" on stdout."""

from __future__ import annotations

import argparse

from yadtq_nb import config
from yadtq_nb.errors import ConfigError
from yadtq_nb.worker import logs
from yadtq_nb.worker.node import Node, serve


def main() -> None:
    """Run a node until SIGTERM."""
    parser = argparse.ArgumentParser(prog="python -m yadtq_nb.worker", description=__doc__)
    parser.add_argument("--queue", default="default")
    parser.add_argument("--slots", type=int, required=True)
    parser.add_argument("--node-id", default="")
    parser.add_argument("--predecessor", default="")
    parser.add_argument("--memory-limit", type=config.parse_memory_limit)
    parser.add_argument("--max-tasks-per-slot", type=int)
    given = parser.parse_args()
    settings = config.load()
    if settings is None:
        raise ConfigError("no servers are configured: set YADTQ_CONFIG, or YADTQ_KAFKA and YADTQ_REDIS")
    logs.set_up()
    serve(
        settings,
        queue=given.queue,
        slots=given.slots,
        id=given.node_id,
        predecessor=given.predecessor,
        active=config.activity_file(),
        memory_limit=given.memory_limit,
        max_tasks_per_slot=given.max_tasks_per_slot,
        ready=_say_ready,
    )


def _say_ready(_: Node) -> None:
    print("ready", flush=True)  # noqa: T201  # what the keeper waits for


if __name__ == "__main__":
    main()

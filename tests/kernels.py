"""A real Jupyter kernel: what a notebook's cells say when they are run there."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import stacks
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import KernelManager

#: Seconds after which a cell hangs.
_LIMIT = 60


class Kernel:
    """Runs cells."""

    def __init__(self, client: Any) -> None:
        self._client = client

    def run(self, source: str) -> str:
        """Run a cell to its end, and return what it has printed."""
        printed: list[str] = []

        def hear(message: dict[str, Any]) -> None:
            content = message["content"]
            if message["msg_type"] == "stream":
                printed.append(content["text"])

        reply = self._client.execute_interactive(source, timeout=_LIMIT, output_hook=hear)["content"]
        assert reply["status"] == "ok", f"{reply.get('ename')}: {reply.get('evalue')}\n" + "".join(printed)
        return "".join(printed).strip()


@contextlib.contextmanager
def start_kernel(directory: Path, *, seed: int, config: Path | None = None) -> Iterator[Kernel]:
    """Start a kernel of this Python in a directory, with a hash seed of its own; ended with the block."""
    env = {**os.environ, "PYTHONHASHSEED": str(seed), "PYTHONPATH": str(stacks.ROOT)}
    if config is not None:
        env["YADTQ_CONFIG"] = str(config)
    manager = KernelManager(kernel_name="python3", kernel_spec_manager=KernelSpecManager(kernel_dirs=[]))
    manager.start_kernel(env=env, cwd=str(directory))
    try:
        client = manager.blocking_client()
        client.start_channels()
        try:
            client.wait_for_ready(timeout=_LIMIT)
            yield Kernel(client)
        finally:
            client.stop_channels()
    finally:
        manager.shutdown_kernel(now=True)
        manager.cleanup_resources()

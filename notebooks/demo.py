"""Run the quickstart on the local stack, keep it, and print what a reader of it would see.

python notebooks/demo.py [where to keep the executed notebook]
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Any

import nbformat
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

HERE = Path(__file__).resolve().parent
KEPT = HERE.parent / "build" / "quickstart.ipynb"
#: Seconds that one cell may take.
PATIENCE = 300


def main(kept: Path = KEPT) -> int:
    """Run the notebook; return 0 if all of it worked."""
    notebook = nbformat.read(HERE / "quickstart.ipynb", as_version=4)  # type: ignore[no-untyped-call]  # nbformat is untyped
    print("Running notebooks/quickstart.ipynb on the local stack ...", flush=True)
    try:
        execute(notebook)
    except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
        print(f"demo: a cell of quickstart.ipynb failed; see {kept}\n\n{error}", file=sys.stderr)
        return 1
    finally:
        kept.parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(notebook, kept)  # type: ignore[no-untyped-call]  # nbformat is untyped
    card, frame = text_of(notebook, "card"), text_of(notebook, "frame")
    print(f"\nThe job's card:\n\n{card}\n\nThe head of its DataFrame:\n\n{frame}\n\nThe notebook, executed: {kept}")
    if "succeeded" not in card.partition("\n")[0]:
        print("demo: the card does not show a job that has succeeded", file=sys.stderr)
        return 1
    return 0


def execute(notebook: nbformat.NotebookNode) -> None:
    """Execute the notebook in place, in a kernel of this very Python."""
    # With no directories to search, "python3" is the kernel of the ipykernel that is installed beside this; a user may
    # have one of the same name in the home directory, which runs another Python.
    manager = AsyncKernelManager(kernel_name="python3", kernel_spec_manager=KernelSpecManager(kernel_dirs=[]))
    # The kernel warns on stderr that it talks over loopback unencrypted: true, and not what a reader came for.
    quiet = ["--log-level=ERROR"]
    resources = {"metadata": {"path": str(HERE)}}
    client = NotebookClient(notebook, km=manager, timeout=PATIENCE, resources=resources, extra_arguments=quiet)
    client.execute(cleanup_kc=True)
    asyncio.run(manager.cleanup_resources())


def text_of(notebook: nbformat.NotebookNode, tag: str) -> str:
    """Return the text form of what the cell with this tag shows."""
    (cell,) = [cell for cell in notebook.cells if tag in cell.metadata.get("tags", [])]
    shown: list[Any] = [output.data["text/plain"] for output in cell.outputs if "data" in output]
    return str(shown[-1]) if shown else "(nothing)"


if __name__ == "__main__":
    sys.exit(main(*map(Path, sys.argv[1:2])))

"""Notes that tell what to do about an error that comes from running somewhere else than in the notebook."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
from typing import Final

from yadtq_nb.model import Environment

#: Name of a module -> name of its package, where they differ.
_PACKAGES: Final = {
    "PIL": "pillow",
    "attr": "attrs",
    "bs4": "beautifulsoup4",
    "cv2": "opencv-python-headless",
    "dateutil": "python-dateutil",
    "dotenv": "python-dotenv",
    "fitz": "pymupdf",
    "skimage": "scikit-image",
    "sklearn": "scikit-learn",
    "yaml": "pyyaml",
}

HOST: Final = socket.gethostname()
PYTHON: Final = f"{sys.version_info[0]}.{sys.version_info[1]}"


def annotate(error: BaseException, environment: Environment) -> None:
    """Add a note to error when it looks like a difference between notebook and worker."""
    note = None
    if isinstance(error, ModuleNotFoundError) and error.name:
        note = _missing_module(error.name)
    elif isinstance(error, FileNotFoundError) and isinstance(error.filename, str | bytes):
        note = _missing_file(os.fsdecode(error.filename), environment)
    if note and note not in _notes(error):
        with contextlib.suppress(Exception):  # an error that takes no notes
            error.add_note(note)


def message(error: BaseException) -> str:
    """Return the text of error with its notes, whatever its __str__ does, as it can be sent."""
    try:
        text = str(error)
    except BaseException as exc:
        text = f"<{type(error).__qualname__} whose text raises {type(exc).__qualname__}>"
    return sendable("\n".join([text, *_notes(error)]))


def sendable(text: str) -> str:
    """Return text without lone surrogates: what cannot be encoded would cost the chunk all of its outcomes."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _notes(error: BaseException) -> list[str]:
    try:
        return [str(note) for note in error.__notes__]
    except Exception:  # none, or not what Python would have put there
        return []


def wrong_python(environment: Environment) -> str | None:
    """Return what to say when the submitter's Python is another than this one, else None."""
    if environment.python in ("", PYTHON):
        return None
    return (
        f"the notebook runs Python {environment.python}, but the worker on host {HOST} runs {PYTHON}, and functions "
        f"travel as bytecode: start the worker with Python {environment.python} (this one is {sys.executable})"
    )


def _missing_module(name: str) -> str:
    top = name.partition(".")[0]
    package = _PACKAGES.get(top, top)
    return (
        f"Python {PYTHON} on worker host {HOST} has no module {top!r}. Where the package is called {package}, mend it "
        f"there with: {sys.executable} -m pip install {package} (and start the worker again)"
    )


def _missing_file(name: str, environment: Environment) -> str | None:
    if os.path.isabs(name):
        if environment.host in ("", HOST):
            return None
        return f"looked for on worker host {HOST}; the notebook runs on {environment.host}"
    note = f"looked for on worker host {HOST} in directory {os.getcwd()}"
    if environment.host not in ("", HOST):
        note += (
            f"; the notebook runs on {environment.host} in {environment.cwd}. Only .py files travel: give the data as "
            "an argument, or put it where both can reach it"
        )
    return note

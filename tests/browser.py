"""A real JupyterLab in a real Chromium, for the card's tests and the README's pictures.

with lab(directory, environment) as server, chromium() as browser:
    with server.open(browser, "some.ipynb", dark=True) as page:
        page.run_all()
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nbformat

#: Names under which Chromium may be found.
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
#: Seconds that JupyterLab may take to start, and to show a notebook.
PATIENCE = 60.0
#: Said by JupyterLab itself or by the browser, whatever a page shows.
NOT_OURS = ("favicon", "Autoplay", "WebGL", "GPU", "preload", "ServiceWorker", "service-worker", "subshell")
_IDLE = "() => window.jupyterapp?.shell.currentWidget?.sessionContext?.session?.kernel?.status === 'idle'"


def find_chromium() -> str | None:
    """Return the path of a Chromium, or None."""
    return next(filter(None, map(shutil.which, BROWSERS)), None)


@contextlib.contextmanager
def chromium() -> Iterator[Any]:
    """Start a browser without a window."""
    from playwright.sync_api import sync_playwright

    # Root has no sandbox; what is shown is ours.
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=find_chromium(), args=["--no-sandbox"])
        yield browser
        browser.close()


@contextlib.contextmanager
def lab(directory: Path, environment: dict[str, str]) -> Iterator[Lab]:
    """Start a JupyterLab that serves a directory, with settings of its own."""
    home = directory / ".lab"
    home.mkdir(parents=True)
    # A kernel of this very Python, whatever others the user has.
    (kernel := home / "data" / "kernels" / "python3").mkdir(parents=True)
    command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    (kernel / "kernel.json").write_text(json.dumps({"argv": command, "display_name": "Python 3", "language": "python"}))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    token = secrets.token_hex(16)
    settings = {name: str(home / name.lower()) for name in ("CONFIG", "RUNTIME", "DATA")}
    env = {**os.environ, **environment, **{f"JUPYTER_{name}_DIR": path for name, path in settings.items()}}
    env |= {"JUPYTERLAB_SETTINGS_DIR": str(home / "settings"), "JUPYTERLAB_WORKSPACES_DIR": str(home / "workspaces")}
    env |= {"JUPYTER_PREFER_ENV_PATH": "0", "IPYTHONDIR": str(home / "ipython")}
    arguments = [
        "--no-browser",
        "--allow-root",
        "--ip=127.0.0.1",
        f"--port={port}",
        f"--IdentityProvider.token={token}",
    ]
    arguments += [f"--ServerApp.root_dir={directory}", "--LabApp.expose_app_in_browser=True"]
    arguments += ["--LabApp.news_url=None", "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"]
    with (home / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "jupyterlab", *arguments], env=env, cwd=directory, stdout=log, stderr=log
        )
    try:
        server = Lab(f"http://127.0.0.1:{port}", token, directory, home)
        server.wait(process)
        yield server
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


class Lab:
    """A JupyterLab that runs."""

    def __init__(self, url: str, token: str, directory: Path, home: Path) -> None:
        self.url, self.token, self.directory, self.home = url, token, directory, home

    def wait(self, process: subprocess.Popen[bytes]) -> None:
        """Wait until it answers."""
        until = time.monotonic() + PATIENCE
        while True:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.url}/api?token={self.token}", timeout=2):
                return
            log = (self.home / "log").read_text(errors="replace")[-2000:]
            assert process.poll() is None, log
            assert time.monotonic() < until, log
            time.sleep(0.1)

    def write(self, name: str, *cells: str) -> None:
        """Write a notebook."""
        made = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in cells])
        made.metadata.kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}
        nbformat.write(made, self.directory / name)

    def read(self, name: str) -> Any:
        """Read a notebook as it is on the disk."""
        return nbformat.read(self.directory / name, as_version=4)

    @contextlib.contextmanager
    def open(
        self, browser: Any, name: str, *, dark: bool = False, width: int = 1000, height: int = 900
    ) -> Iterator[Page]:
        """Open a notebook in a page of its own."""
        themes = self.home / "settings" / "@jupyterlab" / "apputils-extension"
        themes.mkdir(parents=True, exist_ok=True)
        theme = "JupyterLab Dark" if dark else "JupyterLab Light"
        (themes / "themes.jupyterlab-settings").write_text(json.dumps({"theme": theme}))
        (themes / "notification.jupyterlab-settings").write_text('{"fetchNews": "false", "checkForUpdates": false}')
        context = browser.new_context(viewport={"width": width, "height": height}, device_scale_factor=1)
        page = Page(context.new_page(), f"{self.url}/doc/tree/{name}?token={self.token}")
        page.load()
        yield page
        context.close()


class Page:
    """A notebook in a browser."""

    def __init__(self, page: Any, url: str) -> None:
        self.page, self.url = page, url
        #: What the browser has complained about.
        self.complaints: list[str] = []
        page.set_default_timeout(1000 * PATIENCE)
        page.on("console", lambda message: message.type == "error" and self._complain(message.text))
        page.on("pageerror", lambda error: self._complain(str(error)))
        page.on("dialog", lambda dialog: dialog.accept())

    def _complain(self, text: str) -> None:
        if not any(known.lower() in text.lower() for known in NOT_OURS):
            self.complaints.append(text)

    def load(self) -> None:
        """Load the page, or load it again, and wait until a kernel is there."""
        self.page.goto(self.url)
        self.page.wait_for_selector(".jp-Notebook .jp-CodeCell")
        self.page.wait_for_function(_IDLE)

    def command(self, name: str) -> None:
        """Run a command of JupyterLab without waiting for its end."""
        self.page.evaluate("name => void window.jupyterapp.commands.execute(name)", name)

    def run_all(self) -> None:
        """Run all cells."""
        self.command("notebook:run-all-cells")

    def run(self, cell: int) -> None:
        """Run one cell."""
        self.page.evaluate(
            "n => { const notebook = window.jupyterapp.shell.currentWidget.content; notebook.deselectAll();"
            "notebook.activeCellIndex = n; }",
            cell,
        )
        self.command("notebook:run-cell")

    def restart(self) -> None:
        """Restart the kernel."""
        restart = "() => void window.jupyterapp.shell.currentWidget.sessionContext.session.kernel.restart()"
        self.page.evaluate(restart)
        self.page.wait_for_timeout(1000)
        self.page.wait_for_function(_IDLE)
        # JupyterLab may lose what is sent by a widget that is made while it is still asking for subshells.
        self.page.wait_for_timeout(1000)

    def save(self) -> None:
        """Save the notebook."""
        self.page.evaluate("() => window.jupyterapp.commands.execute('docmanager:save')")

    def cell(self, number: int) -> Any:
        """Return what finds a cell's output."""
        return self.page.locator(".jp-Notebook .jp-CodeCell").nth(number).locator(".jp-Cell-outputWrapper")

    def eventually(self, ready: Callable[[], bool]) -> None:
        """Wait until something is so."""
        until = time.monotonic() + PATIENCE
        while not ready():
            assert time.monotonic() < until, self.page.inner_text("body")[-3000:]
            self.page.wait_for_timeout(50)

    def picture(self, path: Path, cell: int | None = None) -> None:
        """Take a picture of the page or of a cell's output."""
        path.parent.mkdir(parents=True, exist_ok=True)
        target = self.page if cell is None else self.cell(cell)
        target.screenshot(path=path)

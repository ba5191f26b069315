"""The command prints what it should, and its exit codes can be relied on."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from yadtq_nb.cli import duration, shown
from yadtq_nb.local import LocalCluster

Run = Callable[..., subprocess.CompletedProcess[str]]
ROOT = Path(__file__).parents[1]


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("YADTQ_")}
    return {**kept, "YADTQ_HOME": str(tmp_path), "PYTHONPATH": str(ROOT), "COLUMNS": "100"}


@pytest.fixture
def yadtq(environment: dict[str, str], tmp_path: Path) -> Iterator[Run]:
    def run(*arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "yadtq_nb.cli", *arguments]
        env = {**environment, **more}
        return subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)

    yield run
    run("down")


def test_help_names_every_command(yadtq: Run) -> None:
    text = yadtq("--help").stdout
    assert all(command in text for command in ("up", "status", "down", "worker", "jobs", "workers"))


def test_stack_goes_up_and_down_with_exit_codes(yadtq: Run) -> None:
    assert yadtq("status").returncode == 3
    up = yadtq("up")
    assert up.returncode == 0, up.stderr
    assert "is up" in up.stdout
    status = yadtq("status")
    assert status.returncode == 0
    assert all(part in status.stdout for part in ("keeper", "broker", "store", "node-1"))
    assert yadtq("down").returncode == 0
    assert yadtq("status").returncode == 3


def test_passwords_are_not_printed(yadtq: Run, tmp_path: Path) -> None:
    text = yadtq("up").stdout + yadtq("status").stdout
    [identity] = tmp_path.glob("*/identity.json")
    password = identity.read_text().split('"password":"')[1].split('"')[0]
    assert password not in text


def test_broken_stack_has_exit_code_1_and_says_what_heals_it(yadtq: Run) -> None:
    yadtq("up")
    keeper = next(line for line in yadtq("status").stdout.splitlines() if line.startswith("keeper"))
    os.kill(int(keeper.split()[1]), signal.SIGKILL)
    status = yadtq("status")
    assert status.returncode == 1
    assert "yadtq up" in status.stdout
    assert yadtq("up").returncode == 0
    assert yadtq("status").returncode == 0


def test_worker_without_servers_says_how_to_name_them(yadtq: Run) -> None:
    run = yadtq("worker")
    assert run.returncode == 1
    assert "YADTQ_KAFKA" in run.stderr
    assert "Traceback" not in run.stderr


@pytest.mark.parametrize(
    ("url", "text"),
    [
        ("redis://store:6379/0", "redis://store:6379/0"),
        ("redis://:secret@store:6379/0", "redis://:***@store:6379/0"),
        ("rediss://me:secret@store/1", "rediss://me:***@store/1"),
    ],
)
def test_url_is_shown_without_its_password(url: str, text: str) -> None:
    assert shown(url) == text


@pytest.mark.parametrize(("seconds", "text"), [(3.9, "3 s"), (200, "3 min 20 s"), (7500, "2 h 5 min")])
def test_duration_is_shown_as_people_write_it(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_worker_says_what_it_serves_and_where_and_ends_on_sigterm(environment: dict[str, str], tmp_path: Path) -> None:
    with LocalCluster(workers=0) as cluster:
        secret = tmp_path / "secret"
        secret.write_text(f"{cluster.config.secret}\n")
        servers = ["--kafka", cluster.config.kafka, "--redis", cluster.config.redis, "--secret-file", str(secret)]
        command = [sys.executable, "-m", "yadtq_nb.cli", "worker", "--queue", "gpu", "--slots", "1", *servers]
        look = [sys.executable, "-m", "yadtq_nb.cli", "workers", "--here", "--queue", "gpu", *servers]
        assert subprocess.run(look, env=environment, capture_output=True, check=False).returncode == 1, "none is there"
        with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as worker:
            assert worker.stdout is not None
            lines = iter(worker.stdout.readline, "")
            said = "".join(itertools.takewhile(lambda line: not line.startswith("Ready as"), lines))
            assert subprocess.run(look, env=environment, capture_output=True, check=False).returncode == 0
            worker.terminate()
            assert worker.wait(20) == 0
        assert subprocess.run(look, env=environment, capture_output=True, check=False).returncode == 1, "it has stopped"
        assert "queue gpu with 1 slots" in said
        assert cluster.config.kafka in said
        assert ":***@127.0.0.1" in said
        assert cluster.config.redis not in said

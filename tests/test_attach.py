"""A job belongs to its queue: other programs find it, and it outlives the one that sent it."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import pytest
from conftest import RunScript, StartScript
from waiting import wait_for_file

from yadtq_nb import JobIncompleteError, JobNotFoundError, JobState, Queue

# Functions of the tests travel by value, as those of a notebook do.
__import__("cloudpickle").register_pickle_by_value(sys.modules[__name__])

#: Seconds after which something hangs.
LIMIT = 30


def test_job_is_found_by_name_and_by_id_while_it_runs_and_when_it_is_done(
    queue: Queue, run_script: RunScript, tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    job = queue.map(lambda x: (wait_for_file(str(gate)), x * x)[1], range(4), name="found")
    output = run_script(
        """
        from pathlib import Path
        job = queue.job("found")
        print(job.id, job.state, len(job))
        Path(sys.argv[1]).touch()
        print(queue.job(sys.argv[2]).results(30), list(job.to_frame()["value"]))
        """,
        str(gate),
        job.id,
    )
    assert output == [f"{job.id} running 4", "[0, 1, 4, 9] [0, 1, 4, 9]"]
    assert job.results(LIMIT) == [0, 1, 4, 9]


def test_job_outlives_the_program_that_sent_it(queue: Queue, run_script: RunScript) -> None:
    run_script("queue.map(lambda x: x + 1, range(1000), name='outlives')")
    assert queue.job("outlives").results(LIMIT) == list(range(1, 1001))


def test_program_that_drops_everything_and_ends_loses_nothing(queue: Queue, run_script: RunScript) -> None:
    run_script(
        """
        def send():
            Queue(queue.name).map(lambda x: len(x), [bytes(20_000)] * 1000, name='dropped')
            Queue(queue.name).options(name='dropped too').submit(len, 'abc')
        send()
        """
    )
    assert queue.job("dropped").results(LIMIT) == [20_000] * 1000
    assert queue.job("dropped too").results(LIMIT) == [3]


def test_generator_cut_off_by_the_end_of_its_program_leaves_an_incomplete_job(
    queue: Queue, run_script: RunScript
) -> None:
    output = run_script(
        """
        import itertools
        job = queue.map(lambda x: x, itertools.count(), name="cut", chunksize=1)
        print(sum(future.result(30) >= 0 for future in itertools.islice(job, 50)))
        """
    )
    assert output == ["50"]
    job = queue.job("cut")
    with pytest.raises(JobIncompleteError, match=r"incomplete.* more than \d+ tasks"):
        job.results(LIMIT)
    assert job.state == JobState.INCOMPLETE
    found = job.results(LIMIT, errors="skip")
    assert found == list(range(len(found)))
    assert len(found) >= 50
    assert len(job.to_frame()) == len(found)
    assert len(job.results(LIMIT, errors="skip")) == len(found)


def test_interrupted_results_leave_the_job_running(queue: Queue, start_script: StartScript, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    program = start_script(
        """
        import threading, time, traceback
        from pathlib import Path
        def wait_for_file(path):
            while not Path(path).exists():
                time.sleep(0.01)
            return path
        def tell_when_it_waits(thread=threading.get_ident()):
            while "results" not in [frame.name for frame in traceback.extract_stack(sys._current_frames()[thread])]:
                time.sleep(0.01)
            print("waits", flush=True)
        job = queue.map(wait_for_file, [sys.argv[1]], name="interrupted")
        threading.Thread(target=tell_when_it_waits).start()
        try:
            job.results(30)
        except KeyboardInterrupt as exc:
            print(type(exc).__name__, job.state, queue.submit(abs, -1).result(30), exc, flush=True)
        """,
        str(gate),
    )
    assert program.stdout.readline() == "waits\n"  # type: ignore[union-attr]
    program.send_signal(signal.SIGINT)
    output, errors = program.communicate(timeout=LIMIT)
    assert output.startswith("JobInterrupt running 1 job 'interrupted' goes on: end it with job.cancel()"), errors
    gate.touch()
    assert queue.job("interrupted").results(LIMIT) == [str(gate)]


def test_job_that_is_not_there_is_not_found(queue: Queue) -> None:
    with pytest.raises(JobNotFoundError, match=r"no job 'nothing'.*queue\.jobs\(\)") as caught:
        queue.job("nothing")
    assert isinstance(caught.value, LookupError)

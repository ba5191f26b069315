"""The card: three forms of a snapshot, and a display that is kept up to date until the job ends."""

from __future__ import annotations

import asyncio
import importlib.util
import io
import json
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import comm
import nbformat
import pytest
from comm.base_comm import BaseComm
from fake_job import FakeJob, FakeQueue, group
from nbclient import NotebookClient

from yadtq_nb.errors import WorkbenchError
from yadtq_nb.model import JobState, Progress, RunningTask
from yadtq_nb.notebook import live, markup, words
from yadtq_nb.notebook.card import parts
from yadtq_nb.notebook.follow import follow
from yadtq_nb.notebook.live import JobCard, display_job, display_queue
from yadtq_nb.notebook.markup import as_html, styles
from yadtq_nb.notebook.snapshot import has_ended, plain, plain_block, queue_snapshot, snapshot
from yadtq_nb.notebook.text import as_text, queue_text
from yadtq_nb.notebook.words import SEGMENTS

WIDGET = "application/vnd.jupyter.widget-view+json"
STATE = "application/vnd.jupyter.widget-state+json"
HOSTILE = "<img src=x onerror=alert(1)>\x1b[31m \u202eevil"


# --- Snapshot and its static forms ------------------------------------------------------------------------------------


def test_snapshot_of_200_workers_is_small_and_shows_those_in_trouble() -> None:
    job = FakeJob(workers=200)
    shown = snapshot(job)
    assert len(shown["workers"]) == 50
    assert shown["more_workers"] == {"count": 150, "slots": 300, "busy": 300}
    assert shown["fleet"]["live"] == 200
    assert len(json.dumps(parts(shown))) < 5_000
    job.gone = {150}
    assert [row["status"] for row in snapshot(job)["workers"]].count("lost") == 1


def test_snapshot_knows_the_end_only_when_nothing_runs_any_more() -> None:
    running = Progress(0, 1, 5, 0, 0, 6, 1.0, None, 5.0)
    over = Progress(0, 0, 6, 0, 0, 6, 1.0, None, 5.0)
    assert not has_ended(JobState.INCOMPLETE, running)
    assert has_ended(JobState.INCOMPLETE, over)
    assert not has_ended(JobState.RUNNING, over)


def test_text_says_state_counts_workers_and_errors() -> None:
    job = FakeJob(errors=(group("ValueError", "bad"),))
    job.slowest = (RunningTask(job.id, 7, 62.0),)
    job.step(succeeded=60, failed=1)
    text = as_text(snapshot(job))
    for part in (
        "sweep  running  61 of 100",
        "60 succeeded",
        "1 failed",
        "4 running",
        "35 queued",
        "5.0/s",
        "7.8 s to go",
    ):
        assert part in text
    assert "node-000 w-000  2 of 2 slots busy  0 done · CPU 99 % · 123 MB  heartbeat 0 s ago" in text
    assert "… task 7 · 1 min 02 s on w-000" in text
    assert "! 1 × ValueError (cell, line 3): bad" in text


def test_bar_shows_one_failure_among_a_million() -> None:
    job = FakeJob(1_000_000)
    job.step(succeeded=999_999, failed=1)
    line = as_text(snapshot(job)).splitlines()[1].split()[0]
    assert len(line) == 40
    assert line.count("▚") == 1


def test_text_of_an_empty_job_is_a_full_bar() -> None:
    text = as_text(snapshot(FakeJob(0)))
    assert "succeeded  0 of 0" in text
    assert "█" * 40 in text


class _Elements(HTMLParser):
    """Collects tags and text."""

    def __init__(self, markup: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: set[str] = set()
        self.text = ""
        self.feed(markup)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_data(self, data: str) -> None:
        self.text += data


def test_markup_in_names_and_errors_is_text() -> None:
    script = "<script>alert(1)</script>"
    job = FakeJob(name=HOSTILE, errors=(group(script, script, place=script, traceback=script),))
    job.step(failed=1)
    for form in (as_html(snapshot(job)), as_html(queue_snapshot(FakeQueue(job, name=HOSTILE)))):
        found = _Elements(form)
        assert set(found.tags) <= {"div", "span", "details", "summary", "pre"}
        assert found.attributes <= {"style", "title", "role", "aria-label", "open"}
        assert "<img src=x onerror=alert(1)>" in found.text
    assert as_html(snapshot(job)).count("&lt;script&gt;") == 4


def test_escape_sequences_and_signs_that_turn_the_writing_round_are_made_visible() -> None:
    shown = plain(HOSTILE)
    assert "\x1b" not in shown
    assert "\u202e" not in shown
    assert plain("a\n  b") == "a b"
    assert len(plain("x" * 10_000, 80)) == 80


def test_card_script_never_sets_markup() -> None:
    script = (Path(live.__file__).parent / "static" / "card.js").read_text()
    assert "textContent" in script
    for danger in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval("):
        assert danger not in script


def test_static_form_has_the_style_of_every_class_that_it_uses() -> None:
    job = FakeJob(workers=60, errors=(group("ValueError", "bad"),))
    job.step(succeeded=50, failed=1)
    assert 'style="' in as_html(snapshot(job))
    source = Path(markup.__file__).read_text()
    used = {name for names in re.findall(r'_element\([^"\n]*"\w+", "([\w -]+)"', source) for name in names.split()}
    assert len(used) > 20
    # These only name what they are.
    assert used - set(styles()) == {"number"}
    sheet = (Path(markup.__file__).parent / "static" / "card.css").read_text()
    assert len(markup._RULE.findall(sheet)) == len(styles())
    for kind in [*SEGMENTS, *JobState, "live", "stopping"]:
        assert f"fill-{kind}" in styles()


def test_import_of_the_package_brings_no_widget_and_no_pandas() -> None:
    code = "import sys, yadtq_nb; print([name for name in ('anywidget', 'pandas', 'IPython') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


# --- The live card, against a comm that only records ------------------------------------------------------------------


class _RecordingComm(BaseComm):
    """A comm whose messages stay here."""

    def __init__(self, **arguments: Any) -> None:
        self.sent: list[dict[str, Any]] = []
        self.opened: dict[str, Any] = {}
        super().__init__(**arguments)

    def publish_msg(self, msg_type: str, data: Any = None, *_: Any, **__: Any) -> None:
        if msg_type == "comm_open":
            self.opened = data["state"]
        elif msg_type == "comm_msg":
            self.sent.append(data["state"])


class _Stage:
    """Where displays and widget messages end up."""

    def __init__(self) -> None:
        self.displays: list[tuple[str, bool, dict[str, Any]]] = []
        self.comms: list[_RecordingComm] = []

    def publish(self, data: dict[str, Any], _metadata: object, display_id: str, *, update: bool = False) -> None:
        self.displays.append((display_id, update, data))

    def create_comm(self, **arguments: Any) -> _RecordingComm:
        self.comms.append(_RecordingComm(**arguments))
        return self.comms[-1]

    def sent(self, trait: str) -> list[dict[str, Any]]:
        return [state[trait] for state in self.comms[-1].sent if trait in state]


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch) -> Iterator[_Stage]:
    made = _Stage()
    monkeypatch.setattr(live, "_publish", made.publish)
    monkeypatch.setattr(live, "_in_kernel", lambda: True)
    monkeypatch.setattr(comm, "create_comm", made.create_comm)
    yield made
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("yadtq-card")]


def _show(job: FakeJob) -> JobCard:
    card = display_job(job)
    assert card is not None
    return card


def test_display_is_one_bundle_of_widget_html_and_text(stage: _Stage) -> None:
    card = _show(FakeJob())
    ((_, update, data),) = stage.displays
    assert set(data) == {WIDGET, "text/html", "text/plain"}
    assert not update
    card.stop()


def test_only_changes_are_sent(stage: _Stage) -> None:
    job = FakeJob()
    card = _show(job)
    job.wait_for_looks(4)
    still = len(stage.comms[-1].sent)
    job.step(succeeded=1)
    job.wait_for_looks(2)
    card.stop()
    # Nothing of this job's clocks moves either, so that a job at rest costs not one message.
    assert still == 0
    assert [shown["counts"]["succeeded"] for shown in stage.sent("snapshot")] == [1]
    assert stage.sent("beats") == []


def test_heartbeats_alone_are_sent_at_most_once_a_second(stage: _Stage) -> None:
    job = FakeJob()
    card = _show(job)
    for _ in range(7):
        job.age += 0.1
        job.wait_for_looks(1)
    card.stop()
    assert 1 <= len(stage.sent("beats")) <= 3
    assert stage.sent("snapshot") == []
    assert stage.sent("roster") == []


def test_end_is_sent_at_once_and_the_display_loses_its_widget(stage: _Stage) -> None:
    job = FakeJob()
    card = _show(job)
    job.step(succeeded=100)
    card._thread.join(5.0)
    assert not card.is_alive()
    (first, _, _), (last, update, data) = stage.displays
    assert (first, update) == (last, True)
    assert set(data) == {"text/html", "text/plain"}
    assert "100 of 100" in data["text/plain"]
    assert stage.sent("snapshot")[-1]["ended"]


def test_nothing_is_sent_after_the_end(stage: _Stage) -> None:
    job = FakeJob()
    card = _show(job)
    job.step(succeeded=100)
    card._thread.join(5.0)
    looks, sent, displays = job.looks, len(stage.comms[-1].sent), len(stage.displays)
    threading.Event().wait(2 * live.INTERVAL)
    assert (job.looks, len(stage.comms[-1].sent), len(stage.displays)) == (looks, sent, displays)


def test_thread_ends_when_the_front_end_closes_the_comm(stage: _Stage) -> None:
    job = FakeJob()
    card = _show(job)
    stage.comms[-1].handle_close({})
    card._thread.join(5.0)
    assert not card._thread.is_alive()
    assert len(stage.displays) == 1


def test_thread_ends_when_the_widget_is_closed_here(stage: _Stage) -> None:
    card = _show(FakeJob())
    card._card.close()
    card._thread.join(5.0)
    assert not card._thread.is_alive()


def test_second_display_of_a_job_is_a_second_view_of_the_same_card(stage: _Stage) -> None:
    job = FakeJob()
    card = _show(job)
    before = len(stage.comms)
    assert display_job(job, card) is card
    assert len(stage.comms) == before
    job.step(succeeded=100)
    card._thread.join(5.0)
    (one, _, _), (two, _, _), *ends = stage.displays
    assert one != two
    assert {display_id for display_id, update, _ in ends if update} == {one, two}


def test_ended_job_is_displayed_without_widget_and_thread(stage: _Stage) -> None:
    job = FakeJob()
    job.step(succeeded=99, failed=1)
    assert display_job(job) is None
    ((_, _, data),) = stage.displays
    assert set(data) == {"text/html", "text/plain"}
    assert not stage.comms


def test_card_says_when_the_job_cannot_be_read_and_recovers(stage: _Stage) -> None:
    job = FakeJob()
    card = _show(job)
    job.broken = WorkbenchError("Redis at localhost:6379 does not answer")
    while not stage.sent("snapshot"):
        threading.Event().wait(0.05)
    assert "does not answer" in stage.sent("snapshot")[-1]["note"]
    job.broken = None
    job.step(succeeded=100)
    card._thread.join(5.0)
    assert stage.sent("snapshot")[-1]["note"] == ""
    assert stage.sent("snapshot")[-1]["ended"]


# --- Buttons, errors, and the card of a queue -------------------------------------------------------------------------


def _press(stage: _Stage, asked: str, number: int) -> dict[str, Any]:
    stage.comms[-1].handle_msg(
        {"content": {"data": {"method": "custom", "content": {"do": asked, "number": number}}}, "buffers": []}
    )
    until = time.monotonic() + 5.0
    while not (answers := stage.sent("answer")) or answers[-1]["number"] < number:
        assert time.monotonic() < until, "the card does not answer"
        threading.Event().wait(0.02)
    return answers[-1]


def test_buttons_cancel_and_retry_and_their_answer_is_a_trait(stage: _Stage) -> None:
    job = FakeJob()
    job.step(failed=3)
    card = _show(job)
    assert _press(stage, "retry", 1) == {"number": 1, "text": "3 tasks will run again"}
    assert _press(stage, "cancel", 2) == {"number": 2, "text": "100 tasks cancelled"}
    card._thread.join(5.0)
    assert job.asked == ["retry", "cancel"]


def test_button_whose_deed_fails_says_why(stage: _Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    def cancel(self: FakeJob) -> int:
        raise WorkbenchError("Redis does not answer")

    monkeypatch.setattr(FakeJob, "cancel", cancel)
    card = _show(FakeJob())
    assert _press(stage, "cancel", 1)["text"] == "cancel failed: Redis does not answer"
    assert _press(stage, "format the disk", 2)["text"] == ""
    card.stop()


def test_retry_is_offered_only_when_it_can_do_something(stage: _Stage) -> None:
    job = FakeJob()
    card = _show(job)
    job.retryable = 5
    job.wait_for_looks(2)
    card.stop()
    assert [shown["retryable"] for shown in stage.sent("snapshot")] == [5]


def test_failing_task_never_stops_the_card(stage: _Stage) -> None:
    job = FakeJob()
    card = _show(job)
    job.errors = (group("ValueError", "bad", 5),)
    job.step(failed=5)
    job.wait_for_looks(2)
    job.step(succeeded=95)
    card._thread.join(5.0)
    assert stage.sent("snapshot")[-1]["counts"]["succeeded"] == 95
    assert stage.sent("errors")[-1][0]["count"] == 5


def test_traceback_is_sent_once_and_counts_alone_after_it(stage: _Stage) -> None:
    job = FakeJob(errors=(group("ValueError", "bad", traceback="x" * 5_000),))
    job.step(failed=1)
    card = _show(job)
    for count in range(2, 6):
        job.errors = (group("ValueError", "bad", count, traceback="x" * 5_000),)
        job.step(failed=1)
        job.wait_for_looks(2)
    card.stop()
    assert stage.sent("errors")
    assert stage.sent("tracebacks") == []
    (traceback,) = stage.comms[-1].opened["tracebacks"].values()
    assert len(traceback) < 3_100


def test_worker_that_is_lost_is_sent_at_once(stage: _Stage) -> None:
    job = FakeJob()
    card = _show(job)
    job.gone = {1}
    job.wait_for_looks(2)
    card.stop()
    assert [row[3] for row in stage.sent("roster")[-1]] == ["live", "lost"]
    assert len(stage.sent("beats")[-1]["rows"]) == 2


def test_widget_of_a_page_that_was_loaded_again_is_not_closed_at_the_end(stage: _Stage) -> None:
    job = FakeJob()
    card = _show(job)
    for _ in range(2):
        seen = {"method": "custom", "content": {"do": "seen", "first": True}}
        stage.comms[-1].handle_msg({"content": {"data": seen}, "buffers": []})
    job.step(succeeded=100)
    card._thread.join(5.0)
    card._cell_ends()
    assert card._card.comm is not None
    card._card.close()


def test_queue_is_one_bundle_and_goes_on_until_it_is_quiet(stage: _Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "QUEUE_INTERVAL", 0.05)
    monkeypatch.setattr(live, "QUIET", 0.3)
    job = FakeJob()
    card = display_queue(FakeQueue(job))
    assert card is not None
    ((_, _, data),) = stage.displays
    assert set(data) == {WIDGET, "text/html", "text/plain"}
    threading.Event().wait(0.6)
    assert card.is_alive()
    job.step(succeeded=100)
    card._thread.join(5.0)
    assert not card._thread.is_alive()
    _, update, data = stage.displays[-1]
    assert update
    assert set(data) == {"text/html", "text/plain"}
    assert stage.sent("jobs")[-1][0]["state"] == "succeeded"


def test_text_of_a_queue_has_its_workers_and_jobs() -> None:
    queue = FakeQueue(FakeJob(), FakeJob(name="short"))
    queue.more = 7
    text = queue_text(queue_snapshot(queue))
    for part in ("queue default  2 workers · 4 of 4 slots busy", "node-001", "sweep  ", "short  ", "and 7 jobs more"):
        assert part in text


def test_traceback_keeps_its_lines_and_nothing_that_a_terminal_obeys() -> None:
    shown = plain_block("Traceback\n\tFile\n\x1b[31mValueError: \u202eevil")
    assert shown.splitlines()[0] == "Traceback"
    assert "\x1b" not in shown
    assert "\u202e" not in shown
    assert plain_block("first\n" + "x" * 9_000 + "\nlast").splitlines()[-1] == "last"


def test_what_a_job_with_failures_offers_stands_in_its_static_form() -> None:
    job = FakeJob(errors=(group("ValueError", "bad", 2),))
    job.step(succeeded=98, failed=2)
    job.retryable = 2
    assert "job.retry() runs 2 tasks again" in as_html(snapshot(job))
    assert "job.retry() runs 2 tasks again" in as_text(snapshot(job))
    assert "<pre" in as_html(snapshot(job))


# --- Without a front end ----------------------------------------------------------------------------------------------


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_log_gets_a_line_now_and_then_and_the_end() -> None:
    job, log = FakeJob(errors=(group("ValueError", "bad"),)), io.StringIO()
    for delay in (0.3, 0.6, 0.9):
        threading.Timer(delay, lambda: job.step(succeeded=33)).start()
    threading.Timer(1.2, lambda: job.step(failed=1)).start()
    assert follow(job, 10.0, log)
    first, last, *errors = log.getvalue().splitlines()
    assert first.startswith("sweep    0% ")
    assert "failed  100 of 100, 1 failed" in last
    assert errors[0] == "! 1 × ValueError (cell, line 3): bad"


def test_terminal_gets_one_line_that_is_written_over() -> None:
    job, terminal = FakeJob(), _Terminal()
    threading.Timer(0.7, lambda: job.step(succeeded=100)).start()
    assert follow(job, 10.0, terminal)
    assert terminal.getvalue().count("\n") == 1
    assert terminal.getvalue().count("\r") >= 3


def test_following_gives_up_in_time_and_the_job_goes_on() -> None:
    log = io.StringIO()
    assert not follow(FakeJob(), 0.2, log)
    assert "0 of 100" in log.getvalue()


# --- card.js ----------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(shutil.which("node") is None, reason="no node")
def test_script_says_the_same_words_as_python(tmp_path: Path) -> None:
    numbers = [0, 0.04, 0.5, 1, 9.94, 12, 59.4, 61, 99.96, 100, 3_725, 90_061, 1_234_567]
    script = tmp_path / "words.mjs"
    source = Path(live.__file__).parent / "static" / "card.js"
    (tmp_path / "card.mjs").write_text(source.read_text())
    script.write_text(
        "import { words } from './card.mjs';\n"
        f"const numbers = {json.dumps(numbers)};\n"
        "const of = (say) => numbers.map((number) => say(number));\n"
        "console.log(JSON.stringify([of(words.duration), of(words.rate), of(words.age),"
        " of((n) => words.memory(Math.floor(n)))]));"
    )
    said = subprocess.run(["node", script], capture_output=True, text=True, check=True).stdout
    expected = [[say(number) for number in numbers] for say in (words.duration, words.rate, words.age)]
    assert json.loads(said) == [*expected, [words.memory(int(number)) for number in numbers]]


# --- In a real kernel, through nbclient -------------------------------------------------------------------------------


class _Client(NotebookClient):
    """Reads nothing for a while between two cells."""

    pause_between = 0.0

    async def async_execute_cell(self, *arguments: Any, **named: Any) -> Any:
        done = await super().async_execute_cell(*arguments, **named)
        await asyncio.sleep(self.pause_between)
        return done


def _notebook(*cells: str) -> Any:
    here = Path(__file__).parent
    head = f"import sys, threading; sys.path[:0] = [{str(here)!r}, {str(here.parent)!r}]\n"
    shim = "FakeJob._ipython_display_ = lambda self: display_job(self) and None\n"
    head += "from fake_job import FakeJob, group\nfrom yadtq_nb.notebook.live import display_job\n" + shim
    return nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in (head, *cells)])


def _execute(*cells: str, pause: float = 0.0) -> Any:
    notebook = _notebook(*cells)
    client = _Client(notebook, timeout=60, kernel_name="python3")
    client.pause_between = pause
    return client.execute()


def _final_state(notebook: Any) -> dict[str, Any]:
    (card,) = [
        model["state"] for model in notebook.metadata.widgets[STATE]["state"].values() if "snapshot" in model["state"]
    ]
    return card


def _assert_shows_the_end(notebook: Any, cell: int = 1) -> None:
    (output,) = notebook.cells[cell].outputs
    assert output.output_type == "display_data"
    assert set(output.data) == {"text/html", "text/plain"}
    assert "succeeded  100 of 100" in output.data["text/plain"]
    assert "100 of 100" in output.data["text/html"]
    assert not any(later.outputs for later in notebook.cells[cell + 1 :])
    assert _final_state(notebook)["snapshot"]["ended"]
    assert _final_state(notebook)["snapshot"]["counts"]["succeeded"] == 100


def test_saved_notebook_has_the_end_in_html_text_and_widget_state() -> None:
    _assert_shows_the_end(
        _execute("job = FakeJob(); job", "job.step(succeeded=40)", "job.step(succeeded=60); job.wait()\nNone")
    )


def test_cell_that_waited_for_the_job_does_not_end_before_its_card() -> None:
    late = "threading.Timer(0.5, lambda: job.step(succeeded=100)).start()"
    _assert_shows_the_end(_execute("job = FakeJob(); job", f"job.delay = 0.3\n{late}\nassert job.wait(10)"))


def test_end_that_came_between_two_cells_is_sent_again_in_the_next() -> None:
    late = "job = FakeJob(); threading.Timer(0.4, lambda: job.step(succeeded=100)).start(); job"
    _assert_shows_the_end(_execute(late, "None", pause=1.2))


def test_job_displayed_and_still_running_is_saved_as_it_was() -> None:
    notebook = _execute("job = FakeJob(); job")
    (output,) = notebook.cells[1].outputs
    assert set(output.data) == {WIDGET, "text/html", "text/plain"}
    assert "as of" in output.data["text/html"]


def test_kernel_that_was_left_with_a_running_job_ends_quietly() -> None:
    notebook = _execute("job = FakeJob(); job", "import atexit; atexit.register(print, 'over')\nNone")
    assert not notebook.cells[2].outputs


def test_no_card_thread_and_no_widget_is_left_after_the_end() -> None:
    count = (
        "from ipywidgets.widgets.widget import _instances\n"
        "print([t.name for t in threading.enumerate() if 'yadtq' in t.name], len(_instances))\n"
        "callbacks = [each for some in get_ipython().events.callbacks.values() for each in some]\n"
        "print(sum('Card' in str(each) for each in callbacks))"
    )
    notebook = _execute("job = FakeJob(); job", "job.step(succeeded=100); job.wait()\nNone", count)
    assert notebook.cells[3].outputs[0].text == "[] 0\n0\n"


def test_terminal_shows_the_text_and_starts_nothing() -> None:
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from fake_job import FakeJob\nfrom yadtq_nb.notebook.live import display_job\n"
        "from IPython.core.interactiveshell import InteractiveShell\nInteractiveShell.instance()\n"
        "assert display_job(FakeJob()) is None\n"
    )
    command = [sys.executable, "-c", code, str(Path(__file__).parent)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent.parent)
    assert "sweep  running  0 of 100" in done.stdout


def test_queue_displayed_is_saved_as_it_was_in_html_and_widget_state() -> None:
    cell = (
        "from fake_job import FakeQueue\nfrom yadtq_nb.notebook.live import display_queue\n"
        "FakeQueue._ipython_display_ = lambda self: display_queue(self) and None\nFakeQueue(FakeJob())"
    )
    notebook = _execute(cell)
    (output,) = notebook.cells[1].outputs
    assert set(output.data) == {WIDGET, "text/html", "text/plain"}
    assert "as of" in output.data["text/html"]
    state = _final_state(notebook)
    assert [job["name"] for job in state["jobs"]] == ["sweep"]
    assert [row[3] for row in state["roster"]] == ["live", "live"]


@pytest.mark.skipif(importlib.util.find_spec("nbconvert") is None, reason="no nbconvert")
def test_page_made_by_nbconvert_shows_the_end(tmp_path: Path) -> None:
    notebook = _notebook("job = FakeJob(); job.errors = (group('ValueError', '<b>bad</b>'),); job")
    notebook.cells.append(nbformat.v4.new_code_cell("job.step(failed=1); job.step(succeeded=99); job.wait()\nNone"))
    nbformat.write(notebook, tmp_path / "run.ipynb")
    command = [sys.executable, "-m", "nbconvert", "--execute", "--to", "html", str(tmp_path / "run.ipynb")]
    subprocess.run(command, check=True, capture_output=True, timeout=100)
    page = (tmp_path / "run.html").read_text()
    assert "100 of 100" in page
    assert "1 × ValueError (cell, line 3)" in page
    assert "&lt;b&gt;bad&lt;/b&gt;" in page

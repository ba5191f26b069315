"""The command `yadtq`: arguments and printing only."""

from __future__ import annotations

import socket
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated
from urllib.parse import urlsplit, urlunsplit

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from yadtq_nb import config
from yadtq_nb.errors import ConfigError, YadtqError

if TYPE_CHECKING:
    from yadtq_nb.local import PartStatus, StackStatus

app = typer.Typer(
    help="A task queue for notebooks: run a function over many inputs on many machines.\n\n"
    "Without settings, commands are about the local stack of this user and Python environment. "
    "YADTQ_KAFKA, YADTQ_REDIS and YADTQ_SECRET, or yadtq.toml, name a cluster instead; users, passwords and "
    "certificates go into YADTQ_KAFKA_OPTIONS and YADTQ_REDIS_OPTIONS, as JSON objects, or into yadtq.toml.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
out = Console(highlight=False, soft_wrap=True)

#: Exit codes of `yadtq status`, as `systemctl status` has them.
_EXIT_CODES = {"up": 0, "broken": 1, "down": 3}
_COLOURS = {"up": "green", "starting": "yellow", "down": "dim", "broken": "red"}

Kafka = Annotated[
    str | None, typer.Option(help="Bootstrap servers, host:port.", metavar="HOST:PORT", show_default="YADTQ_KAFKA")
]
Redis = Annotated[str | None, typer.Option(help="URL of Redis or Valkey.", metavar="URL", show_default="YADTQ_REDIS")]
SecretFile = Annotated[
    Path | None,
    typer.Option(
        help="File with the queue's secret: an argument could be read by others.",
        exists=True,
        dir_okay=False,
        show_default="YADTQ_SECRET",
    ),
]
QueueName = Annotated[str, typer.Option("--queue", "-q", help="Name of the queue.", metavar="NAME")]


def main() -> None:
    """Run the command; an error of ours is one line, not a traceback."""
    try:
        app()
    except YadtqError as exc:
        Console(stderr=True, highlight=False, soft_wrap=True).print(f"[red]yadtq:[/] {escape(str(exc))}")
        raise SystemExit(1) from None


@app.callback()
def _yadtq(
    _: Annotated[
        bool,
        typer.Option("--version", help="Print the version and leave.", is_eager=True, callback=lambda v: _version(v)),
    ] = False,
) -> None:
    pass


@app.command(rich_help_panel="Local stack")
def up(queue: QueueName = "default") -> None:
    """Start the local stack, or what is missing of it."""
    from yadtq_nb import local

    settings = local.ensure_up(queue)
    out.print(f"The local stack is up: Kafka at {settings.kafka}, Redis at {shown(settings.redis)}")
    out.print(f"It serves {queue!r}. See it with [bold]yadtq status[/], end it with [bold]yadtq down[/].")


@app.command(rich_help_panel="Local stack")
def status() -> None:
    """Show the parts of the local stack. Exit code 0: up, 1: broken, 3: down."""
    from yadtq_nb import local

    seen = local.status()
    if seen.parts:
        out.print(_parts_table(seen))
    reason = f": {escape(seen.reason)}" if seen.reason else ""
    out.print(f"The local stack is [{_COLOURS[seen.state]}]{seen.state}[/]{reason}")
    out.print(f"Logs: {escape(seen.directory)}/logs", style="dim")
    raise typer.Exit(_EXIT_CODES[seen.state])


@app.command(rich_help_panel="Local stack")
def down() -> None:
    """End the local stack. Jobs and results stay on disk."""
    from yadtq_nb import local

    out.print("The local stack has ended." if local.down() else "There was no local stack.")


@app.command(rich_help_panel="Cluster")
def worker(
    slots: Annotated[int, typer.Option("--slots", "-s", help="Tasks at a time; 0 for one a core.", min=0)] = 0,
    queue: QueueName = "default",
    kafka: Kafka = None,
    redis: Redis = None,
    secret_file: SecretFile = None,
    memory_limit: Annotated[
        str | None,
        typer.Option(
            help="What a slot may use, with all that its task has started, such as 2G: over it, it is stopped, and its "
            "task is charged with a crash.",
            metavar="SIZE",
            show_default="no limit",
        ),
    ] = None,
    max_tasks_per_slot: Annotated[
        int | None,
        typer.Option(
            help="A slot that has run so many tasks is replaced by a fresh one: against what leaks.",
            metavar="N",
            min=1,
            show_default="no limit",
        ),
    ] = None,
) -> None:
    """Run a worker node until Ctrl-C or SIGTERM."""
    from yadtq_nb.local.stack import cores
    from yadtq_nb.worker import logs
    from yadtq_nb.worker.node import serve

    settings, limit = _settings(kafka, redis, secret_file), config.parse_memory_limit(memory_limit)
    slots = slots or cores()
    logs.set_up()
    out.print(f"Worker of queue [bold]{escape(queue)}[/] with {slots} slots")
    out.print(f"  Kafka  {escape(settings.kafka)}")
    out.print(f"  Redis  {escape(shown(settings.redis))}")
    serve(
        settings,
        queue=queue,
        slots=slots,
        memory_limit=limit,
        max_tasks_per_slot=max_tasks_per_slot,
        ready=lambda node: out.print(f"Ready as {escape(node.id)}"),
    )


@app.command(rich_help_panel="Queue")
def jobs(
    queue: QueueName = "default",
    kafka: Kafka = None,
    redis: Redis = None,
    secret_file: SecretFile = None,
    limit: Annotated[int, typer.Option(help="How many, newest first.")] = 20,
) -> None:
    """List the jobs of a queue."""
    from yadtq_nb import Queue

    with Queue(queue, kafka=kafka, redis=redis, secret=_secret(secret_file)) as opened:
        table = opened.jobs().reset_index()[["job", "state", "total", "succeeded", "failed", "created", "id"]]
        _print_frame(table.head(limit).to_string(index=False), empty="No jobs.")


@app.command(rich_help_panel="Queue")
def follow(
    job: Annotated[str, typer.Argument(help="Name or id of the job.")],
    queue: QueueName = "default",
    kafka: Kafka = None,
    redis: Redis = None,
    secret_file: SecretFile = None,
) -> None:
    """Show a job's progress until it has ended; exit code 1 if it has not succeeded."""
    from yadtq_nb import Queue

    with Queue(queue, kafka=kafka, redis=redis, secret=_secret(secret_file)) as opened:
        found = opened.job(job)
        found.follow()
        if found.state != "succeeded":
            raise typer.Exit(1)


@app.command(rich_help_panel="Queue")
def workers(
    queue: QueueName = "default",
    kafka: Kafka = None,
    redis: Redis = None,
    secret_file: SecretFile = None,
    here: Annotated[bool, typer.Option("--here", help="Exit with 1 unless a worker of this host is live.")] = False,
) -> None:
    """List the worker nodes of a queue, lost ones included."""
    from yadtq_nb import Queue

    with Queue(queue, kafka=kafka, redis=redis, secret=_secret(secret_file)) as opened:
        frame = opened.workers().reset_index()
        columns = ["worker", "status", "slots", "busy", "done", "heartbeat_age", "host", "pid"]
        _print_frame(frame[columns].to_string(index=False), empty="No workers.")
    if here and not ((frame["status"] == "live") & (frame["host"] == socket.gethostname())).any():
        raise typer.Exit(1)


@app.command(rich_help_panel="Queue")
def dead(
    queue: QueueName = "default",
    kafka: Kafka = None,
    redis: Redis = None,
    secret_file: SecretFile = None,
    limit: Annotated[int, typer.Option(help="How many, newest first.")] = 20,
    json: Annotated[bool, typer.Option("--json", help="One JSON object a line, with all that is known.")] = False,
) -> None:
    """List the records that workers have refused: when, where from, why, how large, and of which job if known."""
    from yadtq_nb import Queue

    with Queue(queue, kafka=kafka, redis=redis, secret=_secret(secret_file)) as opened:
        refused = opened.dead().head(limit)
    if json:
        text = refused.to_json(orient="records", lines=True, date_format="iso", date_unit="s").strip()
        out.print(text, markup=False, end="\n" if text else "")
        return
    if refused.empty:
        out.print("Nothing was refused.")
        return
    table = Table("time", "partition", "offset", "bytes", "job", "reason", box=None, pad_edge=False)
    for row in refused.itertuples():
        place = [f"{row.time:%Y-%m-%d %H:%M:%S}", str(row.partition), str(row.offset), f"{row.size:,}"]
        table.add_row(*place, escape(str(row.job)), escape(f"{row.error}: {row.reason}"))
    out.print(table, soft_wrap=False)


def shown(url: str) -> str:
    """Return a URL with its password hidden."""
    parts = urlsplit(url)
    if parts.password is None:
        return url
    host = parts.netloc.rpartition("@")[2]
    return urlunsplit(parts._replace(netloc=f"{parts.username or ''}:***@{host}"))


def _version(wanted: bool) -> None:
    if wanted:
        out.print(f"yadtq-nb {version('yadtq-nb')}")
        raise typer.Exit


def _settings(kafka: str | None, redis: str | None, secret_file: Path | None) -> config.Config:
    settings = config.load(kafka=kafka, redis=redis, secret=_secret(secret_file))
    if settings is None:
        raise ConfigError(
            "no servers are named: give --kafka and --redis, YADTQ_KAFKA and YADTQ_REDIS, or yadtq.toml; "
            "the local stack has workers of its own: yadtq up"
        )
    return settings


def _secret(file: Path | None) -> str | None:
    return file.read_text().strip() if file else None


def _print_frame(text: str, *, empty: str) -> None:
    out.print(escape(empty if text.startswith("Empty DataFrame") else text), no_wrap=True)


def _parts_table(seen: StackStatus) -> Table:
    table = Table("part", "pid", "port", "state", "uptime", "restarts", "serves", box=None, pad_edge=False)
    for part in seen.parts:
        table.add_row(*_part_row(part))
    return table


def _part_row(part: PartStatus) -> list[str]:
    state = f"[{_COLOURS.get(part.state, 'red')}]{part.state}[/]"
    restarts = f"{part.restarts}, last by {part.last_exit}" if part.restarts else part.last_exit
    serves = f"{part.queue}, {part.slots} slots" if part.queue else ""
    return [
        part.name,
        str(part.pid or ""),
        str(part.port or ""),
        state,
        "" if part.uptime is None else duration(part.uptime),
        restarts,
        escape(serves),
    ]


def duration(seconds: float) -> str:
    """Return seconds as people write them: 12 s, 3 min 20 s, 2 h 5 min."""
    whole = int(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


if __name__ == "__main__":
    main()

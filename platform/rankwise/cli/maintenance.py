"""`rankwise sync`, `gc`, `db`, `doctor` and `ui`: keep the stores consistent, small and healthy, and look at them."""

from __future__ import annotations

import re
import signal
from collections import Counter
from collections.abc import Sequence
from types import FrameType

import click
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from rankwise import __version__
from rankwise.cli.output import Bars, note, print_json, print_table, show, waiting
from rankwise.doctor.checks import CHECKS, run_checks, worst_state
from rankwise.doctor.finding import HealthFinding, HealthState
from rankwise.exceptions import TrackingError
from rankwise.files import format_size
from rankwise.jobs.database import current_revision, open_engine, upgrade
from rankwise.jobs.queries import check as check_database
from rankwise.jobs.queries import shown
from rankwise.jobs.store import JobStore
from rankwise.settings import Settings


@click.command()
@click.option(
    "--timeout",
    type=click.FloatRange(min=0),
    default=300.0,
    show_default=True,
    help="Maximum seconds to deliver the outbox.",
)
@click.option(
    "--forget-missing",
    is_flag=True,
    help="Cancel succeeded jobs whose results are missing: `run` repeats them.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def sync(timeout: float, forget_missing: bool, as_json: bool) -> int:
    """Deliver pending data to MLflow, finish sweeps, and remove model versions that are not the result of a job.

    Metrics, parameters, texts and files that could not be sent are kept in the outbox of RANKWISE_HOME, including those
    of dead processes; each is delivered once, with its original timestamp. Then the run, the model and the version of
    every succeeded job are looked for. Exit code 1: something is still pending, is missing, or needs attention. Exit
    code 3: MLflow does not answer.
    """
    # Late: MLflow takes seconds to import.
    from rankwise.tasks.context import open_context
    from rankwise.tasks.missing_results import describe_missing
    from rankwise.tasks.sync import synchronize

    settings = Settings.load()
    with Bars(Console(stderr=True, highlight=False)) as bars, open_context(settings, bars) as context:
        synced = synchronize(context, timeout=timeout, forget_missing=forget_missing)
    code = TrackingError.exit_code if synced.error else 0 if synced.complete else 1
    if as_json:
        print_json(synced.to_json())
        return code
    for run_id in synced.outbox.delivered:
        click.echo(f"delivered: run {run_id}")
    for uri in synced.removed:
        click.echo(f"removed: {uri}, registered twice")
    for run_id, status in synced.ended.items():
        click.echo(f"ended: run {run_id} is now {status}, like its job")
    for run_id in synced.finished:
        click.echo(f"finished: the sweep of run {run_id} has its comparison")
    for run_id, reason in synced.outbox.waiting.items():
        note(f"pending: run {run_id}: {reason}")
    for uri, reason in synced.kept.items():
        note(f"kept: {uri}: {reason}")
    for problem in (*synced.outbox.problems, *synced.refused):
        note(f"needs attention: {problem}")
    for line in describe_missing(synced.missing, settings):
        note(f"missing: {line}")
    if synced.forgotten:
        names = ", ".join(sorted({job.experiment for job in synced.forgotten}))
        click.echo(f"forgotten: {len(synced.forgotten)} jobs of {names}; `rankwise run FILE` repeats them")
    if synced.error:
        note(f"error: {synced.error}")
    if synced.complete:
        note("MLflow is up to date")
    return code


_SECONDS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86_400}


class _Duration(click.ParamType[float]):
    """A duration such as `14d`, `12h`, `30m`, `90s` or `0`, in seconds."""

    name = "DURATION"

    def convert(self, value: object, param: click.Parameter | None, context: click.Context | None) -> float:
        if isinstance(value, int | float):
            return float(value)
        match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)([smhd]?)", str(value))
        if match is None:
            self.fail(f"{value!r} is not a duration; write 14d, 12h, 30m or 90s", param, context)
        return float(match[1]) * _SECONDS[match[2]]


@click.command()
@click.option("--dry-run", is_flag=True, help="Only print what would be removed.")
@click.option(
    "--older-than", type=_Duration(), default="14d", show_default=True, help="Only what was unused for this long."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def gc(dry_run: bool, older_than: float, as_json: bool) -> None:
    """Remove checkpoints, states, models, outboxes, logs and caches that no job needs.

    Nothing that a queued or running job needs is removed, nor any registered version. RANKWISE_CACHE may be shared with
    other homes whose jobs are unknown here, so its entries are removed by age only. Bases are kept (see `rankwise bases
    prune`).
    """
    # Late: MLflow takes seconds to import.
    from rankwise.tasks.gc import find_garbage, remove_garbage
    from rankwise.tracking.store import Store

    settings = Settings.load()
    queue = JobStore(settings.database_url, lock=settings.home / "queue.lock")
    try:
        with Store.open(settings) as store:
            garbage = find_garbage(store, queue, settings, older_than=older_than)
            items = list(garbage.items) if dry_run else remove_garbage(garbage.items, queue)
    finally:
        queue.close()
    total = sum(item.bytes for item in items)
    for problem in garbage.problems:
        note(f"warning: {problem}")
    if as_json:
        print_json(
            {
                "dry_run": dry_run,
                "bytes": total,
                "items": [item.to_json() for item in items],
                "problems": list(garbage.problems),
            }
        )
        return
    if items:
        table = Table(box=None, pad_edge=False)
        for column in ("kind", "size", "what", "why"):
            table.add_column(column, justify="right" if column == "size" else "left", overflow="fold")
        for item in items:
            table.add_row(item.kind, format_size(item.bytes), item.name, item.reason)
        print_table(table)
    note(f"{'would free' if dry_run else 'freed'} {format_size(total)} in {len(items)} entries")


ENVIRONMENT = 3


@click.group()
def db() -> None:
    """Check and upgrade the queue's database."""


@db.command("upgrade")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def upgrade_database(as_json: bool) -> None:
    """Create the database, or upgrade it to this release's revision.

    `submit`, `run` and `worker` do so too. A database of a newer release is refused.
    """
    settings = Settings.load()
    engine = open_engine(settings.database_url)
    try:
        before = current_revision(engine)
        upgrade(engine, settings.home / "queue.lock")
        after = current_revision(engine)
    finally:
        engine.dispose()
    if as_json:
        print_json({"url": shown(settings.database_url), "before": before, "after": after})
    elif before == after:
        note(f"{shown(settings.database_url)} is already at revision {after}")
    else:
        note(f"{shown(settings.database_url)}: revision {before or 'none'} -> {after}")


@db.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def check(as_json: bool) -> int:
    """Check that the database is reachable, has this release's revision, and is consistent. Exit code 3 if not."""
    health = check_database(Settings.load().database_url)
    if as_json:
        print_json(health.to_json())
    for problem in health.problems:
        note(problem)
    if not health.problems and not as_json:
        note(f"{health.url}: revision {health.revision}, {health.jobs} jobs, no problems")
    return ENVIRONMENT if health.problems else 0


_MARKS = {
    HealthState.OK: ("✓", "green"),
    HealthState.SKIPPED: ("-", "dim"),
    HealthState.WARNING: ("!", "yellow"),
    HealthState.PROBLEM: ("✗", "bold red"),
}


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def doctor(as_json: bool) -> int:
    """Check this machine, the queue, MLflow, its artifact store, the hub and Ray, and report what to fix.

    Exit code 1 if there is a problem; warnings do not count. One small artifact is written, read and deleted.
    """
    settings = Settings.load()
    if as_json:
        findings = run_checks(settings, CHECKS)
        print_json(
            {
                "rankwise": __version__,
                "state": str(worst_state(findings)),
                "findings": [finding.to_json() for finding in findings],
            }
        )
    else:
        with waiting("Checking ..."):
            findings = run_checks(settings, CHECKS)
        show(lambda console: _findings_table(findings))
    return 1 if worst_state(findings) is HealthState.PROBLEM else 0


def _findings_table(findings: Sequence[HealthFinding]) -> RenderableType:
    table = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for finding in findings:
        mark, style = _MARKS[finding.state]
        text = Text(finding.seen, style="dim" if finding.state is HealthState.SKIPPED else "")
        if finding.advice:
            text.append(f"\n→ {finding.advice}", style=style if style != "dim" else "")
        table.add_row(Text(mark, style=style), Text(finding.name, style=style), text)
    counts = Counter(finding.state for finding in findings)
    words = {
        HealthState.PROBLEM: "problem" if counts[HealthState.PROBLEM] == 1 else "problems",
        HealthState.WARNING: "warning" if counts[HealthState.WARNING] == 1 else "warnings",
        HealthState.OK: "ok",
        HealthState.SKIPPED: "skipped",
    }
    summary = ", ".join(f"{counts[state]} {word}" for state, word in words.items())
    return Group(table, Padding(Text(summary), (1, 0, 0, 0)))


_MAX_EXPERIMENTS = 10


@click.command()
@click.option("--port", default=5000, show_default=True, type=click.IntRange(0, 65535), help="0 takes a free port.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Interface to listen on.")
def ui(port: int, host: str) -> None:
    """Serve the MLflow UI on this project's store until Ctrl-C.

    There is no authentication: with another --host than loopback, everyone who reaches the port can read and change the
    store. MLFLOW_SERVER_ALLOWED_HOSTS lists the host names that browsers may use.
    """
    # Late: MLflow takes seconds to import.
    from rankwise.redact import redact
    from rankwise.tracking.connection import connect
    from rankwise.tracking.notes import latest_views
    from rankwise.tracking.server import is_remote, serve

    settings = Settings.load()
    console = Console(stderr=True)
    if is_remote(settings.tracking_uri):
        console.print("MLFLOW_TRACKING_URI is a server; its UI is at", highlight=False)
        click.echo(redact(settings.tracking_uri))
        return
    # A closed terminal and SIGTERM stop the server too.
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    try:
        status = console.status("Starting MLflow ...")
        status.start()
        try:
            client = connect(settings)
            with serve(settings, host, port) as server:
                status.stop()
                console.print("The MLflow UI is at the address below; Ctrl-C stops it.", highlight=False)
                click.echo(server.url)
                for name, route in latest_views(client, _MAX_EXPERIMENTS):
                    console.print(f"{name}: {server.url}/{route}", highlight=False, markup=False, soft_wrap=True)
                server.wait()
        finally:
            status.stop()
    except KeyboardInterrupt:
        console.print("The MLflow UI has stopped.", highlight=False)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt

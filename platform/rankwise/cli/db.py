"""`rankwise db`: the schema of the queue's database."""

from __future__ import annotations

import click

from rankwise.cli.output import note, print_json
from rankwise.jobs.database import current_revision, open_engine, upgrade
from rankwise.jobs.health import check as look_at
from rankwise.jobs.health import shown
from rankwise.settings import Settings

ENVIRONMENT = 3


@click.group()
def db() -> None:
    """Check and upgrade the queue's database."""


@db.command("upgrade")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def upgrade_database(as_json: bool) -> None:
    """Create the database, or bring one of an older release to this release's revision.

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
        note(f"{shown(settings.database_url)} is at revision {after} already")
    else:
        note(f"{shown(settings.database_url)}: revision {before or 'none'} -> {after}")


@db.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def check(as_json: bool) -> int:
    """Check that the database can be reached, has this release's revision, and is whole. Exit code 3 when not."""
    health = look_at(Settings.load().database_url)
    if as_json:
        print_json(health.to_json())
    for problem in health.problems:
        note(problem)
    if not health.problems and not as_json:
        note(f"{health.url}: revision {health.revision}, {health.jobs} jobs, nothing wrong")
    return ENVIRONMENT if health.problems else 0

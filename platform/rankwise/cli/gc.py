"""`rankwise gc`: remove what no job needs."""

from __future__ import annotations

import re

import click
from rich.table import Table

from rankwise.cli.output import note, print_json, print_table, size
from rankwise.jobs.sql_store import SqlJobStore
from rankwise.settings import Settings

_SECONDS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86_400}


class _Duration(click.ParamType[float]):
    """`14d`, `12h`, `30m`, `90s`, `0`; in seconds."""

    name = "DURATION"

    def convert(self, value: object, param: click.Parameter | None, context: click.Context | None) -> float:
        if isinstance(value, int | float):
            return float(value)
        match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)([smhd]?)", str(value))
        if match is None:
            self.fail(f"{value!r} is no duration; write 14d, 12h, 30m or 90s", param, context)
        return float(match[1]) * _SECONDS[match[2]]


@click.command()
@click.option("--dry-run", is_flag=True, help="Say what would be removed.")
@click.option(
    "--older-than", type=_Duration(), default="14d", show_default=True, help="Only what was not used for so long."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def gc(dry_run: bool, older_than: float, as_json: bool) -> None:
    """Remove checkpoints, states and models of arms that no job needs, delivered outboxes, old logs, and unused caches.

    Nothing that a queued or running job needs is touched; registered versions never are. The cache of RANKWISE_CACHE
    may serve other homes, whose jobs are not known here: there, only the age protects. Bases are left alone
    (`rankwise bases prune`).
    """
    # Late: MLflow takes seconds to import.
    from rankwise.tasks.gc import find_garbage, remove_garbage
    from rankwise.tracking.store import Store

    settings = Settings.load()
    queue = SqlJobStore(settings.database_url, lock=settings.home / "queue.lock")
    try:
        with Store.open(settings) as store:
            found = find_garbage(store, queue, settings, older_than=older_than)
            items = list(found.items) if dry_run else remove_garbage(found.items, queue)
    finally:
        queue.close()
    total = sum(item.bytes for item in items)
    for problem in found.problems:
        note(f"warning: {problem}")
    if as_json:
        print_json(
            {
                "dry_run": dry_run,
                "bytes": total,
                "items": [item.to_json() for item in items],
                "problems": list(found.problems),
            }
        )
        return
    if items:
        table = Table(box=None, pad_edge=False)
        for column in ("kind", "size", "what", "why"):
            table.add_column(column, justify="right" if column == "size" else "left", overflow="fold")
        for item in items:
            table.add_row(item.kind, size(item.bytes), item.name, item.reason)
        print_table(table)
    note(f"{'would free' if dry_run else 'freed'} {size(total)} in {len(items)} places")

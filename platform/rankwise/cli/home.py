"""`rankwise home`: the directory with all local data."""

from __future__ import annotations

import click

from rankwise.cli.output import note, print_json
from rankwise.settings import Settings


@click.group()
def home() -> None:
    """Maintain RANKWISE_HOME, the directory with all local data."""


@home.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def relocate(as_json: bool) -> None:
    """Rewrite the locations that MLflow stored, after RANKWISE_HOME was moved or copied.

    MLflow stores absolute paths of artifacts. Run this once in the new place, with no worker running. The database is
    backed up first. The old place, if it still exists, is not touched.
    """
    from rankwise.tracking.relocation import relocate as rewrite

    settings = Settings.load()
    locations, backup = rewrite(settings)
    if as_json:
        print_json(
            {
                "home": str(settings.home),
                "moved": {str(old): count for old, count in locations.moved.items()},
                "unknown": list(locations.unknown),
                "backup": None if backup is None else str(backup),
            }
        )
    for old, count in locations.moved.items():
        note(f"{count:,} locations in {old} are now in {settings.home}")
    if backup is not None:
        note(f"the database before the change: {backup}")
    if not locations.moved:
        note(f"no stored location of {settings.home} leads to an old place")
    for location in locations.unknown[:5]:
        note(f"outside of the home, and left as it is: {location}")
    if len(locations.unknown) > 5:
        note(f"and {len(locations.unknown) - 5:,} more outside of the home")

"""`rankwise promote` and `rankwise rollback`: an alias moves through the gate, and back."""

from __future__ import annotations

from pathlib import Path

import click
from rich.table import Table
from rich.text import Text

from rankwise.cli.output import note, print_json, print_table
from rankwise.settings import Settings

ALIAS = "champion"


@click.command()
@click.argument("name")
@click.option("--candidate", type=click.IntRange(min=1), required=True, metavar="VERSION", help="Who wants the alias.")
@click.option("--alias", default=ALIAS, show_default=True, help="Which alias moves.")
@click.option("--data", metavar="SOURCE", help="Rows to compare on; the definition's evaluation rows by default.")
@click.option("--limit", type=click.IntRange(min=1), help="Compare on no more rows than this.")
@click.option(
    "--experiment",
    "file",
    type=click.Path(path_type=Path),
    help="A definition with the rows and the `promotion:` to apply, in place of the recorded one.",
)
@click.option("--force", is_flag=True, help="Move the alias although the gate refuses; needs --reason.")
@click.option("--reason", help="Why; it is recorded.")
@click.option("--json", "as_json", is_flag=True, help="Print the decision as JSON.")
def promote(
    name: str,
    candidate: int,
    alias: str,
    data: str | None,
    limit: int | None,
    file: Path | None,
    force: bool,
    reason: str | None,
    as_json: bool,
) -> int:
    """Give a version of the registered model NAME the alias, if it is better beyond noise.

    The version is compared with the one that has the alias and with the bare base, example by example, on the same
    rows; `promotion:` in the definition says by how much it must be better and what may not get worse. Rows that it
    was trained on are left out. Exits with 1 when the gate refuses.
    """
    if force != (reason is not None):
        raise click.UsageError("--force and --reason go together")
    from rich.console import Console

    from rankwise.cli.progress import Bars

    with Bars(Console(stderr=True, highlight=False)) as bars:
        bars.say("starting ...")
        from rankwise.tasks.context import open_context
        from rankwise.tasks.promote import promote as through_the_gate
        from rankwise.tasks.setting import recorded_setting

        with open_context(Settings.load(), bars) as context:
            version = context.store.registry.resolve(f"models:/{name}/{candidate}").version
            assert version is not None, "a URI with a version names one"
            setting = recorded_setting(context, version.uri, file)
            done = through_the_gate(
                context, setting, version, alias=alias, data=data, limit=limit, force=reason if force else None
            )
    if as_json:
        print_json(done.to_json())
    elif done.decision is not None:
        shown = Table("", "condition", box=None)
        for check in done.decision.checks:
            shown.add_row(Text("holds", "green") if check.ok else Text("fails", "red"), Text(check.text))
        print_table(shown)
    if done.decision is None:
        note(f"{version.uri} is models:/{name}@{alias} already")
        return 0
    holder = "unset" if done.champion is None else f"version {done.champion.version}"
    if done.moved:
        how = "by force" if done.forced else "through the gate"
        note(f"models:/{name}@{alias} is version {candidate} now ({how}; it was {holder}); evidence: run {done.run_id}")
        return 0
    note(f"refused: models:/{name}@{alias} stays {holder}; evidence: run {done.run_id}")
    return 1


@click.command()
@click.argument("name")
@click.option("--alias", default=ALIAS, show_default=True, help="Which alias moves.")
@click.option("--reason", default="rolled back", show_default=True, help="Why; it is recorded.")
@click.option("--json", "as_json", is_flag=True, help="Print the move as JSON.")
def rollback(name: str, alias: str, reason: str, as_json: bool) -> None:
    """Undo the last move of an alias of the registered model NAME that still stands; again: the one before it."""
    from rich.console import Console

    from rankwise.cli.progress import Bars

    with Bars(Console(stderr=True, highlight=False)) as bars:
        from rankwise.tasks.context import open_context
        from rankwise.tasks.promote import rollback as undo

        with open_context(Settings.load(), bars) as context:
            before, after = undo(context, name, alias, reason=reason)
    if as_json:
        print_json({"name": name, "alias": alias, "from": before, "to": after})
    note(f"models:/{name}@{alias} is {'unset' if after is None else f'version {after}'} again; it was version {before}")

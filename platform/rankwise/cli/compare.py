"""`rankwise compare`: the arms of an experiment across ranks."""

from __future__ import annotations

import click

from rankwise.cli.output import print_json, show
from rankwise.settings import Settings


@click.command()
@click.argument("experiment")
@click.option("--all", "everything", is_flag=True, help="Also arms of earlier states of the definition.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON instead of a table.")
def compare(experiment: str, everything: bool, as_json: bool) -> None:
    """Compare the arms of EXPERIMENT (the `name:` of its definition) across ranks.

    Its arms are those of the sweep that was submitted last; --all takes those of earlier ones too.

    The table shows each configuration's place by the primary metric (mean over seeds), its size and cost, its metrics
    with their standard errors, and the bare base.
    """
    from rankwise.evaluation.gather import gather
    from rankwise.evaluation.table import comparison_view
    from rankwise.tracking.store import Store

    with Store.open(Settings.load()) as store:
        comparison = gather(store, experiment, everything=everything)
    if as_json:
        print_json(comparison.to_json())
    else:
        show(lambda console: comparison_view(comparison, console))

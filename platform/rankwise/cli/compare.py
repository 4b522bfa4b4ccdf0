"""`rankwise compare`: the arms of an experiment across ranks."""

from __future__ import annotations

import click

from rankwise.cli.output import print_json, show
from rankwise.cli.queue import open_queue
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
    from rankwise.tasks.waiting import with_waiting
    from rankwise.tracking.store import Store

    settings = Settings.load()
    with Store.open(settings) as store, open_queue(settings) as queue:
        comparison = with_waiting(store, queue, gather(store, experiment, everything=everything), everything=everything)
    if as_json:
        print_json(comparison.to_json())
    else:
        show(lambda console: comparison_view(comparison, console))

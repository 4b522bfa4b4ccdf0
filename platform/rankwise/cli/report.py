"""`rankwise report`: the comparison of an experiment as one HTML page."""

from __future__ import annotations

from pathlib import Path

import click

from rankwise import __version__
from rankwise.cli.output import note
from rankwise.cli.queue import with_waiting_arms
from rankwise.settings import Settings, write_atomically


@click.command()
@click.argument("experiment")
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), help="Where to write it [EXPERIMENT.html].")
@click.option("--all", "everything", is_flag=True, help="Also arms of earlier states of the definition.")
def report(experiment: str, output: Path | None, everything: bool) -> None:
    """Write the report of EXPERIMENT (the `name:` of its definition) as an HTML page, and print its path.

    The page needs no network and no server: it can be mailed. The sweep's run has the same page as `report.html`.
    """
    from rankwise.evaluation.gather import gather
    from rankwise.evaluation.report_make import report_page
    from rankwise.evaluation.report_page import headline
    from rankwise.evaluation.verdict import smallest_rank
    from rankwise.tracking.store import Store

    target = output or Path(f"{experiment.replace('/', '-')}.html")
    settings = Settings.load()
    with Store.open(settings) as store:
        gathered = gather(store, experiment, everything=everything)
        comparison = with_waiting_arms(settings, store, gathered, everything=everything)
        finding = smallest_rank(store, comparison)
        page = report_page(store, comparison, finding, command=f"rankwise report {experiment}", version=__version__)
    write_atomically(target, page.encode())
    note(headline(comparison, finding))
    click.echo(str(target))

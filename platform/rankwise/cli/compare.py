"""`rankwise compare` and `rankwise report`: an experiment's arms across ranks, as a table or an HTML page."""

from __future__ import annotations

from pathlib import Path

import click

from rankwise import __version__
from rankwise.cli.jobs import add_queued_arms
from rankwise.cli.output import note, print_json, show
from rankwise.files import write_atomically
from rankwise.settings import Settings


@click.command()
@click.argument("experiment")
@click.option("--all", "everything", is_flag=True, help="Include arms of earlier versions of the definition.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON instead of a table.")
@click.option("--csv", "as_csv", is_flag=True, help="Print one line of CSV for each arm instead of a table.")
def compare(experiment: str, everything: bool, as_json: bool, as_csv: bool) -> None:
    """Compare the arms of EXPERIMENT (the `name:` of its definition) across ranks.

    The first line is the answer: the smallest rank that is enough, compared with the largest one, with the margin and
    confidence of the definition's `answer` section. Without it, or with one seed, there is no statement about ranks.
    `rankwise report EXPERIMENT` has limits, plots and curves.

    By default only arms of the latest sweep are compared; --all adds those of earlier sweeps.

    The table shows each configuration's position by the primary metric (mean over seeds), its size and cost, its
    metrics with standard errors, and the bare base. If there are many configurations, it shows the best ones and the
    best of each rank; --csv and --json contain all.
    """
    if as_json and as_csv:
        raise click.UsageError("--json and --csv are mutually exclusive")
    from rankwise.evaluation.findings import findings
    from rankwise.evaluation.gather import gather
    from rankwise.report.comparison_output import comparison_csv, comparison_json, comparison_view
    from rankwise.tracking.store import Store

    settings = Settings.load()
    with Store.open(settings) as store:
        gathered = gather(store, experiment, everything=everything)
        comparison = add_queued_arms(settings, store, gathered, everything=everything)
        finding = None if as_csv else findings(store, comparison)
    if as_json:
        assert finding is not None, "only CSV has no findings"
        print_json(comparison_json(comparison, finding))
    elif finding is None:
        click.echo(comparison_csv(comparison), nl=False)
    else:
        show(lambda console: comparison_view(comparison, console, finding))


@click.command()
@click.argument("experiment")
@click.option(
    "--output", type=click.Path(dir_okay=False, path_type=Path), help="File to write. Default: EXPERIMENT.html."
)
@click.option("--all", "everything", is_flag=True, help="Include arms of earlier versions of the definition.")
def report(experiment: str, output: Path | None, everything: bool) -> None:
    """Write the report of EXPERIMENT (the `name:` of its definition) as an HTML page, and print its path.

    The page works offline, as a single file. The sweep's run has the same page as its artifact `report.html`.
    """
    from rankwise.evaluation.findings import findings
    from rankwise.evaluation.gather import gather
    from rankwise.report.page import report_page
    from rankwise.tracking.store import Store

    target = output or Path(f"{experiment.replace('/', '-')}.html")
    settings = Settings.load()
    with Store.open(settings) as store:
        gathered = gather(store, experiment, everything=everything)
        comparison = add_queued_arms(settings, store, gathered, everything=everything)
        finding = findings(store, comparison)
        page = report_page(store, comparison, finding, command=f"rankwise report {experiment}", version=__version__)
    write_atomically(target, page.encode(), shared=True)
    note(finding.answer.text)
    click.echo(str(target))

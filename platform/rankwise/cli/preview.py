"""`rankwise preview`: what the rows of a definition become, without training."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.console import Console

from rankwise.cli.experiment import definition
from rankwise.cli.output import Bars, note, print_json, show
from rankwise.experiment.experiment import load_experiment
from rankwise.files import write_atomically
from rankwise.settings import Settings

if TYPE_CHECKING:
    from rankwise.tasks.preview import Preview, Side

_BAR = 40


@click.command()
@definition
@click.option(
    "--rows", type=click.IntRange(min=0), default=3, show_default=True, help="Training rows of each source to show."
)
@click.option("--html", type=click.Path(dir_okay=False, path_type=Path), help="Also write the shown rows as a page.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def preview(file: Path, overrides: tuple[str, ...], rows: int, html: Path | None, as_json: bool) -> int:
    """Show what the rows of the experiment FILE become: prompts, tokens, and which of them are supervised.

    Reads all rows as a run does, with the base's tokenizer and without its weights: the format, what is left out or
    truncated and why, a histogram of the lengths, and the first rows token by token. Shown are the rows of the first
    arm. Exits with 2 if a run would refuse the data.
    """
    experiment = load_experiment(file, overrides)
    with Bars(Console(stderr=True, highlight=False)) as bars:
        bars.say("starting ...")
        # Late: transformers takes seconds to import.
        from rankwise.data.token_preview import render_html, render_terminal
        from rankwise.experiment.arm import ArmSpec
        from rankwise.tasks.preview import make_preview

        arm = ArmSpec.of(experiment.spec) if experiment.is_search else experiment.arms[0]
        made = make_preview(arm, Settings.load(), bars, rows=rows)
    encoded = [row for _, row in made.rows]
    if html is not None:
        write_atomically(html, render_html(encoded, made.tokenizer).encode(), shared=True)
        note(f"written: {html}")
    if as_json:
        print_json(made.to_json())
    else:
        click.echo(f"format: {made.format}")
        for name, side in made.sides.items():
            _print_side(name, side, made)
        show(lambda _: render_terminal(encoded, made.tokenizer))
    for finding in made.report.warnings:
        note(f"warning: {finding}")
    for finding in made.report.errors:
        note(f"error: {finding}")
    return 2 if made.report.errors else 0


def _print_side(name: str, side: Side, made: Preview) -> None:
    from rankwise.tasks.preview import histogram

    click.echo(
        f"{name}: {side.used:,} rows used, {sum(side.dropped.values()):,} left out, {side.truncated:,} truncated"
    )
    for label, source in side.sources.items():
        click.echo(
            f"  {label} ({source.format}): {source.used:,} used, {source.dropped:,} left out, "
            f"{source.truncated:,} truncated"
        )
    for reason, count in side.dropped.items():
        click.echo(f"  left out: {count:,} {reason}")
    if not len(side.lengths):
        return
    bars = histogram(side.lengths)
    most = max(count for _, _, count in bars)
    width = len(f"{bars[-1][1]:,}")
    click.echo(f"  tokens per row (training.max_length: {made.max_length:,})")
    for low, high, count in bars:
        click.echo(f"  {low:>{width},} to {high:>{width},}  {'█' * round(_BAR * count / most):<{_BAR}} {count:,}")

"""`rankwise run`: the whole way from a definition to a comparison, in this process."""

from __future__ import annotations

import shlex
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import click
from rich.console import Console

from rankwise.cli.output import print_json, show
from rankwise.cli.progress import Bars
from rankwise.experiment.loader import load_experiment, parse_experiment
from rankwise.settings import Settings

if TYPE_CHECKING:
    from rankwise.experiment.schema import ExperimentSpec
    from rankwise.tasks.context import Context


@click.command()
@click.argument("file", type=click.Path(path_type=Path), required=False)
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a key of the file; repeatable.")
@click.option(
    "--max-arms",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Arms trained together over one base; 1 trains one after another.",
)
@click.option("--from", "source", metavar="RUN_OR_MODEL_URI", help="Take the definition that a run or model records.")
@click.option("--json", "as_json", is_flag=True, help="Print the comparison as JSON.")
def run(file: Path | None, overrides: tuple[str, ...], max_arms: int, source: str | None, as_json: bool) -> int:
    """Train, register, evaluate and compare all arms of the experiment FILE.

    What has been done already is not done again; what was interrupted goes on from its last checkpoint. Ctrl-C stops
    after the step under way and keeps a checkpoint; a second one stops at once.
    """
    if (file is None) == (source is None):
        raise click.UsageError("give an experiment FILE, or --from RUN_OR_MODEL_URI")
    settings = Settings.load()
    # A wrong file is told before anything heavy is imported.
    spec = load_experiment(file, overrides) if file is not None else None
    console = Console(stderr=True, highlight=False)
    with _stopping(console) as stop, Bars(console) as bars:
        bars.say("starting ...")
        from rankwise.tasks.context import open_context
        from rankwise.tasks.sweep import run_experiment

        with open_context(settings, bars, stop) as context:
            spec = spec if spec is not None else _recorded(context, source or "", overrides)
            command = shlex.join(["rankwise", "run", str(file) if file is not None else f"--from={source}"])
            end = run_experiment(context, spec, max_arms=max_arms, command=command)
            from rankwise.evaluation.gather import gather
            from rankwise.evaluation.table import comparison_view

            if end.interrupted:
                bars.warn("interrupted; the same command goes on from here")
                return 130
            comparison = gather(context.store, end.experiment)
        if as_json:
            print_json(comparison.to_json())
        else:
            show(lambda console: comparison_view(comparison, console))
        bars.say(f"look at it: rankwise ui (in a checkout: make ui), experiment {end.experiment}")
        for job in end.failed:
            bars.fail(f"job {job.id} ({job.kind} {job.spec_hash[:12]}): {job.error}")
        return 1 if end.failed else 0


def _recorded(context: Context, source: str, overrides: tuple[str, ...]) -> ExperimentSpec:
    from rankwise.tasks.recorded import recorded_definition

    return parse_experiment(recorded_definition(context, source), source, overrides)


@contextmanager
def _stopping(console: Console) -> Iterator[threading.Event]:
    """The first SIGINT or SIGTERM asks to stop; the second one interrupts."""
    stop = threading.Event()

    def on_signal(number: int, frame: FrameType | None) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()
        console.print("stopping after this step ... (once more to stop at once)")

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

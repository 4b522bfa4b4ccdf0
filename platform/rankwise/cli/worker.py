"""`rankwise worker`: claims jobs and does them, until nothing is left or somebody stops it."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.console import Console

from rankwise.cli.progress import Bars
from rankwise.settings import Settings, child_environment, set_data_roots

if TYPE_CHECKING:
    from rankwise.worker.loop import Plan
    from rankwise.worker.stopping import Stop
    from rankwise.worker.timing import Timing

_STOPPED = 130
_GIVING_BACK_S = 30.0


@click.command()
@click.option("--drain", is_flag=True, help="End when nothing is left to do. Default: wait for more.")
@click.option(
    "--max-arms",
    type=click.IntRange(min=1),
    help="Arms trained together over one base; 1 trains one after another. Default: as many as fit into memory.",
)
@click.option("--gpus", metavar="0,1", help="A worker process for each of these GPUs. Default: for each there is.")
@click.option(
    "--lease",
    type=click.FloatRange(min=1.0),
    default=60.0,
    show_default=True,
    help="Seconds without a sign of this worker after which another one takes its jobs.",
)
@click.option(
    "--grace",
    type=click.FloatRange(min=0.0),
    default=60.0,
    show_default=True,
    help="Seconds for a checkpoint after SIGTERM or Ctrl-C, before the work is ended anyway.",
)
@click.option(
    "--patience",
    type=click.FloatRange(min=1.0),
    help="Seconds of silence after which the process that computes counts as hung. Default: an hour; for uploads half.",
)
@click.option(
    "--data-root",
    "data_roots",
    multiple=True,
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Read no files for definitions but those below this directory (RANKWISE_DATA_ROOT); repeatable.",
)
@click.option("--experiment", hidden=True, help="Only its jobs, for a `rankwise run` that has started this worker.")
@click.option("--watched", hidden=True, help="The run of the sweep that this `rankwise run` finishes.")
def worker(
    drain: bool,
    max_arms: int | None,
    gpus: str | None,
    lease: float,
    grace: float,
    patience: float | None,
    data_roots: tuple[Path, ...],
    experiment: str | None,
    watched: str | None,
) -> int:
    """Do jobs of the queue.

    SIGTERM, Ctrl-C or the end of the terminal keeps a checkpoint after the step under way, gives the jobs back and
    ends; a second signal ends at once. Whoever claims the jobs goes on from there.
    """
    if data_roots:
        set_data_roots(data_roots)
    settings = Settings.load()
    _try_keys(settings)
    console = Console(stderr=True, highlight=False)
    from rankwise.worker.gpus import visible_gpus
    from rankwise.worker.stopping import Stop
    from rankwise.worker.timing import Timing

    stop = Stop(lambda: console.print("stopping after this step ... (once more to stop at once)"))
    places = visible_gpus(child_environment({} if gpus is None else {"CUDA_VISIBLE_DEVICES": gpus}))
    with stop.on_signals(), Bars(console) as bars:
        if len(places) > 1:
            options = {"--max-arms": max_arms, "--lease": lease, "--grace": grace, "--patience": patience}
            given = [f"{name}={value}" for name, value in options.items() if value is not None]
            return _place(places, [*(["--drain"] if drain else []), *given], stop, bars, drain=drain, grace=grace)
        timing = Timing.of_lease(lease, grace=grace, patience=patience)
        # Where nothing was said and no tool lists them, torch finds GPUs by itself.
        visible = {"CUDA_VISIBLE_DEVICES": ",".join(places)} if places or gpus is not None else {}
        from rankwise.worker.loop import MAX_ARMS, Plan

        plan = Plan(drain=drain, experiment=experiment, watched=watched, max_arms=max_arms or MAX_ARMS)
        _work(settings, visible, stop, bars, timing, plan, max_arms)
        if stop.asked:
            bars.say("stopped; its jobs are back in the queue")
    return _STOPPED if drain and stop.asked else 0


def _try_keys(settings: Settings) -> None:
    """A key that cannot be used is told now, not after the first training."""
    if settings.signing_key is None and not settings.trusted_keys:
        return
    from rankwise.assets.keys import private_key, trusted_keys

    trusted_keys(settings.trusted_keys)
    if settings.signing_key is not None:
        private_key(settings.signing_key)


def _place(places: Sequence[str], options: Sequence[str], stop: Stop, bars: Bars, *, drain: bool, grace: float) -> int:
    """A worker process for each GPU."""
    from rankwise.worker.local_placer import LocalPlacer

    placer = LocalPlacer(
        [sys.executable, "-m", "rankwise", "worker", *options],
        places,
        environment=child_environment({"PYTHONSAFEPATH": "1"}),
        stop=stop,
        say=bars.say,
        drain=drain,
        # The worker's own grace, and the time to give its jobs back.
        grace=grace + _GIVING_BACK_S,
    )
    code = placer.run()
    return 0 if code == _STOPPED and not drain else code


def _work(
    settings: Settings,
    visible: Mapping[str, str],
    stop: Stop,
    bars: Bars,
    timing: Timing,
    plan: Plan,
    max_arms: int | None,
) -> None:
    """The worker of the one GPU, or of a machine without any."""
    from rankwise.tasks.local import local_worker

    worker = local_worker(
        settings,
        bars,
        stop,
        timing=timing,
        width=bars.console.width,
        terminal=bars.console.is_terminal,
        changes=visible,
        info={"device": visible.get("CUDA_VISIBLE_DEVICES") or None, "max_arms": max_arms},
    )
    with worker as loop:
        bars.say(f"worker of {settings.home}" + (", until nothing is left to do" if plan.drain else ""))
        loop.work(plan)

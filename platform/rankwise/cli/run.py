"""`rankwise run`: submit an experiment, work on it here, and print the comparison.

1. The computing process submits the jobs and returns their ids.
2. This process and one worker for each other GPU do the jobs.
3. The sweep's run is finished, and the comparison is printed.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from rankwise.cli.experiment import command_line
from rankwise.cli.output import Bars, on_terminal, print_json
from rankwise.exceptions import RankwiseError
from rankwise.experiment.experiment import load_experiment
from rankwise.jobs.job import MAX_ARMS
from rankwise.settings import Settings, child_environment
from rankwise.tasks.local_worker import local_worker
from rankwise.worker.heartbeat import Stop, Timing
from rankwise.worker.local_placer import LocalPlacer, visible_gpus
from rankwise.worker.loop import LoopOptions, WorkerLoop

_GRACE_S = 600.0
"""Long, since a user can press Ctrl-C again."""


@click.command()
@click.argument("file", type=click.Path(path_type=Path), required=False)
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a key of the file; repeatable.")
@click.option(
    "--max-arms",
    type=click.IntRange(min=1),
    help="Maximum number of arms trained together over one base. Default: as many as fit in memory.",
)
@click.option(
    "--no-more-seeds", is_flag=True, help="Train no more seeds after the first look, even if a rank is undecided."
)
@click.option("--from", "source", metavar="RUN_OR_MODEL_URI", help="Use the definition recorded with a run or model.")
@click.option("--json", "as_json", is_flag=True, help="Print the comparison as JSON.")
def run(
    file: Path | None,
    overrides: tuple[str, ...],
    max_arms: int | None,
    no_more_seeds: bool,
    source: str | None,
    as_json: bool,
) -> int:
    """Train, register, evaluate and compare all arms of the experiment FILE.

    Finished work is not repeated; interrupted work resumes from its last checkpoint. Ctrl-C stops after the current
    step and keeps a checkpoint; a second Ctrl-C stops at once. There is one worker for each GPU; CUDA_VISIBLE_DEVICES
    selects GPUs.
    """
    if (file is None) == (source is None):
        raise click.UsageError("give an experiment FILE, or --from RUN_OR_MODEL_URI")
    settings = Settings.load()
    # Report errors in the file before anything is started.
    experiment = load_experiment(file, overrides) if file is not None else None
    console = Console(stderr=True, highlight=False)
    submission = {
        "do": "submit",
        "experiment": None if experiment is None else experiment.to_json(),
        "source": source,
        "overrides": list(overrides),
        "command": command_line(file, overrides, source),
        "more_seeds": not no_more_seeds,
    }
    stop = Stop(lambda: console.print("stopping after this step ... (repeat to stop at once)"))
    places = visible_gpus(child_environment({}))
    own = {"CUDA_VISIBLE_DEVICES": places[0]} if len(places) > 1 else {}
    with stop.on_signals(), Bars(console) as bars:
        bars.say("starting ...")
        worker = local_worker(
            settings,
            bars,
            stop,
            timing=Timing(grace=_GRACE_S),
            width=console.width,
            terminal=console.is_terminal,
            changes=own,
            info={"device": own.get("CUDA_VISIBLE_DEVICES")},
        )
        with worker as loop:
            return _run(loop, bars, submission, places[1:], max_arms, as_json, stop)


def _run(
    loop: WorkerLoop,
    bars: Bars,
    submission: dict[str, Any],
    others: Sequence[str],
    max_arms: int | None,
    as_json: bool,
    stop: Stop,
) -> int:
    try:
        sweep = loop.call(submission)
    except KeyboardInterrupt:
        bars.warn("interrupted before anything was trained")
        return 130
    failed: list[Any] = []
    if sweep["jobs"]:
        end = {"do": "end", "parent_run_id": sweep["parent_run_id"]}
        try:
            plan = LoopOptions(among=frozenset(sweep["jobs"]), max_arms=max_arms or MAX_ARMS, fail_on_outage=True)
            sweep_of = (sweep["experiment"], sweep["parent_run_id"])
            with workers_on_other_gpus(loop, bars, stop, others, *sweep_of, max_arms, _GRACE_S):
                jobs = loop.work(plan)
            if not stop.requested:
                finish = {**sweep, "do": "finish", "jobs": sorted(jobs), "command": submission["command"]}
                loop.call(finish, at_once=False)
        except RankwiseError as error:
            _end_quietly(loop, bars, {**end, "killed": False, "reason": str(error)})
            raise
        if stop.requested:
            _end_quietly(loop, bars, {**end, "killed": True, "reason": "interrupted"})
            bars.warn("interrupted; run the same command again to resume")
            return 130
        failed = loop.failed(jobs)
    compare = {
        "do": "compare",
        "experiment": sweep["experiment"],
        "width": bars.console.width if on_terminal() else 200,
        "terminal": on_terminal(),
    }
    comparison = loop.call(compare)
    if as_json:
        print_json(comparison["json"])
    else:
        click.echo(comparison["text"], nl=False)
    bars.say(f"to see it in MLflow: rankwise ui (in a checkout: make ui), experiment {sweep['experiment']}")
    for job in failed:
        bars.fail(f"{job.title}: {job.error}")
    return 1 if failed else 0


def _end_quietly(loop: WorkerLoop, bars: Bars, command: dict[str, Any]) -> None:
    """End the sweep's run if possible; the queue and the exit code have the result anyway."""
    try:
        loop.call(command, at_once=False)
    except (RankwiseError, KeyboardInterrupt) as error:
        bars.warn(f"could not end the sweep's run: {str(error) or 'interrupted'}")


_START_TIMEOUT_S = 30.0
_RELEASE_S = 30.0


@contextmanager
def workers_on_other_gpus(
    loop: WorkerLoop,
    bars: Bars,
    stop: Stop,
    gpus: Sequence[str],
    experiment: str,
    watched: str,
    max_arms: int | None,
    grace: float,
) -> Iterator[None]:
    """Run a worker on each of these GPUs for jobs of one experiment, until the block ends.

    The block starts when all workers have registered, so that the first claim leaves jobs for them. `gpus` are values
    of `CUDA_VISIBLE_DEVICES`; `watched` is the sweep's run, which this process finishes; `grace` is the number of
    seconds for a checkpoint after a stop request.
    """
    if not gpus:
        yield
        return
    end = Stop()
    command = [sys.executable, "-m", "rankwise", "worker", "--experiment", experiment, "--watched", watched]
    placer = LocalPlacer(
        [*command, f"--grace={grace}", *([] if max_arms is None else [f"--max-arms={max_arms}"])],
        gpus,
        environment=child_environment({"PYTHONSAFEPATH": "1"}),
        stop=end,
        say=bars.say,
        grace=grace + _RELEASE_S,
    )
    thread = threading.Thread(target=placer.run, name="workers-on-other-gpus")
    thread.start()
    stop.followers.append(end)
    try:
        if stop.requested:
            end.request()
        elif not loop.await_workers(1 + len(gpus), _START_TIMEOUT_S):
            bars.warn(f"not all workers of the GPUs {', '.join(gpus)} have started within {_START_TIMEOUT_S:.0f} s")
        yield
    finally:
        stop.followers.remove(end)
        if not end.requested:
            end.request()
        thread.join()

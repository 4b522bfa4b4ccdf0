"""`rankwise worker` and `rankwise cluster`: do jobs of the queue here, or on the nodes of a Ray cluster."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click
import psutil
from rich.console import Console
from rich.table import Table

from rankwise.cli.output import Bars, note, print_json, print_table
from rankwise.exceptions import ClusterError
from rankwise.settings import Settings, child_environment, set_data_roots
from rankwise.supervise import GRACE_S
from rankwise.worker.ray_placer import PLACING_S, WORKER, ClusterNode, WorkerResources, connect

if TYPE_CHECKING:
    from rankwise.worker.heartbeat import Stop, Timing
    from rankwise.worker.loop import LoopOptions

_STOPPED = 130
_RELEASE_S = 30.0


@click.command()
@click.option("--drain", is_flag=True, help="Exit when the queue is empty. Default: wait for jobs.")
@click.option(
    "--max-arms",
    type=click.IntRange(min=1),
    help="Maximum number of arms trained together over one base. Default: as many as fit in memory.",
)
@click.option("--gpus", metavar="0,1", help="Start one worker process for each of these GPUs. Default: all GPUs.")
@click.option(
    "--lease",
    type=click.FloatRange(min=1.0),
    default=60.0,
    show_default=True,
    help="Seconds without a heartbeat after which other workers may claim the jobs.",
)
@click.option(
    "--grace",
    type=click.FloatRange(min=0.0),
    default=60.0,
    show_default=True,
    help="Seconds for a checkpoint after SIGTERM or Ctrl-C.",
)
@click.option(
    "--patience",
    type=click.FloatRange(min=1.0),
    help="Seconds without progress after which a job counts as hung. Default: 3600, for uploads 1800.",
)
@click.option(
    "--data-root",
    "data_roots",
    multiple=True,
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Definitions may only use files below this directory (RANKWISE_DATA_ROOT); repeatable.",
)
@click.option("--experiment", hidden=True, help="Only jobs of this experiment; set by `rankwise run`.")
@click.option("--watched", hidden=True, help="The sweep's run, which `rankwise run` finishes.")
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

    SIGTERM, Ctrl-C or a closed terminal: save a checkpoint after the current step, return the jobs to the queue, and
    exit. A second signal exits at once. The next worker that claims the jobs resumes from the checkpoint.
    """
    if data_roots:
        set_data_roots(data_roots)
    settings = Settings.load()
    _check_keys(settings)
    console = Console(stderr=True, highlight=False)
    from rankwise.worker.heartbeat import Stop, Timing
    from rankwise.worker.local_placer import visible_gpus

    stop = Stop(lambda: console.print("stopping after this step ... (repeat to stop at once)"))
    places = visible_gpus(child_environment({} if gpus is None else {"CUDA_VISIBLE_DEVICES": gpus}))
    with stop.on_signals(), Bars(console) as bars:
        if len(places) > 1:
            options = {"--max-arms": max_arms, "--lease": lease, "--grace": grace, "--patience": patience}
            given = [f"{name}={value}" for name, value in options.items() if value is not None]
            return _start_local_workers(
                places, [*(["--drain"] if drain else []), *given], stop, bars, drain=drain, grace=grace
            )
        timing = Timing.of_lease(lease, grace=grace, patience=patience)
        # Without --gpus and a tool that lists GPUs, torch finds them itself.
        visible = {"CUDA_VISIBLE_DEVICES": ",".join(places)} if places or gpus is not None else {}
        from rankwise.jobs.job import MAX_ARMS
        from rankwise.worker.loop import LoopOptions

        plan = LoopOptions(drain=drain, experiment=experiment, watched=watched, max_arms=max_arms or MAX_ARMS)
        _work(settings, visible, stop, bars, timing, plan, max_arms)
        if stop.requested:
            bars.say("stopped; its jobs are back in the queue")
    return _STOPPED if drain and stop.requested else 0


def _check_keys(settings: Settings) -> None:
    """Report unusable keys now, not after the first training."""
    if settings.signing_key is None and not settings.trusted_keys:
        return
    from rankwise.flavor.signing import private_key, trusted_keys

    trusted_keys(settings.trusted_keys)
    if settings.signing_key is not None:
        private_key(settings.signing_key)


def _start_local_workers(
    places: Sequence[str], options: Sequence[str], stop: Stop, bars: Bars, *, drain: bool, grace: float
) -> int:
    """One worker process for each GPU."""
    from rankwise.worker.local_placer import LocalPlacer

    placer = LocalPlacer(
        [sys.executable, "-m", "rankwise", "worker", *options],
        places,
        environment=child_environment({"PYTHONSAFEPATH": "1"}),
        stop=stop,
        say=bars.say,
        drain=drain,
        # The worker's own grace, and time to return its jobs.
        grace=grace + _RELEASE_S,
    )
    code = placer.run()
    return 0 if code == _STOPPED and not drain else code


def _work(
    settings: Settings,
    visible: Mapping[str, str],
    stop: Stop,
    bars: Bars,
    timing: Timing,
    plan: LoopOptions,
    max_arms: int | None,
) -> None:
    """The worker of a single GPU, or of a machine without GPUs."""
    from rankwise.tasks.local_worker import local_worker

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
        bars.say(f"worker of {settings.home}" + (", until the queue is empty" if plan.drain else ""))
        loop.work(plan)


# Settings that workers on nodes need; other secrets are set on the nodes.
_FORWARDED_PREFIXES = ("RANKWISE_", "MLFLOW_", "HF_HUB_OFFLINE")
_address = click.option(
    "--address", default="auto", show_default=True, help="HOST:PORT of the head node; auto on a node."
)
_insecure = click.option("--insecure", is_flag=True, help="Allow a remote cluster without token authentication.")
_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@click.group()
def cluster() -> None:
    """Start, list and stop workers on a Ray cluster."""


@cluster.command()
@_address
@click.option("--workers", "count", type=click.IntRange(min=1), default=1, show_default=True, help="Number of workers.")
@click.option(
    "--gpus-per-worker", type=click.FloatRange(min=0), default=1.0, show_default=True, help="0 for nodes without GPUs."
)
@click.option(
    "--cpus-per-worker",
    type=click.FloatRange(min=0),
    default=1.0,
    show_default=True,
    help="CPUs reserved for a worker.",
)
@click.option("--max-arms", type=click.IntRange(min=1), help="Maximum number of arms that a worker trains together.")
@click.option("--drain", is_flag=True, help="Workers exit when the queue is empty.")
@click.option(
    "--timeout",
    type=click.FloatRange(min=1),
    default=PLACING_S,
    show_default=True,
    help="Seconds to wait for resources.",
)
@_insecure
@_json
def start(
    address: str,
    count: int,
    gpus_per_worker: float,
    cpus_per_worker: float,
    max_arms: int | None,
    drain: bool,
    timeout: float,
    insecure: bool,
    as_json: bool,
) -> None:
    """Start workers on the nodes of a running Ray cluster. They keep running after this command."""
    settings = Settings.load()
    environment = child_environment({})
    with connect(address, environment, insecure=insecure) as placer:
        refuse_unshared(settings, placer.nodes())
        arguments = [*(["--drain"] if drain else []), *(["--max-arms", str(max_arms)] if max_arms else [])]
        placed = placer.start(
            count,
            WorkerResources(cpus=cpus_per_worker, gpus=gpus_per_worker),
            environment=passed_on(settings, environment),
            command=[*WORKER, *arguments],
            timeout=timeout,
        )
    if as_json:
        print_json({"workers": [worker.to_json() for worker in placed]})
        return
    for worker in placed:
        note(f"{worker.name} runs on {worker.host}")


@cluster.command()
@_address
@_insecure
@_json
def status(address: str, insecure: bool, as_json: bool) -> None:
    """List the cluster's nodes and the workers on them. For their jobs: `rankwise status`."""
    with connect(address, child_environment({}), insecure=insecure) as placer:
        nodes, workers = placer.nodes(), placer.workers()
    if as_json:
        print_json(
            {
                "nodes": [
                    {"host": node.host, "address": node.address, "cpus": node.cpus, "gpus": node.gpus} for node in nodes
                ],
                "workers": [worker.to_json() for worker in workers],
            }
        )
        return
    for node in nodes:
        note(f"node {node.host} ({node.address}): {node.gpus:g} GPU, {node.cpus:g} CPU")
    table = Table(box=None, pad_edge=False)
    for column in ("worker", "state", "host", "pid"):
        table.add_column(column)
    for worker in workers:
        table.add_row(worker.name, worker.state, worker.host or "", str(worker.pid or ""))
    print_table(table)


@cluster.command()
@_address
@click.option(
    "--grace", type=click.FloatRange(min=0), default=GRACE_S, show_default=True, help="Seconds to save checkpoints."
)
@_insecure
def stop(address: str, grace: float, insecure: bool) -> None:
    """Stop all workers on the cluster; each saves its checkpoints and returns its jobs to the queue."""
    with connect(address, child_environment({}), insecure=insecure) as placer:
        killed = placer.stop(grace)
    note(f"stopped; {len(killed)} had to be killed: {', '.join(killed)}" if killed else "all workers have stopped")


def refuse_unshared(settings: Settings, nodes: Sequence[ClusterNode]) -> None:
    """Reject stores that the nodes cannot share.

    Raises:
        ClusterError: The queue or MLflow's store is a local file, and some nodes are other machines.
    """
    elsewhere = sorted({f"{node.host} ({node.address})" for node in nodes if node.address not in _own_addresses()})
    if not elsewhere:
        return
    for name, url, other in (
        ("RANKWISE_DATABASE_URL", settings.database_url, "a PostgreSQL database"),
        ("MLFLOW_TRACKING_URI", settings.tracking_uri, "an MLflow server"),
    ):
        if url.startswith(("sqlite", "file:", "/", ".")):
            raise ClusterError(
                f"the cluster has nodes on other machines: {', '.join(elsewhere)}; they cannot share "
                f"{url.rpartition('@')[2]}: set {name} to {other} that all nodes can reach"
            )


def passed_on(settings: Settings, environment: dict[str, str]) -> dict[str, str]:
    """The environment variables for workers on nodes. Paths are absolute, and the same on every node."""
    kept = {name: value for name, value in environment.items() if name.startswith(_FORWARDED_PREFIXES)}
    absolute = {"RANKWISE_CACHE": str(settings.cache), "RANKWISE_BASES": os.pathsep.join(map(str, settings.bases))}
    return {
        **kept,
        **{name: value for name, value in absolute.items() if name in kept},
        "RANKWISE_HOME": str(settings.home),
        "RANKWISE_DATABASE_URL": settings.database_url,
        "MLFLOW_TRACKING_URI": settings.tracking_uri,
    }


def _own_addresses() -> set[str]:
    return {address.address for addresses in psutil.net_if_addrs().values() for address in addresses} | {
        socket.gethostname()
    }

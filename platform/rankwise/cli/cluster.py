"""`rankwise cluster`: workers on the nodes of a Ray cluster."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence

import click
import psutil
from rich.table import Table

from rankwise.cli.output import note, print_json, print_table
from rankwise.exceptions import ClusterError
from rankwise.settings import Settings, child_environment
from rankwise.worker.placement import Demand, Node
from rankwise.worker.ray_placer import PLACING_S, WORKER, connect
from rankwise.worker.tether import GRACE_S

# What a worker on another node needs to know of this one's set-up; secrets of other kinds are set on the nodes.
_PASSED_ON = ("RANKWISE_", "MLFLOW_", "HF_HUB_OFFLINE")
_address = click.option(
    "--address", default="auto", show_default=True, help="HOST:PORT of the cluster's head; auto on one of its nodes."
)
_insecure = click.option("--insecure", is_flag=True, help="Use a cluster elsewhere without token authentication.")
_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@click.group()
def cluster() -> None:
    """Start, list and stop workers on a Ray cluster."""


@cluster.command()
@_address
@click.option("--workers", "count", type=click.IntRange(min=1), default=1, show_default=True, help="How many.")
@click.option(
    "--gpus-per-worker", type=click.FloatRange(min=0), default=1.0, show_default=True, help="0 for nodes without a GPU."
)
@click.option(
    "--cpus-per-worker",
    type=click.FloatRange(min=0),
    default=1.0,
    show_default=True,
    help="CPUs a worker asks Ray for.",
)
@click.option("--max-arms", type=click.IntRange(min=1), help="The most arms that a worker trains together.")
@click.option("--drain", is_flag=True, help="Workers end when nothing is left to do.")
@click.option(
    "--timeout", type=click.FloatRange(min=1), default=PLACING_S, show_default=True, help="Seconds to find a place."
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
    """Place workers on the nodes of a running Ray cluster. They go on when this command has ended."""
    settings = Settings.load()
    environment = child_environment({})
    with connect(address, environment, insecure=insecure) as placer:
        refuse_unshared(settings, placer.nodes())
        arguments = [*(["--drain"] if drain else []), *(["--max-arms", str(max_arms)] if max_arms else [])]
        placed = placer.start(
            count,
            Demand(cpus=cpus_per_worker, gpus=gpus_per_worker),
            environment=passed_on(settings, environment),
            command=[*WORKER, *arguments],
            timeout=timeout,
        )
    if as_json:
        print_json([worker.to_json() for worker in placed])
        return
    for worker in placed:
        note(f"{worker.name} runs on {worker.host}")


@cluster.command()
@_address
@_insecure
@_json
def status(address: str, insecure: bool, as_json: bool) -> None:
    """List the nodes of the cluster and the workers on them. What those do: `rankwise status`."""
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
    "--grace", type=click.FloatRange(min=0), default=GRACE_S, show_default=True, help="Seconds to write checkpoints."
)
@_insecure
def stop(address: str, grace: float, insecure: bool) -> None:
    """Stop all workers on the cluster: each writes its checkpoints and gives its jobs back."""
    with connect(address, child_environment({}), insecure=insecure) as placer:
        killed = placer.stop(grace)
    note(f"stopped; {len(killed)} had to be killed: {', '.join(killed)}" if killed else "all workers have ended")


def refuse_unshared(settings: Settings, nodes: Sequence[Node]) -> None:
    """Refuse stores that the nodes do not share.

    Raises:
        ClusterError: The queue or MLflow's store is a SQLite file, and there are nodes that are not this machine.
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
                f"the cluster has nodes that are not this machine: {', '.join(elsewhere)}; they cannot share "
                f"{url.rpartition('@')[2]}: set {name} to {other} that all of them reach"
            )


def passed_on(settings: Settings, environment: dict[str, str]) -> dict[str, str]:
    """The variables that a worker on a node gets from here. Paths are absolute, and the same on every node."""
    kept = {name: value for name, value in environment.items() if name.startswith(_PASSED_ON)}
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

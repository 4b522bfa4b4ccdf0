"""Workers on the nodes of an existing Ray cluster. The only module that uses Ray, imported when it is needed.

Ray gives places and nothing else: an actor that is never restarted starts `rankwise worker` as a subprocess and ends
with it. The workers claim from the queue, as workers anywhere do; losing Ray costs workers, not jobs. Whatever ends an
actor (a stop, its node, the head) closes a pipe, and the worker writes its checkpoints and gives its jobs back.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rankwise import supervise
from rankwise.exceptions import ClusterError
from rankwise.settings import child_environment
from rankwise.worker.placers import Demand, Node, Placed

NAMESPACE = "rankwise"
PLACING_S = 60.0
"""A worker that has no place after so long is given up, and said."""
_ASK_S = 5.0
_LOOPBACK = ("auto", "local", "localhost", "127.", "[::1]", "::1")


class WorkerHost:
    """The actor: a worker's process, and nothing else."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], grace: float) -> None:
        """Start the worker; its output goes to the logs that Ray keeps of the actor."""
        # What an actor gets in `CUDA_VISIBLE_DEVICES` is its part of the node.
        # What happens to lie in the working directory must not stand in for a module of Python's.
        own = child_environment({"PYTHONSAFEPATH": "1", **environment})
        program = [part if part != PYTHON else sys.executable for part in command]
        self._process = supervise.start(program, own, grace=grace)
        threading.Thread(target=self._end_with_worker, daemon=True).start()

    def where(self) -> dict[str, Any]:
        """Where it runs."""
        import ray

        node = ray.get_runtime_context().get_node_id()
        return {"host": socket.gethostname(), "node_id": node, "pid": self._process.pid}

    def stop(self) -> None:
        """Ask the worker to stop; the actor ends with it."""
        self._process.send_signal(signal.SIGTERM)

    def _end_with_worker(self) -> None:
        self._process.wait()
        # Not an error to Ray or to anybody, and no destructor has anything left to do.
        os._exit(0)


PYTHON = "{python}"
"""Stands in a command for the Python of the node."""
WORKER = (PYTHON, "-m", "rankwise", "worker")


class RayPlacer:
    """Places workers on a cluster, lists and stops them. Made by `connect`."""

    def __init__(self, ray: Any) -> None:
        """Over a connected `ray`."""
        self._ray = ray

    def nodes(self) -> list[Node]:
        """The living nodes."""
        return [
            Node(
                node_id=node["NodeID"],
                address=node["NodeManagerAddress"],
                host=node["NodeManagerHostname"],
                cpus=node["Resources"].get("CPU", 0.0),
                gpus=node["Resources"].get("GPU", 0.0),
            )
            for node in self._ray.nodes()
            if node["Alive"]
        ]

    def start(
        self,
        count: int,
        demand: Demand,
        *,
        environment: Mapping[str, str],
        command: Sequence[str] = WORKER,
        grace: float = supervise.GRACE_S,
        timeout: float = PLACING_S,
    ) -> list[Placed]:
        """Place workers, spread over the nodes.

        Args:
            count: How many.
            demand: What each asks for.
            environment: What their processes need beside what is set on the nodes.
            command: What to run; `PYTHON` stands for the node's Python.
            grace: Seconds for a worker to write its checkpoints when it has to end.
            timeout: Seconds until what has no place is given up.

        Returns:
            The placed ones: all of them.

        Raises:
            ClusterError: Some have no place, or cannot be started; those that were placed stay.
        """
        self._refuse_impossible(demand)
        options: dict[str, Any] = {
            "num_cpus": demand.cpus,
            "num_gpus": demand.gpus,
            "lifetime": "detached",
            "namespace": NAMESPACE,
            # Attempts are counted by the queue; a second start would be a worker that nobody asked for.
            "max_restarts": 0,
            "max_task_retries": 0,
            "scheduling_strategy": "SPREAD",
        }
        if demand.gpus == 0:
            environment = {**environment, "CUDA_VISIBLE_DEVICES": ""}
        actor = self._ray.remote(WorkerHost)
        names = [f"worker-{uuid.uuid4().hex[:8]}" for _ in range(count)]
        handles = {
            name: actor.options(name=name, **options).remote(list(command), dict(environment), grace) for name in names
        }
        asked = {handle.where.remote(): name for name, handle in handles.items()}
        ready, late = self._ray.wait(list(asked), num_returns=count, timeout=timeout)
        free = self._free()
        placed: list[Placed] = []
        problems: list[str] = []
        for reference in ready:
            try:
                placed.append(Placed(name=asked[reference], state="running", **self._ray.get(reference)))
            except self._ray.exceptions.RayError as error:
                problems.append(f"a worker could not be started: {_first_line(error)}")
        for reference in late:
            self._ray.kill(handles[asked[reference]], no_restart=True)
        if late:
            problems.append(
                f"{len(late)} of {count} workers have no place after {timeout:.0f} s: each asks for {demand}, free are "
                f"{free}; stop something, add nodes, or ask for less (--workers, --gpus-per-worker, --cpus-per-worker)"
            )
        if problems:
            raise ClusterError("\n".join([*problems, f"{len(placed)} workers were placed and stay"]))
        return placed

    def workers(self) -> list[Placed]:
        """The workers of this cluster."""
        asked = {name: self._handle(name).where.remote() for name in self._names()}
        ready, _ = self._ray.wait(list(asked.values()), num_returns=len(asked), timeout=_ASK_S) if asked else ([], [])
        found = []
        for name, reference in sorted(asked.items()):
            try:
                where = self._ray.get(reference) if reference in ready else {}
            except self._ray.exceptions.RayActorError:
                # It has ended since it was listed.
                continue
            found.append(Placed(name=name, state="running" if where else "pending", **where))
        return found

    def stop(self, grace: float = supervise.GRACE_S) -> list[str]:
        """Have all workers write their checkpoints and end; those that still run after the grace are killed.

        Returns:
            The names of those that had to be killed.
        """
        handles = {name: self._handle(name) for name in self._names()}
        for handle in handles.values():
            handle.stop.remote()
        deadline = time.monotonic() + grace
        left = set(handles)
        while left and time.monotonic() < deadline:
            time.sleep(0.5)
            left &= set(self._names())
        for name in left:
            self._ray.kill(handles[name], no_restart=True)
        return sorted(left)

    def _names(self) -> list[str]:
        return [name for name in self._ray.util.list_named_actors() if name.startswith("worker-")]

    def _handle(self, name: str) -> Any:
        return self._ray.get_actor(name, namespace=NAMESPACE)

    def _free(self) -> str:
        free = self._ray.available_resources()
        return f"{free.get('GPU', 0.0):g} GPU and {free.get('CPU', 0.0):g} CPU"

    def _refuse_impossible(self, demand: Demand) -> None:
        """What no node could ever give stays pending for ever; say so at once."""
        nodes = self.nodes()
        if any(node.cpus >= demand.cpus and node.gpus >= demand.gpus for node in nodes):
            return
        there = "; ".join(f"{node.host} ({node.address}) {node.gpus:g} GPU and {node.cpus:g} CPU" for node in nodes)
        raise ClusterError(
            f"no node can hold a worker that asks for {demand}: there are {there}; ask for less "
            "(--gpus-per-worker 0 for nodes without a GPU, --cpus-per-worker)"
        )


@contextmanager
def connect(address: str, environment: Mapping[str, str], *, insecure: bool = False) -> Iterator[RayPlacer]:
    """Connect to a running cluster, and disconnect at the end; the workers stay.

    Args:
        address: `HOST:PORT` of the cluster's head, or `auto` on one of its nodes.
        environment: Of this process: whether it has a token for the cluster.
        insecure: Whether a cluster elsewhere may do without token authentication.

    Raises:
        ClusterError: Ray is not installed, the cluster does not answer or refuses, or it may not be used so.
    """
    _refuse_address(address, environment, insecure)
    try:
        import ray
    except ImportError as error:
        raise ClusterError("workers on a Ray cluster need the extra `ray`: pip install 'rankwise[ray]'") from error
    try:
        ray.init(address=address, namespace=NAMESPACE, log_to_driver=False, logging_level="ERROR")
    except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        raise ClusterError(
            f"no Ray cluster answers at {address}: {_first_line(error)}; start one with `ray start --head`, run this "
            "on one of its nodes, and see that RAY_AUTH_MODE and the token are the cluster's"
        ) from error
    try:
        yield RayPlacer(ray)
    finally:
        ray.shutdown()


def _refuse_address(address: str, environment: Mapping[str, str], insecure: bool) -> None:
    if address.startswith("ray://"):
        raise ClusterError(
            f"{address}: Ray's client protocol is not used; run this on a node of the cluster, with --address auto"
        )
    if address.startswith(_LOOPBACK) or insecure or environment.get("RAY_AUTH_MODE", "").lower() == "token":
        return
    raise ClusterError(
        f"{address} is not on this machine, and RAY_AUTH_MODE is not `token`: whoever reaches a Ray cluster without "
        "authentication can run any program on it. Start it with RAY_AUTH_MODE=token and a token "
        "(`ray get-auth-token --generate`), set both here too, or say --insecure if nobody else can reach it"
    )


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__

"""Ray placer: workers on the nodes of an existing Ray cluster. The only module that imports Ray, and lazily.

Ray only places processes: an actor that is never restarted runs `rankwise worker`, which claims jobs from the queue.
When an actor ends for any reason, a pipe closes, and its worker writes checkpoints and returns its jobs.
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
from dataclasses import asdict, dataclass
from typing import Any

from rankwise import supervise
from rankwise.exceptions import ClusterError
from rankwise.settings import child_environment

NAMESPACE = "rankwise"
PLACING_S = 60.0
"""Default time to place a worker."""
_ASK_S = 5.0
_LOOPBACK = ("auto", "local", "localhost", "127.", "[::1]", "::1")


@dataclass(frozen=True, kw_only=True)
class WorkerResources:
    """The resources of one worker, in Ray's terms."""

    cpus: float = 1.0
    gpus: float = 1.0

    def __str__(self) -> str:
        return f"{self.gpus:g} GPU and {self.cpus:g} CPU"


@dataclass(frozen=True, kw_only=True)
class ClusterNode:
    """A living node of the cluster."""

    node_id: str
    address: str
    host: str
    cpus: float
    gpus: float


@dataclass(frozen=True, kw_only=True)
class RayWorker:
    """A worker on the cluster: `running`, or `pending` if it is not placed yet or its node does not answer."""

    name: str
    state: str
    host: str | None = None
    node_id: str | None = None
    pid: int | None = None

    def to_json(self) -> dict[str, Any]:
        """One worker of `rankwise cluster status --json`."""
        return asdict(self)


class WorkerActor:
    """The Ray actor: runs one worker process, whose output goes to the actor's logs."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], grace: float) -> None:
        # Ray sets CUDA_VISIBLE_DEVICES to the actor's GPUs. PYTHONSAFEPATH: a module in the working directory must not
        # replace one of the standard library.
        child_env = child_environment({"PYTHONSAFEPATH": "1", **environment})
        program = [part if part != PYTHON else sys.executable for part in command]
        self._process = supervise.start(program, child_env, grace=grace)
        threading.Thread(target=self._end_with_worker, daemon=True).start()

    def where(self) -> dict[str, Any]:
        """The node and process of the worker."""
        import ray

        node = ray.get_runtime_context().get_node_id()
        return {"host": socket.gethostname(), "node_id": node, "pid": self._process.pid}

    def stop(self) -> None:
        """Send the worker a SIGTERM; the actor ends with it."""
        self._process.send_signal(signal.SIGTERM)

    def _end_with_worker(self) -> None:
        self._process.wait()
        # 0: Ray must not report an error.
        os._exit(0)


PYTHON = "{python}"
"""Placeholder in a command for the node's Python."""
WORKER = (PYTHON, "-m", "rankwise", "worker")


class RayPlacer:
    """Places, lists and stops workers on a cluster. Made by `connect`."""

    def __init__(self, ray: Any) -> None:
        self._ray = ray

    def nodes(self) -> list[ClusterNode]:
        """The living nodes."""
        return [
            ClusterNode(
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
        resources: WorkerResources,
        *,
        environment: Mapping[str, str],
        command: Sequence[str] = WORKER,
        grace: float = supervise.GRACE_S,
        timeout: float = PLACING_S,
    ) -> list[RayWorker]:
        """Place workers, spread over the nodes, within `timeout` seconds.

        `environment` is added to that of the nodes; `PYTHON` in `command` stands for the node's Python. When its actor
        ends, a worker has `grace` seconds to write checkpoints.

        Raises:
            ClusterError: Not all workers were placed or started; those that were keep running.
        """
        self._refuse_impossible(resources)
        options: dict[str, Any] = {
            "num_cpus": resources.cpus,
            "num_gpus": resources.gpus,
            "lifetime": "detached",
            "namespace": NAMESPACE,
            # The queue counts attempts; a restarted actor would be an extra worker.
            "max_restarts": 0,
            "max_task_retries": 0,
            "scheduling_strategy": "SPREAD",
        }
        if resources.gpus == 0:
            environment = {**environment, "CUDA_VISIBLE_DEVICES": ""}
        actor = self._ray.remote(WorkerActor)
        names = [f"worker-{uuid.uuid4().hex[:8]}" for _ in range(count)]
        handles = {
            name: actor.options(name=name, **options).remote(list(command), dict(environment), grace) for name in names
        }
        references = {handle.where.remote(): name for name, handle in handles.items()}
        ready, unplaced = self._ray.wait(list(references), num_returns=count, timeout=timeout)
        free = self._free()
        placed: list[RayWorker] = []
        problems: list[str] = []
        for reference in ready:
            try:
                placed.append(RayWorker(name=references[reference], state="running", **self._ray.get(reference)))
            except self._ray.exceptions.RayError as error:
                problems.append(f"a worker could not be started: {_first_line(error)}")
        for reference in unplaced:
            self._ray.kill(handles[references[reference]], no_restart=True)
        if unplaced:
            problems.append(
                f"{len(unplaced)} of {count} workers were not placed within {timeout:.0f} s: each needs {resources}, "
                f"free are {free}; stop something, add nodes, or request less (--workers, --gpus-per-worker, "
                "--cpus-per-worker)"
            )
        if problems:
            raise ClusterError("\n".join([*problems, f"{len(placed)} workers were placed and keep running"]))
        return placed

    def workers(self) -> list[RayWorker]:
        """The workers of this cluster."""
        references = {name: self._handle(name).where.remote() for name in self._names()}
        ready, _ = (
            self._ray.wait(list(references.values()), num_returns=len(references), timeout=_ASK_S)
            if references
            else ([], [])
        )
        workers = []
        for name, reference in sorted(references.items()):
            try:
                where = self._ray.get(reference) if reference in ready else {}
            except self._ray.exceptions.RayActorError:
                # It ended meanwhile.
                continue
            workers.append(RayWorker(name=name, state="running" if where else "pending", **where))
        return workers

    def stop(self, grace: float = supervise.GRACE_S) -> list[str]:
        """Stop all workers; the names of those that had to be killed after `grace` seconds."""
        handles = {name: self._handle(name) for name in self._names()}
        for handle in handles.values():
            handle.stop.remote()
        deadline = time.monotonic() + grace
        running = set(handles)
        while running and time.monotonic() < deadline:
            time.sleep(0.5)
            running &= set(self._names())
        for name in running:
            self._ray.kill(handles[name], no_restart=True)
        return sorted(running)

    def _names(self) -> list[str]:
        return [name for name in self._ray.util.list_named_actors() if name.startswith("worker-")]

    def _handle(self, name: str) -> Any:
        return self._ray.get_actor(name, namespace=NAMESPACE)

    def _free(self) -> str:
        free = self._ray.available_resources()
        return f"{free.get('GPU', 0.0):g} GPU and {free.get('CPU', 0.0):g} CPU"

    def _refuse_impossible(self, resources: WorkerResources) -> None:
        """Refuse resources that no node has: Ray would leave the worker pending for ever."""
        nodes = self.nodes()
        if any(node.cpus >= resources.cpus and node.gpus >= resources.gpus for node in nodes):
            return
        summary = "; ".join(f"{node.host} ({node.address}) {node.gpus:g} GPU and {node.cpus:g} CPU" for node in nodes)
        raise ClusterError(
            f"no node can run a worker that needs {resources}: the nodes are {summary}; request less "
            "(--gpus-per-worker 0 for nodes without a GPU, --cpus-per-worker)"
        )


@contextmanager
def connect(address: str, environment: Mapping[str, str], *, insecure: bool = False) -> Iterator[RayPlacer]:
    """Connect to a running cluster, and disconnect at the end; workers keep running.

    `address` is `HOST:PORT` of the cluster's head, or `auto` on one of its nodes. With `insecure`, a cluster on other
    machines may run without authentication.

    Raises:
        ClusterError: Ray is not installed, or the cluster does not answer, refuses, or lacks authentication.
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
            "on one of its nodes, and use the cluster's RAY_AUTH_MODE and token"
        ) from error
    try:
        yield RayPlacer(ray)
    finally:
        ray.shutdown()


def _refuse_address(address: str, environment: Mapping[str, str], insecure: bool) -> None:
    if address.startswith("ray://"):
        raise ClusterError(
            f"{address}: Ray's client protocol is not supported; run this on a node of the cluster, with --address auto"
        )
    if address.startswith(_LOOPBACK) or insecure or environment.get("RAY_AUTH_MODE", "").lower() == "token":
        return
    raise ClusterError(
        f"{address} is not on this machine, and RAY_AUTH_MODE is not `token`: anyone who can reach a Ray cluster "
        "without authentication can run any program on it. Start it with RAY_AUTH_MODE=token and a token "
        "(`ray get-auth-token --generate`), set both here too, or use --insecure if nobody else can reach it"
    )


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__

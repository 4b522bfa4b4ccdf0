"""Workers on this machine: one process for each GPU. They are restarted when they crash, and end together.

- What a placer of workers on a cluster is asked for, finds, and makes. Plain values.
- Which GPUs there are for this process, without importing torch.
- Where a worker's process is: the processes of one place see each other, and can tell that one of them is dead.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from rankwise import supervise
from rankwise.backoff import delay_after
from rankwise.jobs.job import Worker
from rankwise.worker.heartbeat import Stop

NO_GPU = "cpu"
"""The place of the one worker on a machine without a GPU."""
_LOOK_S = 0.2
_LAST_WORDS_S = 5.0
_INTERRUPTED = 130
_USAGE = 2


@dataclass(frozen=True, kw_only=True)
class Patience:
    """How often a crash is put up with.

    Attributes:
        crashes: So many within `window` seconds, and the place is given up.
        window: See `crashes`.
        pause: Seconds before the first restart; doubled with every crash within the window, up to `longest`.
        longest: See `pause`.
    """

    crashes: int = 5
    window: float = 600.0
    pause: float = 1.0
    longest: float = 60.0


@dataclass
class _Place:
    """One GPU and the worker on it."""

    name: str
    process: subprocess.Popen[bytes] | None = None
    reader: threading.Thread | None = None
    crashes: deque[float] = field(default_factory=deque)
    due: float = 0.0
    code: int | None = None
    asked: int = 0


class LocalPlacer:
    """Runs one worker for each place until all have ended.

    A worker that ends by itself (0; interrupted; a usage error; with `drain` also 1, a failed job) is not started
    again. Any other end is a crash. The first wish to stop is passed on as SIGTERM, so that each worker writes its
    checkpoints, the second one as a second SIGTERM. A worker never outlives this process.
    """

    def __init__(
        self,
        command: Sequence[str],
        gpus: Sequence[str],
        *,
        environment: Mapping[str, str],
        stop: Stop,
        say: Callable[[str], None],
        drain: bool = False,
        grace: float = supervise.GRACE_S,
        patience: Patience | None = None,
    ) -> None:
        """Nothing is started yet.

        Args:
            command: Starts a worker for what `CUDA_VISIBLE_DEVICES` names.
            gpus: Names of GPUs, a worker for each; one worker in all where there are none.
            environment: Of the workers.
            stop: The wish to stop.
            say: Tells people; also what the workers print, line by line, with the place in front.
            drain: Whether the workers end by themselves when nothing is left.
            grace: Seconds for a worker to stop after this process has died.
            patience: How often a crash is put up with.
        """
        self._command = list(command)
        self._environment = dict(environment)
        self._stop = stop
        self._say = say
        self._grace = grace
        self._patience = patience or Patience()
        self._ends = {0, _USAGE, _INTERRUPTED} | ({1} if drain else set())
        self._places = [_Place(name) for name in gpus or (NO_GPU,)]

    def run(self) -> int:
        """Run until all workers have ended.

        Returns:
            0 when all ended well, else the exit status of the first one that did not.
        """
        try:
            while any(place.code is None for place in self._places):
                for place in self._places:
                    self._look(place)
                time.sleep(_LOOK_S)
        finally:
            self._end_all()
        return next((place.code for place in self._places if place.code), 0)

    def _look(self, place: _Place) -> None:
        if place.code is not None:
            return
        if place.process is None:
            if self._stop.asked:
                place.code = _INTERRUPTED
            elif time.monotonic() >= place.due:
                self._start(place)
            return
        for _ in range(1 + self._stop.now - place.asked if self._stop.asked else 0):
            place.process.terminate()
            place.asked += 1
        code = place.process.poll()
        if code is not None:
            self._ended(place, code)

    def _start(self, place: _Place) -> None:
        visible = "" if place.name == NO_GPU else place.name
        environment = {**self._environment, "CUDA_VISIBLE_DEVICES": visible}
        place.process = supervise.start(self._command, environment, grace=self._grace, output=subprocess.PIPE)
        place.reader = threading.Thread(target=self._read, args=(place.name, place.process), daemon=True)
        place.reader.start()

    def _read(self, name: str, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            self._say(f"[{name}] {line.decode(errors='replace').rstrip()}")

    def _ended(self, place: _Place, code: int) -> None:
        self._let_go(place)
        if code in self._ends or self._stop.asked:
            place.code = code
            return
        now = time.monotonic()
        place.crashes.append(now)
        while now - place.crashes[0] > self._patience.window:
            place.crashes.popleft()
        count = len(place.crashes)
        if count >= self._patience.crashes:
            place.code = code
            self._say(f"[{place.name}] the worker ended with status {code} {count} times: given up")
            return
        pause = delay_after(count, first=self._patience.pause, longest=self._patience.longest)
        place.due = now + pause
        self._say(f"[{place.name}] the worker ended with status {code}; it is started again in {pause:,.0f} s")

    def _let_go(self, place: _Place) -> None:
        assert place.process is not None
        assert place.process.stdin is not None
        assert place.reader is not None
        place.process.stdin.close()
        # Something that a worker started and that outlives it may still hold the pipe.
        place.reader.join(_LAST_WORDS_S)
        assert place.process.stdout is not None
        place.process.stdout.close()
        place.process = None

    def _end_all(self) -> None:
        """Leave no worker behind, whatever ended the loop: closed pipes ask them all to stop, at the same time."""
        running = [place for place in self._places if place.process is not None]
        for place in running:
            assert place.process is not None
            assert place.process.stdin is not None
            place.process.stdin.close()
        for place in running:
            assert place.process is not None
            place.process.wait()
            self._let_go(place)


@dataclass(frozen=True, kw_only=True)
class Demand:
    """What one worker asks of a node, in Ray's terms."""

    cpus: float = 1.0
    gpus: float = 1.0

    def __str__(self) -> str:
        return f"{self.gpus:g} GPU and {self.cpus:g} CPU"


@dataclass(frozen=True, kw_only=True)
class Node:
    """A living node of the cluster."""

    node_id: str
    address: str
    host: str
    cpus: float
    gpus: float


@dataclass(frozen=True, kw_only=True)
class Placed:
    """A worker on the cluster.

    Attributes:
        name: Of its actor.
        state: `running`, or `pending` when it has no place yet or its node does not answer.
        host: Where it runs; None while it is pending.
        node_id: Of the node.
        pid: Of its process.
    """

    name: str
    state: str
    host: str | None = None
    node_id: str | None = None
    pid: int | None = None

    def to_json(self) -> dict[str, Any]:
        """One worker of `rankwise cluster status --json`."""
        return asdict(self)


_ASK_S = 30.0
_LINE = re.compile(r"^(?P<mig>\s+MIG .*|GPU \d+: .*)\(UUID: (?P<uuid>[^)]+)\)\s*$")


def visible_gpus(environment: Mapping[str, str]) -> tuple[str, ...]:
    """Names of GPUs as `CUDA_VISIBLE_DEVICES` takes them; empty where there are none.

    What `CUDA_VISIBLE_DEVICES` says counts; without it, what `nvidia-smi` lists. A GPU that is divided (MIG) gives its
    parts in its place.
    """
    said = environment.get("CUDA_VISIBLE_DEVICES")
    if said is not None:
        names = tuple(name.strip() for name in said.split(",") if name.strip())
        # CUDA itself stops at the first name that is none; -1 is the usual way to say none at all.
        return names[: names.index("-1")] if "-1" in names else names
    program = shutil.which("nvidia-smi")
    if program is None:
        return ()
    try:
        done = subprocess.run([program, "-L"], capture_output=True, text=True, timeout=_ASK_S)
    except subprocess.TimeoutExpired:
        return ()
    return listed_gpus(done.stdout) if done.returncode == 0 else ()


def listed_gpus(text: str) -> tuple[str, ...]:
    """The names in what `nvidia-smi -L` prints."""
    found: list[list[str]] = []
    for line in text.splitlines():
        match = _LINE.match(line)
        if match is None:
            continue
        if match["mig"].startswith("GPU"):
            found.append([match["uuid"]])
        elif found:
            found[-1].append(match["uuid"])
    return tuple(name for gpu in found for name in (gpu[1:] or gpu))


_OF_THE_MACHINE = 0xEFFFFFFC
"""The kernel's number of the machine's own namespace of processes; those of containers count from `_OF_CONTAINERS`."""
_OF_CONTAINERS = 0xF0000000


def host() -> str:
    """The name of this machine; in a container with the number of its namespace of processes, as `NAME/361`.

    Containers may share a name (those in the network of their machine do), and do not see each other's processes.
    """
    name = socket.gethostname()
    try:
        number = int(os.readlink("/proc/self/ns/pid").partition("[")[2].rstrip("]"))
    except (OSError, ValueError):
        return name
    return name if number == _OF_THE_MACHINE else f"{name}/{number - _OF_CONTAINERS}"


def worker_name(pid: int) -> str:
    """What the queue calls the worker of a process."""
    return f"{host()}:{pid}"


def this_worker() -> Worker:
    """This process as a worker."""
    return Worker(name=worker_name(os.getpid()), host=host(), pid=os.getpid())

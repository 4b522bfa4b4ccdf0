"""Local placer: one worker process per GPU, restarted after a crash; the visible GPUs and this machine's name."""

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
from dataclasses import dataclass, field

from rankwise import supervise
from rankwise.backoff import delay_after
from rankwise.jobs.job import Worker
from rankwise.worker.heartbeat import Stop

NO_GPU = "cpu"
"""Slot of the only worker on a machine without a GPU."""
_POLL_S = 0.2
_OUTPUT_WAIT_S = 5.0
_INTERRUPTED = 130
_USAGE = 2


@dataclass(frozen=True, kw_only=True)
class RestartPolicy:
    """How often a crashed worker is restarted: `max_crashes` within `window` seconds are final."""

    max_crashes: int = 5
    window: float = 600.0
    first_delay: float = 1.0
    longest_delay: float = 60.0


@dataclass
class _Slot:
    """One GPU and the worker on it."""

    name: str
    process: subprocess.Popen[bytes] | None = None
    reader: threading.Thread | None = None
    crashes: deque[float] = field(default_factory=deque)
    restart_at: float = 0.0
    code: int | None = None
    signals_sent: int = 0


class LocalPlacer:
    """Runs one worker per GPU (one in all without a GPU) until all have ended.

    A worker has ended with status 0, 2 (usage), 130 (interrupted), and with `drain` also 1 (a job failed); any other
    exit is a crash. The first request to stop sends SIGTERM, so that workers write checkpoints, the second another one.
    Workers stop within `grace` seconds of this process's death. Their output goes to `say`, line by line.
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
        restarts: RestartPolicy | None = None,
    ) -> None:
        self._command = list(command)
        self._environment = dict(environment)
        self._stop = stop
        self._say = say
        self._grace = grace
        self._restarts = restarts or RestartPolicy()
        self._final_codes = {0, _USAGE, _INTERRUPTED} | ({1} if drain else set())
        self._slots = [_Slot(name) for name in gpus or (NO_GPU,)]

    def run(self) -> int:
        """Run until all workers have ended; 0, or the first exit status that is not 0."""
        try:
            while any(slot.code is None for slot in self._slots):
                for slot in self._slots:
                    self._check(slot)
                time.sleep(_POLL_S)
        finally:
            self._end_all()
        return next((slot.code for slot in self._slots if slot.code), 0)

    def _check(self, slot: _Slot) -> None:
        if slot.code is not None:
            return
        if slot.process is None:
            if self._stop.requested:
                slot.code = _INTERRUPTED
            elif time.monotonic() >= slot.restart_at:
                self._start(slot)
            return
        for _ in range(1 + self._stop.immediate - slot.signals_sent if self._stop.requested else 0):
            slot.process.terminate()
            slot.signals_sent += 1
        code = slot.process.poll()
        if code is not None:
            self._handle_exit(slot, code)

    def _start(self, slot: _Slot) -> None:
        visible = "" if slot.name == NO_GPU else slot.name
        environment = {**self._environment, "CUDA_VISIBLE_DEVICES": visible}
        slot.process = supervise.start(self._command, environment, grace=self._grace, output=subprocess.PIPE)
        slot.reader = threading.Thread(target=self._read, args=(slot.name, slot.process), daemon=True)
        slot.reader.start()

    def _read(self, name: str, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            self._say(f"[{name}] {line.decode(errors='replace').rstrip()}")

    def _handle_exit(self, slot: _Slot, code: int) -> None:
        self._close_pipes(slot)
        if code in self._final_codes or self._stop.requested:
            slot.code = code
            return
        now = time.monotonic()
        slot.crashes.append(now)
        while now - slot.crashes[0] > self._restarts.window:
            slot.crashes.popleft()
        count = len(slot.crashes)
        if count >= self._restarts.max_crashes:
            slot.code = code
            self._say(f"[{slot.name}] the worker ended with status {code} {count} times and is not restarted")
            return
        pause = delay_after(count, first=self._restarts.first_delay, longest=self._restarts.longest_delay)
        slot.restart_at = now + pause
        self._say(f"[{slot.name}] the worker ended with status {code}; restarting it in {pause:,.0f} s")

    def _close_pipes(self, slot: _Slot) -> None:
        assert slot.process is not None
        assert slot.process.stdin is not None
        assert slot.reader is not None
        slot.process.stdin.close()
        # A process that the worker started may still hold the pipe.
        slot.reader.join(_OUTPUT_WAIT_S)
        assert slot.process.stdout is not None
        slot.process.stdout.close()
        slot.process = None

    def _end_all(self) -> None:
        """Stop all workers in parallel, by closing their pipes."""
        running = [slot for slot in self._slots if slot.process is not None]
        for slot in running:
            assert slot.process is not None
            assert slot.process.stdin is not None
            slot.process.stdin.close()
        for slot in running:
            assert slot.process is not None
            slot.process.wait()
            self._close_pipes(slot)


_NVIDIA_SMI_TIMEOUT_S = 30.0
_GPU_LINE = re.compile(r"^(?P<mig>\s+MIG .*|GPU \d+: .*)\(UUID: (?P<uuid>[^)]+)\)\s*$")


def visible_gpus(environment: Mapping[str, str]) -> tuple[str, ...]:
    """GPUs of `CUDA_VISIBLE_DEVICES`, or if unset of `nvidia-smi`, with MIG instances in place of their GPU."""
    variable = environment.get("CUDA_VISIBLE_DEVICES")
    if variable is not None:
        names = tuple(name.strip() for name in variable.split(",") if name.strip())
        # CUDA stops at the first invalid name; -1 usually means no GPU.
        return names[: names.index("-1")] if "-1" in names else names
    program = shutil.which("nvidia-smi")
    if program is None:
        return ()
    try:
        done = subprocess.run([program, "-L"], capture_output=True, text=True, timeout=_NVIDIA_SMI_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return ()
    return listed_gpus(done.stdout) if done.returncode == 0 else ()


def listed_gpus(text: str) -> tuple[str, ...]:
    """The names in the output of `nvidia-smi -L`."""
    gpus: list[list[str]] = []
    for line in text.splitlines():
        match = _GPU_LINE.match(line)
        if match is None:
            continue
        if match["mig"].startswith("GPU"):
            gpus.append([match["uuid"]])
        elif gpus:
            gpus[-1].append(match["uuid"])
    return tuple(name for gpu in gpus for name in (gpu[1:] or gpu))


_HOST_NAMESPACE = 0xEFFFFFFC
"""Inode of the initial PID namespace; other namespaces count up from `_FIRST_CONTAINER_NAMESPACE`."""
_FIRST_CONTAINER_NAMESPACE = 0xF0000000


def host_name() -> str:
    """This machine's name, in a container with its PID namespace (`NAME/361`): containers may share host names."""
    name = socket.gethostname()
    try:
        number = int(os.readlink("/proc/self/ns/pid").partition("[")[2].rstrip("]"))
    except (OSError, ValueError):
        return name
    return name if number == _HOST_NAMESPACE else f"{name}/{number - _FIRST_CONTAINER_NAMESPACE}"


def worker_name(pid: int) -> str:
    """The name in the queue of the worker with this PID."""
    return f"{host_name()}:{pid}"


def this_worker() -> Worker:
    """This process as a worker."""
    return Worker(name=worker_name(os.getpid()), host=host_name(), pid=os.getpid())

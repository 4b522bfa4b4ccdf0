"""Wall time, CPU time and memory: of steps in this process, and of whole commands with their children."""

from __future__ import annotations

import os
import statistics
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil

_SAMPLE_S = 0.25


@dataclass(frozen=True, kw_only=True)
class Stamp:
    """A moment: seconds of wall time and of this process's CPU time (all threads)."""

    wall: float
    cpu: float

    @classmethod
    def now(cls) -> Stamp:
        return cls(wall=time.perf_counter(), cpu=time.process_time())


def steps_between(stamps: Sequence[Stamp]) -> tuple[list[float], list[float]]:
    """Wall and CPU seconds of each step, given the moments at which steps ended: the first step is not counted."""
    pairs = list(pairwise(stamps))
    return [b.wall - a.wall for a, b in pairs], [b.cpu - a.cpu for a, b in pairs]


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, smallest, largest and number of some values."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "n": len(values)}


@dataclass(frozen=True, kw_only=True)
class Use:
    """What a command took.

    Attributes:
        code: Its exit code.
        started: Seconds since the epoch at its start.
        wall: Seconds until it ended.
        cpu: CPU seconds of it and of the children it waited for.
        peak_bytes: Largest resident memory: the sum over its processes of each one's high-water mark.
    """

    code: int
    started: float
    wall: float
    cpu: float
    peak_bytes: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def measure_command(command: Sequence[str], environment: Mapping[str, str], log: Path, cwd: Path) -> Use:
    """Run a command to its end, its output in a file."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        started, began = time.time(), time.perf_counter()
        process = subprocess.Popen(command, env=dict(environment), cwd=cwd, stdout=output, stderr=subprocess.STDOUT)
        ended = threading.Event()
        marks: dict[int, int] = {}
        watch = threading.Thread(target=_watch, args=(process.pid, marks, ended), daemon=True)
        watch.start()
        try:
            _, status, usage = os.wait4(process.pid, 0)
        except BaseException:
            process.kill()
            raise
        finally:
            ended.set()
            watch.join()
        wall = time.perf_counter() - began
    process.returncode = os.waitstatus_to_exitcode(status)
    # NB: not `ru_maxrss`, which a process inherits from whoever started it: it would be the benchmark's own.
    peak = sum(marks.values())
    cpu = usage.ru_utime + usage.ru_stime
    return Use(code=process.returncode, started=started, wall=wall, cpu=cpu, peak_bytes=peak)


def _watch(pid: int, marks: dict[int, int], ended: threading.Event) -> None:
    """Note the high-water mark of a process and of its children while they live."""
    while not ended.wait(_SAMPLE_S):
        try:
            family = [pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))]
        except psutil.Error:
            continue
        for member in family:
            if (mark := high_water_mark(member)) is not None:
                marks[member] = mark


def high_water_mark(pid: int) -> int | None:
    """Bytes of the largest resident set of a process so far; None when it is gone."""
    try:
        text = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    for line in text.splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return None

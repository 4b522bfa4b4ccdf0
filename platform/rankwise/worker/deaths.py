"""Why a child died, as far as its exit status, the kernel and its last words tell."""

from __future__ import annotations

import signal
from pathlib import Path

LESS_MEMORY = (
    "lower training.per_device_train_batch_size or training.max_length, set training.gradient_checkpointing, "
    "or train fewer arms together (--max-arms)"
)
_TAIL = 2000


def oom_kills() -> int:
    """How often the kernel has killed a process for memory, in this control group or on this machine, so far."""
    for path, key in ((Path("/sys/fs/cgroup/memory.events"), "oom_kill"), (Path("/proc/vmstat"), "oom_kill")):
        try:
            lines = path.read_text().splitlines()
        except OSError:
            continue
        for line in lines:
            name, _, value = line.partition(" ")
            if name == key:
                return int(value)
    return 0


def explain(code: int, phase: str, log: Path, *, killed_for_memory: bool) -> str:
    """What to write into a job whose child has died.

    Args:
        code: The exit status, as `subprocess` gives it: negative for a signal.
        phase: What the child was doing.
        log: The file with what it wrote to its standard error.
        killed_for_memory: Whether the kernel killed something for memory in the meantime.
    """
    if code >= 0:
        how = f"the worker's process ended with status {code} while it was at: {phase}"
    elif -code == signal.SIGKILL and killed_for_memory:
        how = f"out of memory: the kernel killed the worker's process while it was at: {phase}; {LESS_MEMORY}"
    elif -code == signal.SIGKILL:
        how = (
            f"the worker's process was killed (SIGKILL) while it was at: {phase}; if nobody did that, it was for "
            f"memory: {LESS_MEMORY}"
        )
    else:
        how = f"the worker's process crashed ({signal.Signals(-code).name}) while it was at: {phase}"
    said = tail(log)
    return f"{how}; its last words, in {log}:\n{said}" if said else f"{how}; it left no words in {log}"


def tail(log: Path, size: int = _TAIL) -> str:
    """The last lines of a file."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - size))
            text = file.read().decode(errors="replace")
    except OSError:
        return ""
    return text.strip()

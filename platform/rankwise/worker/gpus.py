"""Which GPUs there are for this process, without importing torch."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Mapping

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

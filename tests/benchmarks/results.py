"""What was measured, on disk: one JSON file for each part and micro-batch, so that a part can be measured anew."""

from __future__ import annotations

import json
import os
import platform
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from benchmarks.bench import Options
from rankwise.files import write_atomically

_LIBRARIES = ("rankwise", "torch", "transformers", "peft", "bitsandbytes", "trl", "mlflow")


class Results:
    """The folder of a benchmark's numbers."""

    def __init__(self, out: Path, options: Options) -> None:
        self.out = out
        self._options = options

    def save(self, unit: str, data: dict[str, Any]) -> None:
        """Write the numbers of a unit (`throughput-4`), whole or not yet."""
        document = {
            "unit": unit,
            "when": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": machine(self._options.device),
            "options": _relevant(self._options),
            **data,
        }
        write_atomically(self._path(unit), json.dumps(document, indent=1).encode())

    def is_complete(self, unit: str) -> bool:
        """Whether a unit was measured to its end with these options on this kind of machine."""
        found = self.read().get(unit, {})
        same = found.get("options") == _relevant(self._options)
        here = found.get("machine", {}).get("device") == machine(self._options.device)["device"]
        return bool(found.get("complete")) and same and here

    def read(self) -> dict[str, dict[str, Any]]:
        """All units that are there."""
        paths = sorted((self.out / "parts").glob("*.json"))
        return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in paths}

    def _path(self, unit: str) -> Path:
        return self.out / "parts" / f"{unit}.json"


def _relevant(options: Options) -> dict[str, Any]:
    """What the numbers depend on, as JSON gives it back."""
    values = asdict(options)
    values.pop("minutes", None)
    return json.loads(json.dumps(values))


def machine(device: str) -> dict[str, Any]:
    """Where and with what: processor, GPU, versions, and how busy the machine was."""
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        "versions": {name: found for name in _LIBRARIES if (found := _version(name))},
    }


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None

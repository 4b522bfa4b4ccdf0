"""System metrics: one thread per process samples the machine and writes to every open run.

MLflow's own monitor is a thread per run, each with its own requests. The names are its names, so that the UI shows them
on the same tab.
"""

from __future__ import annotations

import logging
import shutil
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from rankwise.exceptions import StorageError
from rankwise.tracking.runs import Run

PREFIX = "system/"
_logger = logging.getLogger(__name__)
_GPU_FIELDS = ("index", "utilization.gpu", "memory.used", "memory.total", "power.draw", "enforced.power.limit")
_MIB = 1.048576  # megabytes in a mebibyte


class SystemMonitor:
    """Samples every `interval` seconds while a run is attached. Thread-safe."""

    def __init__(self, *, interval: float = 10.0, sample: Callable[[], dict[str, float]] | None = None) -> None:
        """Make a monitor; its thread starts with the first run.

        Args:
            interval: Seconds between samples.
            sample: What measures; the machine by default.
        """
        self._interval = interval
        self._sample = sample or Sampler().sample
        self._runs: dict[str, Run] = {}
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._closed = False

    def attach(self, run: Run) -> None:
        """Write samples to this run from now on."""
        with self._changed:
            self._runs[run.run_id] = run
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="rankwise-system-metrics", daemon=True)
                self._thread.start()

    def detach(self, run: Run) -> None:
        """Stop writing to this run; returns once no sample for it is on its way."""
        with self._changed:
            self._runs.pop(run.run_id, None)

    def close(self) -> None:
        """End the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _work(self) -> None:
        while True:
            values = self._sample()
            now = time.time_ns() // 1_000_000
            with self._changed:
                for run in self._runs.values():
                    # The step counts intervals since the run began, so that it goes on rising after a resumption.
                    step = max(0, round((now - run.started_ms) / 1000 / self._interval))
                    try:
                        run.metrics({PREFIX + key: value for key, value in values.items()}, step, now)
                    except StorageError as error:  # A full disk ends training by its own writes, not by this thread's.
                        _logger.warning("a sample of system metrics is lost: %s", error)
                if self._changed.wait_for(lambda: self._closed, timeout=self._interval):
                    return


class Sampler:
    """Measures this machine: processor, memory, disk, network, this process, NVIDIA GPUs."""

    def __init__(self, disk: Path = Path("/")) -> None:
        """Note the counters' state; network figures count from here.

        Args:
            disk: A path on the file system to watch.
        """
        self._disk = disk
        self._process = psutil.Process()
        self._network = psutil.net_io_counters()
        self._nvidia = shutil.which("nvidia-smi")
        psutil.cpu_percent()  # The first call has nothing to compare with and says 0.

    def sample(self) -> dict[str, float]:
        """Key without prefix to value; megabytes are 10^6 bytes, as in MLflow."""
        memory = psutil.virtual_memory()
        disk = psutil.disk_usage(str(self._disk))
        values = {
            "cpu_utilization_percentage": psutil.cpu_percent(),
            "system_memory_usage_megabytes": memory.used / 1e6,
            "system_memory_usage_percentage": 100 * memory.used / memory.total,
            "process_memory_usage_megabytes": self._process.memory_info().rss / 1e6,
            "disk_usage_percentage": disk.percent,
            "disk_usage_megabytes": disk.used / 1e6,
            "disk_available_megabytes": disk.free / 1e6,
        }
        network = psutil.net_io_counters()
        if network is not None and self._network is not None:  # None on machines without an interface.
            values["network_receive_megabytes"] = (network.bytes_recv - self._network.bytes_recv) / 1e6
            values["network_transmit_megabytes"] = (network.bytes_sent - self._network.bytes_sent) / 1e6
        values |= self._gpus()
        return {key: round(value, 1) for key, value in values.items()}

    def _gpus(self) -> dict[str, float]:
        if self._nvidia is None:
            return {}
        command = [self._nvidia, f"--query-gpu={','.join(_GPU_FIELDS)}", "--format=csv,noheader,nounits"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=5.0, check=True)
        except (OSError, subprocess.SubprocessError) as error:
            _logger.warning("GPU metrics are off: %s", error)
            self._nvidia = None
            return {}
        return parse_nvidia_smi(done.stdout)


def parse_nvidia_smi(text: str) -> dict[str, float]:
    """Metrics out of nvidia-smi's CSV; what a card does not report (`[N/A]`, as under MIG) is left out.

    Args:
        text: One line per GPU with the fields index, utilization in percent, memory used and in all in MiB, power drawn
            and its limit in watts.
    """
    metrics: dict[str, float] = {}
    for line in text.strip().splitlines():
        index, *rest = (part.strip() for part in line.split(","))
        busy, used, total, power, limit = (_number(part) for part in rest)
        found = {
            "utilization_percentage": busy,
            "memory_usage_megabytes": None if used is None else used * _MIB,
            "memory_usage_percentage": None if used is None or not total else 100 * used / total,
            "power_usage_watts": power,
            "power_usage_percentage": None if power is None or not limit else 100 * power / limit,
        }
        metrics |= {f"gpu_{index}_{key}": value for key, value in found.items() if value is not None}
    return metrics


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None

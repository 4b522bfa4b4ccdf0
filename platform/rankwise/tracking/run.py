"""Writing to an MLflow run: params, metrics, tags, artifacts, and system metrics of the machine.

A `Run` writes everything to its outbox and returns at once; the sender delivers it. One process may write to several
runs; none of them is "active". One `SystemMonitor` thread samples the machine for all open runs, under the names that
MLflow's own monitor uses (which takes a thread per run).
"""

from __future__ import annotations

import io
import json
import logging
import math
import posixpath
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, SupportsFloat

import psutil

from rankwise.exceptions import RankwiseError, StorageError, TrackingError
from rankwise.redact import redact
from rankwise.tracking.outbox import Outbox
from rankwise.tracking.sender import Sender
from rankwise.tracking.values import DatasetRecord, encoded, storable

Status = Literal["FINISHED", "FAILED", "KILLED"]
Scalar = str | int | float | bool | None

KIND = "rankwise.kind"
REASON = "rankwise.reason"
SPEC_HASH = "rankwise.spec_hash"
PARENT = "mlflow.parentRunId"
NOTE = "mlflow.note.content"

_KEY = re.compile(r"[/\w.\- :]{1,250}")
_LONGEST_NOTE = 7900
_LONGEST_REASON = 2000


class Run:
    """One MLflow run. Thread-safe. As a context manager it ends FINISHED, KILLED on Ctrl-C, or FAILED on other errors.

    Only `flush`, `drain`, `end` and `leave` wait for the store. `started_ms` is where the steps of system metrics
    start. After the end, `refusals` says why MLflow refused records. Writing raises `StorageError` if the disk is full.
    """

    def __init__(
        self,
        *,
        run_id: str,
        started_ms: int,
        outbox: Outbox,
        sender: Sender,
        on_end: Callable[[Run], None] | None = None,
    ) -> None:
        """Use `Store.start_run` or `Store.resume_run`. `on_end` runs before the run ends, maybe more than once."""
        self.run_id = run_id
        self.started_ms = started_ms
        self._outbox = outbox
        self._sender = sender
        self._params: dict[str, str] = {}
        self._on_end = on_end
        self._keys: set[str] = set()
        self._ended = False
        self.refusals: tuple[str, ...] = ()
        self._lock = threading.Lock()

    def metric(self, key: str, value: SupportsFloat, step: int) -> None:
        """Log one point of a curve; see `metrics`."""
        self.metrics({key: value}, step)

    def metrics(self, values: Mapping[str, SupportsFloat], step: int, timestamp_ms: int | None = None) -> None:
        """Log points of several curves at one step, now or at `timestamp_ms` (since 1970). NaN and infinities are kept.

        Raises:
            ValueError: A key has a character that MLflow does not allow.
        """
        for key in values:
            if key not in self._keys:
                self._check_key(key)
        points = {key: float(value) for key, value in values.items()}
        self._append({"m": points, "s": step, "t": timestamp_ms or time.time_ns() // 1_000_000})

    def params(self, params: Mapping[str, Scalar]) -> None:
        """Log params. Each is written once; repeating the same value is allowed. None is skipped.

        Raises:
            ValueError: This process has already written another value.
        """
        values = _texts(params)
        for key, value in values.items():
            if (before := self._params.get(key, value)) != value:
                raise ValueError(
                    f"param {key!r} of run {self.run_id} is {before!r} and cannot become {value!r}: MLflow writes "
                    "params once; use a tag for values that change between attempts"
                )
        if new := {key: value for key, value in values.items() if key not in self._params}:
            self._append({"params": new})
            self._params |= new

    def tags(self, tags: Mapping[str, Scalar]) -> None:
        """Set tags; the last value counts. None is skipped."""
        if values := _texts(tags):
            self._append({"tags": values})

    def describe(self, markdown: str) -> None:
        """Set the description that the UI shows at the top of the run."""
        self.tags({NOTE: shorten(markdown)})

    def input(self, dataset: DatasetRecord) -> None:
        """Log a data set as an input of the run."""
        self._append({"input": asdict(dataset)})

    def text(self, text: str, path: str) -> None:
        """Log a text as the artifact `path`, redacted unless it is HTML, where that would break scripts."""
        self.data(encoded(text if path.endswith(".html") else redact(text)), path)

    def data(self, content: bytes, path: str) -> None:
        """Log bytes as the artifact `path`."""
        self._file(content, path)

    def json(self, value: Any, path: str) -> None:
        """Log a value as a JSON artifact."""
        self._file(encoded(json.dumps(value, indent=2, ensure_ascii=False) + "\n"), path)

    def table(self, rows: Sequence[Mapping[str, Any]], path: str) -> None:
        """Log rows as a table that the UI shows and `MlflowClient.load_table` reads; an earlier one is replaced."""
        if not path.endswith(".json"):
            raise ValueError(f"a table's artifact path must end with .json, got {path!r}")
        columns = list(dict.fromkeys(key for row in rows for key in row))
        data = [[_plain(row.get(column)) for column in columns] for row in rows]
        self._file(encoded(json.dumps({"columns": columns, "data": data}, ensure_ascii=False)), path, table=True)

    def figure(self, figure: Any, path: str) -> None:
        """Log a matplotlib figure (`.png`, `.svg`, `.pdf`)."""
        buffer = io.BytesIO()
        figure.savefig(buffer, format=path.rpartition(".")[2], bbox_inches="tight")
        self._file(buffer.getvalue(), path)

    def restart(self) -> None:
        """Set the status to RUNNING again; `Store.resume_run` calls this."""
        self._append({"status": "RUNNING"})

    def flush(self, timeout: float = 60.0) -> None:
        """Wait until everything logged so far is delivered.

        Raises:
            TrackingError: `timeout` seconds were not enough.
        """
        if not self.drain(timeout):
            raise TrackingError(self._timeout_message(timeout))

    def drain(self, timeout: float) -> bool:
        """Wait for delivery; False after `timeout` seconds, or if this writer is fenced off."""
        return self._ended or self._sender.drain(self._outbox, timeout)

    def end(self, status: Status = "FINISHED", reason: str | None = None, timeout: float = 60.0) -> bool:
        """End the run and wait `timeout` seconds for delivery; return whether everything is delivered.

        Delivery of the rest continues while the store is open, and then with `Store.sync`. Records that MLflow refuses
        permanently are kept beside the outbox and logged as errors. `reason` becomes the tag `rankwise.reason`. A
        second call does nothing.
        """
        last: list[Mapping[str, Any]] = [{"end": status, "t": time.time_ns() // 1_000_000}]
        if reason is not None:
            last.insert(0, {"tags": {REASON: shorten(redact(reason), _LONGEST_REASON)}})
        return self._close(last, timeout)

    def leave(self, timeout: float = 60.0) -> bool:
        """Stop writing to the run without changing its status; otherwise like `end`."""
        return self._close([], timeout)

    def _close(self, last: Sequence[Mapping[str, Any]], timeout: float) -> bool:
        if self._on_end is not None:
            self._on_end(self)
        with self._lock:
            if self._ended:
                return True
            for record in last:
                self._outbox.append(record)
            self._ended = True
        delivered = self._sender.drain(self._outbox, timeout)
        self.refusals = tuple(self._sender.detach(self._outbox))
        return delivered

    def __enter__(self) -> Run:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.end("FINISHED")
        elif isinstance(error, (KeyboardInterrupt, SystemExit)):
            self.end("KILLED", "interrupted", timeout=10.0)
        else:
            text = str(error) if isinstance(error, RankwiseError) else f"{type(error).__name__}: {error}"
            self.end("FAILED", text)

    def _append(self, record: Mapping[str, Any]) -> None:
        with self._lock:
            if self._ended:
                raise RuntimeError(f"run {self.run_id} has ended and accepts no more records")
            self._outbox.append(record)

    def _file(self, content: bytes, path: str, *, table: bool = False) -> None:
        if posixpath.normpath(path) != path or path.startswith(("/", "..")):
            raise ValueError(f"an artifact path must be relative and normalized (`dir/name.ext`), got {path!r}")
        self._append({"file": self._outbox.spool(content, path), "to": path, "table": table})

    def _check_key(self, key: str) -> None:
        if not _KEY.fullmatch(key) or posixpath.normpath(key) != key or key.startswith(("/", "..")):
            raise ValueError(
                f"invalid metric key {key!r}: use up to 250 letters, digits, spaces and _ - . / : as a relative path"
            )
        self._keys.add(key)

    def _timeout_message(self, timeout: float) -> str:
        cause = self._sender.outage or "the store is slow"
        return (
            f"run {self.run_id}: not delivered within {timeout:g} s ({cause}); its records stay in "
            f"{self._outbox.path}; `rankwise sync` delivers them"
        )


def shorten(text: str, limit: int = _LONGEST_NOTE) -> str:
    """Cut a text to the length of a tag, with a mark that it was shortened."""
    return text if len(text) <= limit else text[: limit - 20].rstrip() + " ... (shortened)"


def _texts(values: Mapping[str, Scalar]) -> dict[str, str]:
    return {key: storable(str(value)) for key, value in values.items() if value is not None}


def _plain(value: Any) -> Any:
    """Replace NaN and infinities by null, as pandas does in JSON."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


PREFIX = "system/"
_logger = logging.getLogger(__name__)
_GPU_FIELDS = ("index", "utilization.gpu", "memory.used", "memory.total", "power.draw", "enforced.power.limit")
_MIB = 1.048576  # megabytes in a mebibyte


class SystemMonitor:
    """Samples the machine every `interval` seconds for all attached runs. Thread-safe."""

    def __init__(self, *, interval: float = 10.0, sample: Callable[[], dict[str, float]] | None = None) -> None:
        """Create a monitor that calls `sample`; its thread starts with the first run."""
        self._interval = interval
        self._sample = sample or SystemSampler().sample
        self._runs: dict[str, Run] = {}
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._closed = False

    def attach(self, run: Run) -> None:
        """Start writing samples to this run."""
        with self._changed:
            self._runs[run.run_id] = run
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="rankwise-system-metrics", daemon=True)
                self._thread.start()

    def detach(self, run: Run) -> None:
        """Stop writing samples to this run; afterwards no sample is in flight."""
        with self._changed:
            self._runs.pop(run.run_id, None)

    def close(self) -> None:
        """Stop the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _work(self) -> None:
        while True:
            values = self._sample()
            now = time.time_ns() // 1_000_000
            with self._changed:
                for run in self._runs.values():
                    # Counts intervals since the start of the run, so it keeps rising after a resume.
                    step = max(0, round((now - run.started_ms) / 1000 / self._interval))
                    try:
                        run.metrics({PREFIX + key: value for key, value in values.items()}, step, now)
                    except StorageError as error:  # On a full disk, the training's own writes fail too and end it.
                        _logger.warning("lost a sample of system metrics: %s", error)
                if self._changed.wait_for(lambda: self._closed, timeout=self._interval):
                    return


class SystemSampler:
    """Measures CPU, memory, disk, network, this process and NVIDIA GPUs."""

    def __init__(self, disk: Path = Path("/")) -> None:
        """Start counting network traffic; `disk` is a path on the file system to measure."""
        self._disk = disk
        self._process = psutil.Process()
        self._network = psutil.net_io_counters()
        self._nvidia = shutil.which("nvidia-smi")
        psutil.cpu_percent()  # The first call always returns 0.

    def sample(self) -> dict[str, float]:
        """Return key (without prefix) to value. Megabytes are 10^6 bytes, as in MLflow."""
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
            _logger.warning("GPU metrics are disabled: nvidia-smi failed: %s", error)
            self._nvidia = None
            return {}
        return parse_nvidia_smi(done.stdout)


def parse_nvidia_smi(text: str) -> dict[str, float]:
    """Parse nvidia-smi's CSV; values that a GPU does not report (`[N/A]`, as under MIG) are left out.

    Fields: index, utilization in percent, memory used and total in MiB, power draw and limit in watts.
    """
    metrics: dict[str, float] = {}
    for line in text.strip().splitlines():
        index, *rest = (part.strip() for part in line.split(","))
        busy, used, total, power, limit = (_number(part) for part in rest)
        values = {
            "utilization_percentage": busy,
            "memory_usage_megabytes": None if used is None else used * _MIB,
            "memory_usage_percentage": None if used is None or not total else 100 * used / total,
            "power_usage_watts": power,
            "power_usage_percentage": None if power is None or not limit else 100 * power / limit,
        }
        metrics |= {f"gpu_{index}_{key}": value for key, value in values.items() if value is not None}
    return metrics


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None

"""A run: what an arm, a sweep or an evaluation tells MLflow.

Everything goes into the run's outbox and returns at once; the sender delivers it. There is no active run: several runs
live side by side in one process, each known by its id.

MLflow's own monitor is a thread per run, each with its own requests. The names are its names, so that the UI shows them
on the same tab.

- System metrics: one thread per process samples the machine and writes to every open run.
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
    """One MLflow run. Thread-safe. A context manager: ends FINISHED, KILLED on Ctrl-C, FAILED on any other error.

    Nothing here needs the store to answer, but for the waiting of `flush`, `drain`, `end` and `leave`.

    Attributes:
        run_id: MLflow's id.
        started_ms: What the steps of system metrics count from.
        refusals: After the end, why MLflow refused records for good.
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
        """Use `Store.start_run` or `Store.resume_run`.

        Args:
            run_id: MLflow's id.
            started_ms: What the steps of system metrics count from, milliseconds since 1970.
            outbox: Where records go.
            sender: Who delivers them.
            on_end: Called before the run ends, perhaps more than once.
        """
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
        """One point of a curve; see `metrics`."""
        self.metrics({key: value}, step)

    def metrics(self, values: Mapping[str, SupportsFloat], step: int, timestamp_ms: int | None = None) -> None:
        """Points of several curves at one step.

        Args:
            values: Key to value; NaN and infinities are kept.
            step: The step.
            timestamp_ms: Milliseconds since 1970; now when left out.

        Raises:
            ValueError: A key has a character that MLflow does not take.
            StorageError: The disk is full.
        """
        for key in values:
            if key not in self._keys:
                self._check_key(key)
        points = {key: float(value) for key, value in values.items()}
        self._append({"m": points, "s": step, "t": timestamp_ms or time.time_ns() // 1_000_000})

    def params(self, params: Mapping[str, Scalar]) -> None:
        """Parameters, which are written once: the same value again is fine. None is left out.

        Raises:
            ValueError: This process has written another value.
        """
        values = _texts(params)
        for key, value in values.items():
            if (before := self._params.get(key, value)) != value:
                raise ValueError(
                    f"param {key!r} of run {self.run_id} is {before!r} and cannot become {value!r}: MLflow writes "
                    "params once; what may change from one attempt to the next is a tag"
                )
        if new := {key: value for key, value in values.items() if key not in self._params}:
            self._append({"params": new})
            self._params |= new

    def tags(self, tags: Mapping[str, Scalar]) -> None:
        """Tags; the last value counts. None is left out."""
        if values := _texts(tags):
            self._append({"tags": values})

    def describe(self, markdown: str) -> None:
        """The description that the UI shows at the head of the run."""
        self.tags({NOTE: shorten(markdown)})

    def input(self, dataset: DatasetRecord) -> None:
        """A data set that the run reads."""
        self._append({"input": asdict(dataset)})

    def text(self, text: str, path: str) -> None:
        """A text as the artifact `path`; secrets are taken out, but for pages, whose scripts that would break."""
        self.data(encoded(text if path.endswith(".html") else redact(text)), path)

    def data(self, content: bytes, path: str) -> None:
        """Bytes as the artifact `path`."""
        self._file(content, path)

    def json(self, value: Any, path: str) -> None:
        """A value as JSON in the artifact `path`."""
        self._file(encoded(json.dumps(value, indent=2, ensure_ascii=False) + "\n"), path)

    def table(self, rows: Sequence[Mapping[str, Any]], path: str) -> None:
        """Rows as a table that the UI shows and `MlflowClient.load_table` reads; replaces an earlier one.

        Args:
            rows: Column to JSON value; a column that a row lacks is null.
            path: Ends with `.json`.
        """
        if not path.endswith(".json"):
            raise ValueError(f"a table's artifact path must end with .json, got {path!r}")
        columns = list(dict.fromkeys(key for row in rows for key in row))
        data = [[_plain(row.get(column)) for column in columns] for row in rows]
        self._file(encoded(json.dumps({"columns": columns, "data": data}, ensure_ascii=False)), path, table=True)

    def figure(self, figure: Any, path: str) -> None:
        """A figure of matplotlib (`.png`, `.svg`, `.pdf`)."""
        buffer = io.BytesIO()
        figure.savefig(buffer, format=path.rpartition(".")[2], bbox_inches="tight")
        self._file(buffer.getvalue(), path)

    def restart(self) -> None:
        """Say that the run is RUNNING again; `Store.resume_run` does it."""
        self._append({"status": "RUNNING"})

    def flush(self, timeout: float = 60.0) -> None:
        """Wait until everything so far was delivered.

        Raises:
            TrackingError: It was not within `timeout` seconds.
        """
        if not self.drain(timeout):
            raise TrackingError(self._waiting(timeout))

    def drain(self, timeout: float) -> bool:
        """Wait until everything so far was delivered; False after `timeout` seconds, or when the fence has fallen."""
        return self._ended or self._sender.drain(self._outbox, timeout)

    def end(self, status: Status = "FINISHED", reason: str | None = None, timeout: float = 60.0) -> bool:
        """End the run and wait until all of it was delivered. A second call does nothing.

        What MLflow refused for good is kept beside the outbox and was logged as an error; training is not at fault.

        Args:
            status: MLflow's.
            reason: Why it failed or was killed: the tag `rankwise.reason`.
            timeout: Seconds to wait for the delivery.

        Returns:
            Whether all was delivered; if not, that goes on as long as the store is open, and then waits for its `sync`.
        """
        last: list[Mapping[str, Any]] = [{"end": status, "t": time.time_ns() // 1_000_000}]
        if reason is not None:
            last.insert(0, {"tags": {REASON: shorten(redact(reason), _LONGEST_REASON)}})
        return self._close(last, timeout)

    def leave(self, timeout: float = 60.0) -> bool:
        """Let go of the run and leave its state as it is; otherwise as `end`."""
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
        self.refusals = tuple(self._sender.let_go(self._outbox))
        return delivered

    def __enter__(self) -> Run:
        """The run itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the run as the block ended."""
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
                raise RuntimeError(f"run {self.run_id} has ended, it takes no more records")
            self._outbox.append(record)

    def _file(self, content: bytes, path: str, *, table: bool = False) -> None:
        if posixpath.normpath(path) != path or path.startswith(("/", "..")):
            raise ValueError(f"an artifact path is relative and plain (`dir/name.ext`), got {path!r}")
        self._append({"file": self._outbox.spool(content, path), "to": path, "table": table})

    def _check_key(self, key: str) -> None:
        if not _KEY.fullmatch(key) or posixpath.normpath(key) != key or key.startswith(("/", "..")):
            raise ValueError(
                f"metric key {key!r}: MLflow takes up to 250 letters, digits and _ - . / : or spaces, as a plain path"
            )
        self._keys.add(key)

    def _waiting(self, timeout: float) -> str:
        cause = self._sender.outage or "the store is slow"
        return f"run {self.run_id}: not delivered within {timeout:g} s, it waits in {self._outbox.path}: {cause}"


def shorten(text: str, limit: int = _LONGEST_NOTE) -> str:
    """Cut a text to what a tag holds, and say so."""
    return text if len(text) <= limit else text[: limit - 20].rstrip() + " ... (shortened)"


def _texts(values: Mapping[str, Scalar]) -> dict[str, str]:
    return {key: storable(str(value)) for key, value in values.items() if value is not None}


def _plain(value: Any) -> Any:
    """JSON has no NaN: null in a table, as pandas writes it."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


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

"""The list of all health checks, and `run_checks`, which runs them in parallel with a time limit each."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Sequence

from rankwise.doctor import machine, services
from rankwise.doctor.finding import HealthCheck, HealthFinding, HealthState, problem
from rankwise.exceptions import RankwiseError
from rankwise.settings import Settings

_ORDER = list(HealthState)


def run_checks(settings: Settings, checks: Sequence[HealthCheck]) -> list[HealthFinding]:
    """Run all checks in parallel; a check that exceeds its time limit becomes a finding."""
    began = time.monotonic()
    results: list[queue.SimpleQueue[Sequence[HealthFinding]]] = [queue.SimpleQueue() for _ in checks]
    for check, result in zip(checks, results, strict=True):
        # Not a thread pool: Python waits for a pool's threads when the process exits.
        threading.Thread(target=_run, args=(check, settings, result), name=check.name, daemon=True).start()
    findings: list[HealthFinding] = []
    for check, result in zip(checks, results, strict=True):
        left = max(0.0, began + check.timeout - time.monotonic())
        try:
            findings += result.get(timeout=left) if left else result.get_nowait()
        except queue.Empty:
            findings.append(problem(check.name, f"no answer within {check.timeout:g} seconds", check.timeout_advice))
    return findings


def worst_state(findings: Sequence[HealthFinding]) -> HealthState:
    """The worst state among findings."""
    return max((finding.state for finding in findings), key=_ORDER.index, default=HealthState.OK)


def _run(check: HealthCheck, settings: Settings, result: queue.SimpleQueue[Sequence[HealthFinding]]) -> None:
    try:
        result.put(check.run(settings))
    except RankwiseError as error:
        seen, _, advice = str(error).partition("; ")
        result.put([problem(check.name, seen, advice)])
    except Exception as error:
        text = " ".join(str(error).split())[:300]
        advice = "either the checked component or the check has a bug: report this line"
        result.put([problem(check.name, f"the check itself failed: {type(error).__name__}: {text}", advice)])


CHECKS = (
    HealthCheck(name="python", run=machine.python),
    HealthCheck(name="libraries", run=machine.libraries),
    HealthCheck(name="memory", run=machine.memory),
    HealthCheck(name="disk", run=machine.disks, timeout_advice="a disk hangs: see `df` and the kernel log"),
    HealthCheck(name="disk.sqlite", run=machine.file_systems, timeout_advice="a mount hangs: see `df` and `mount`"),
    HealthCheck(
        name="gpu.driver", run=machine.driver, timeout=20.0, timeout_advice="the driver hangs: see `nvidia-smi`"
    ),
    HealthCheck(name="compute", run=machine.compute, timeout=machine.COMPUTE_S + 5),
    HealthCheck(
        name="queue.database",
        run=services.queue,
        timeout=30.0,
        timeout_advice="the database hangs: see its log and its locks",
    ),
    HealthCheck(name="mlflow.store", run=services.mlflow, timeout=services.MLFLOW_S + 5),
    HealthCheck(name="hub", run=services.hub, timeout=15.0, timeout_advice="without a network, set HF_HUB_OFFLINE=1"),
    HealthCheck(name="ray", run=services.ray),
    HealthCheck(name="signing", run=machine.keys),
)

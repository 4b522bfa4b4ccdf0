"""Runs checks side by side, each within its own time.

- All checks, in the order in which their findings are shown.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Sequence

from rankwise.doctor import machine, services
from rankwise.doctor.finding import Check, Finding, State, problem
from rankwise.exceptions import RankwiseError
from rankwise.settings import Settings

_ORDER = list(State)


def examine(settings: Settings, checks: Sequence[Check]) -> list[Finding]:
    """Run all checks at the same time and give their findings in the order of the checks.

    One that does not end within its time is a finding, and is left behind: its thread does not keep the process alive.
    """
    began = time.monotonic()
    answers: list[queue.SimpleQueue[Sequence[Finding]]] = [queue.SimpleQueue() for _ in checks]
    for check, answer in zip(checks, answers, strict=True):
        # Not a pool: at the end of the process Python would wait for a pool's threads.
        threading.Thread(target=_look, args=(check, settings, answer), name=check.name, daemon=True).start()
    findings: list[Finding] = []
    for check, answer in zip(checks, answers, strict=True):
        left = max(0.0, began + check.timeout - time.monotonic())
        try:
            findings += answer.get(timeout=left) if left else answer.get_nowait()
        except queue.Empty:
            findings.append(problem(check.name, f"no answer within {check.timeout:g} seconds", check.slow))
    return findings


def worst(findings: Sequence[Finding]) -> State:
    """The worst state among findings."""
    return max((finding.state for finding in findings), key=_ORDER.index, default=State.OK)


def _look(check: Check, settings: Settings, answer: queue.SimpleQueue[Sequence[Finding]]) -> None:
    try:
        answer.put(check.look(settings))
    except RankwiseError as error:
        seen, _, advice = str(error).partition("; ")
        answer.put([problem(check.name, seen, advice)])
    except Exception as error:
        text = " ".join(str(error).split())[:300]
        advice = "what was to be looked at is broken, or the check is: report it with this line"
        answer.put([problem(check.name, f"the check itself failed: {type(error).__name__}: {text}", advice)])


CHECKS = (
    Check(name="python", look=machine.python),
    Check(name="libraries", look=machine.libraries),
    Check(name="memory", look=machine.memory),
    Check(name="disk", look=machine.disks, slow="a disk hangs: see `df` and the kernel's log"),
    Check(name="disk.sqlite", look=machine.file_systems, slow="a mount hangs: see `df` and `mount`"),
    Check(name="gpu.driver", look=machine.driver, timeout=20.0, slow="the driver hangs: see `nvidia-smi`"),
    Check(name="compute", look=machine.compute, timeout=machine.COMPUTE_S + 5),
    Check(
        name="queue.database", look=services.queue, timeout=30.0, slow="the database hangs: see its log and its locks"
    ),
    Check(name="mlflow.store", look=services.mlflow, timeout=services.MLFLOW_S + 5),
    Check(name="hub", look=services.hub, timeout=15.0, slow="set HF_HUB_OFFLINE=1 where there is no network"),
    Check(name="ray", look=services.ray),
    Check(name="signing", look=machine.keys),
)

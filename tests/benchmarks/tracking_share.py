"""Part `tracking`: what curves and system metrics in MLflow cost the training, in the process that trains.

A difference of a percent between two runs cannot be measured on a shared machine; so what tracking does is measured by
itself: the time that the training thread spends in it, and the CPU time of its threads.
"""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
from helpers.local_store import prepared_home

from benchmarks.bench import Bench
from benchmarks.engine import Marks
from benchmarks.subjects import label
from rankwise.logs import bound
from rankwise.tasks.arm_run import Curves
from rankwise.tracking.store import Store
from rankwise.training.arm import ArmTask, StepRecord
from rankwise.training.loop import train_pack


class _Timed(Marks):
    """Passes steps on, and counts the seconds that this takes."""

    def __init__(self, curves: Curves, device: Any) -> None:
        super().__init__(device)
        self.seconds = 0.0
        self._curves = curves

    def on_step(self, spec_hash: str, record: StepRecord) -> None:
        super().on_step(spec_hash, record)
        began = time.perf_counter()
        self._curves.on_step(spec_hash, record)
        self.seconds += time.perf_counter() - began


def measure(bench: Bench, micro_batch: int, save: Callable[[dict[str, Any]], None]) -> None:
    """Train one pack with curves in a local store."""
    options = bench.options
    bench.check_time(90.0)
    workload = bench.workload(micro_batch, steps=max(options.steps, options.sweep_steps // 2))
    arms = workload.arms[: options.sweep_arms]
    settings = prepared_home(bench.scratch / f"tracking-{micro_batch}-{time.monotonic_ns()}")
    with Store.open(settings) as store:
        experiment = store.experiment("benchmark")
        runs = {arm.spec_hash: (store.start_run(experiment, label(arm), params=arm.params), arm) for arm in arms}
        observer = _Timed(Curves(runs, lambda count: None, lambda text: None), bench.base.device)
        before = _threads()
        # As `tasks.train` has it: what the log of a step imports is there before the first one.
        with bound(step=0):
            train_pack(
                bench.base,
                [ArmTask(spec=arm, train=workload.rows) for arm in arms],
                directory=Path(tempfile.mkdtemp(dir=bench.scratch)),
                observer=observer,
            )
        threads = _threads() - before
        for run, _ in runs.values():
            run.end()
    first, last, count = observer.stamps[0], observer.stamps[-1], len(observer.stamps)
    # The first step has no beginning: it is taken to be as long as the others.
    wall = (last.wall - first.wall) * count / (count - 1)
    cpu = (last.cpu - first.cpu) * count / (count - 1)
    result = {
        "complete": True,
        "arms": len(arms),
        "steps": count,
        "wall": wall,
        "cpu": cpu,
        "observer": observer.seconds,
        "threads": threads,
        "share": observer.seconds / wall + threads / cpu,
    }
    own, others = 1000 * observer.seconds, 1000 * threads
    bench.say(
        f"tracking, micro-batch {micro_batch}: {result['share']:.2%} of the step time: {own:.0f} ms of {wall:.0f} s in "
        f"the training's thread, {others:.0f} ms of {cpu:.0f} s CPU in others"
    )
    save(result)


def _threads() -> float:
    """CPU seconds of this process's other Python threads: the sender and the monitor. Torch's are no Python threads."""
    others = {thread.native_id for thread in threading.enumerate() if thread is not threading.current_thread()}
    return sum(each.user_time + each.system_time for each in psutil.Process().threads() if each.id in others)

"""`rankwise worker --drain` whose child has a fault: `-m helpers.faulty_worker MAX_ARMS LEASE PATIENCE`."""

from __future__ import annotations

import os
import sys

from rich.console import Console

from helpers.faulty_child import shift_clock
from rankwise.cli.output import Bars
from rankwise.settings import Settings, set_process_defaults
from rankwise.tasks.local_worker import local_worker
from rankwise.worker.heartbeat import Stop, Timing
from rankwise.worker.loop import LoopOptions


def main(max_arms: int, lease: float, patience: float) -> None:
    if os.environ.get("FAULT") == "clock":
        shift_clock()
    set_process_defaults()
    stop = Stop()
    changes = {"FAULT_PARENT": str(os.getpid())}
    timing = Timing.of_lease(lease, patience=patience)
    with (
        stop.on_signals(),
        Bars(Console(stderr=True)) as bars,
        local_worker(
            Settings.load(), bars, stop, timing=timing, changes=changes, program="helpers.faulty_child"
        ) as loop,
    ):
        loop.work(LoopOptions(drain=True, max_arms=max_arms))


if __name__ == "__main__":
    main(int(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3]))

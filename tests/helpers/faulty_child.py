"""A worker's child with a fault built in: `FAULT` in its environment says which. The faults strike once for a home.

| FAULT | what happens |
|---|---|
| `hang` | reading the rows never comes back |
| `stop_before_registering` | parent and child are stopped (SIGSTOP) between the token check and the registration |
| `stop_in_mlflow`, `stop_in_queue` | the same, inside a writing transaction on that database |
| `registry_away` | the first registration finds no server |
| `clock` | `time.time` is an hour ahead |
"""

from __future__ import annotations

import os
import signal
import sqlite3
import time
from pathlib import Path

import rankwise.tasks.child


def strikes(name: str) -> bool:
    """Whether a fault is asked for and has not struck yet."""
    if os.environ.get("FAULT") != name:
        return False
    mark = Path(os.environ["RANKWISE_HOME"]) / f"fault-{name}"
    try:
        mark.touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def shift_clock() -> None:
    """Let the wall clock of this process be an hour ahead; the monotonic one is not moved by such a fault."""
    real, real_ns = time.time, time.time_ns
    time.time = lambda: real() + 3600.0
    time.time_ns = lambda: real_ns() + 3_600_000_000_000


def main() -> None:
    fault = os.environ.get("FAULT")
    if fault == "clock":
        shift_clock()
    if fault == "hang":
        from rankwise.tasks.arm_rows import RowsCache

        load = RowsCache._load

        def hang_in_the_data_loader(self, *arguments):
            while strikes("hang") or os.environ.get("HANGS"):
                os.environ["HANGS"] = "yes"
                time.sleep(1)
            return load(self, *arguments)

        RowsCache._load = hang_in_the_data_loader
    if fault in {"stop_before_registering", "stop_in_mlflow", "stop_in_queue"}:
        import rankwise.flavor as flavor

        log_adapter = flavor.log_adapter

        def stopped(*arguments, **named):
            if strikes(fault):
                if fault != "stop_before_registering":
                    name = {"stop_in_mlflow": "mlflow.db", "stop_in_queue": "rankwise.db"}[fault]
                    connection = sqlite3.connect(Path(os.environ["RANKWISE_HOME"]) / name, isolation_level=None)
                    connection.execute("BEGIN IMMEDIATE")
                os.kill(int(os.environ["FAULT_PARENT"]), signal.SIGSTOP)
                os.kill(os.getpid(), signal.SIGSTOP)
            return log_adapter(*arguments, **named)

        flavor.log_adapter = stopped
    if fault == "registry_away":
        import rankwise.flavor as flavor
        from rankwise.exceptions import TrackingError

        registered = flavor.log_adapter

        def away(*arguments, **named):
            if strikes("registry_away"):
                raise TrackingError("the server is away")
            return registered(*arguments, **named)

        flavor.log_adapter = away
    rankwise.tasks.child.main()


if __name__ == "__main__":
    main()

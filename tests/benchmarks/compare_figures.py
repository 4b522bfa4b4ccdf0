"""What comparing a large sweep costs: `compare` and `report` of 1,000 arms in a real SQLite store of MLflow.

`make bench-compare`. Each command runs as a process of its own, three times, beside one that only imports what they
import. Filling the store takes four minutes; `--home DIR` keeps it for the next time.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from helpers.many_arms import fill

from rankwise.settings import Settings
from rankwise.tracking.store import Store

EXPERIMENT = "many"
# What every command that compares imports and opens, without reading anything.
START_UP = """
from rankwise.cli.main import cli
from rankwise.evaluation.gather import gather
from rankwise.report.comparison_output import comparison_json
from rankwise.report.page import report_page
from rankwise.report.comparison_output import comparison_view
from rankwise.settings import Settings
from rankwise.tasks.sweep_lifecycle import with_queued_arms
from rankwise.tracking.store import Store
Store.open(Settings.load()).close()
"""


def main() -> None:
    """Fill a store if need be, run the commands, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", type=int, default=1000, help="how many arms")
    parser.add_argument("--times", type=int, default=3, help="how often each command runs")
    parser.add_argument("--home", type=Path, help="where the store is kept; a temporary directory otherwise")
    parser.add_argument("--json", type=Path, help="where to write the figures too")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        home = given.home or Path(scratch) / "home"
        _fill(home, given.arms)
        page = Path(scratch) / "report.html"
        python = [sys.executable, "-m", "rankwise"]
        programs = {
            "start-up alone": [sys.executable, "-c", START_UP],
            "compare": [*python, "compare", EXPERIMENT],
            "compare --json": [*python, "compare", EXPERIMENT, "--json"],
            "compare --csv": [*python, "compare", EXPERIMENT, "--csv"],
            "report": [*python, "report", EXPERIMENT, "--output", str(page)],
        }
        seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in programs}
        for _ in range(given.times):
            for name, program in programs.items():
                seconds[name].append(_seconds(program, home))
        size = page.stat().st_size
    print(f"{given.arms} arms, {size / 1e6:.2f} MB of HTML; load {os.getloadavg()[0]:.1f}; medians of {given.times}")
    idle = [median(each) for each in zip(*seconds["start-up alone"], strict=True)]
    for name, taken in seconds.items():
        wall, cpu = (median(each) for each in zip(*taken, strict=True))
        beyond = f"beyond start-up {wall - idle[0]:.2f} s ({cpu - idle[1]:.2f} s of CPU)"
        print(f"{name:16} {wall:6.2f} s ({cpu:.2f} s of CPU)  {beyond}")
    if given.json is not None:
        given.json.write_text(json.dumps({"arms": given.arms, "bytes": size, "seconds": seconds}, indent=2) + "\n")


def _fill(home: Path, arms: int) -> None:
    settings = Settings.load({"RANKWISE_HOME": str(home)})
    with Store.open(settings) as store:
        if store.find_experiment(EXPERIMENT) is None:
            fill(store, EXPERIMENT, arms)


def _seconds(program: list[str], home: Path) -> tuple[float, float]:
    """Wall time and CPU time of a process."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("RANKWISE_", "MLFLOW_"))}
    since, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(program, env={**environment, "RANKWISE_HOME": str(home)}, capture_output=True, check=False)
    taken, after = time.perf_counter() - since, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise SystemExit(done.stderr.decode())
    return taken, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


if __name__ == "__main__":
    main()

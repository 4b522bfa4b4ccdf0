"""A worker without machine learning: claims, beats, and finishes jobs that only take time.

Run as a program by tests that place, kill and restart workers; it behaves towards the queue as a real one does. Every
claim is also noted in a file of its own, so that a double claim shows whatever the database says.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import time
from functools import partial
from pathlib import Path

import psutil

from rankwise.exceptions import JobStoreError
from rankwise.jobs.job import JobState, Outcome, Worker
from rankwise.jobs.store import JobStore


def main() -> int:
    """The program."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--url", required=True)
    parser.add_argument("--notes", type=Path, required=True, help="directory for the files of claims")
    parser.add_argument("--seconds", type=float, default=0.0, help="that a pack takes")
    parser.add_argument("--lease", type=float, default=60.0)
    parser.add_argument("--arms", type=int, default=1)
    parser.add_argument("--drain", action="store_true")
    options = parser.parse_args()
    stopped = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopped.append(True))
    worker = Worker(name=f"{socket.gethostname()}:{os.getpid()}", host=socket.gethostname(), pid=os.getpid())
    options.notes.mkdir(parents=True, exist_ok=True)
    store = patiently(lambda: JobStore(options.url, lock=options.notes / "lock"), stopped)
    notes = options.notes / f"{worker.pid}-{time.time_ns()}"
    states = [JobState.QUEUED, JobState.RUNNING, JobState.UPLOADING]
    while not stopped:
        patiently(lambda: store.reclaim(host=worker.host, alive=psutil.pids()), stopped)
        pack = patiently(lambda: store.claim(worker, lease=options.lease, max_arms=options.arms), stopped) or []
        with notes.open("a") as file:
            file.writelines(f"{job.id} {job.token}\n" for job in pack)
        deadline = time.monotonic() + options.seconds
        tokens = [job.token for job in pack]
        while pack and time.monotonic() < deadline and not stopped:
            time.sleep(min(0.1, options.seconds))
            patiently(partial(store.beat, tokens, lease=options.lease), stopped)
        outcome = Outcome.PREEMPTED if stopped and options.seconds else Outcome.SUCCEEDED
        for token in tokens:
            patiently(partial(store.finish, token, outcome, result={"pid": worker.pid}), [])
        if not pack:
            if options.drain and not patiently(lambda: store.jobs(states=states, limit=1), stopped):
                break
            time.sleep(0.05)
    return 0


def patiently(ask, stopped):
    """Ask the queue until it answers, or a stop is wanted."""
    while True:
        try:
            return ask()
        except JobStoreError as error:
            if "locked" in str(error) or stopped:
                raise
            time.sleep(0.2)


if __name__ == "__main__":
    raise SystemExit(main())

"""How long a job waits for its first training step: with an empty cache, by a new worker, and by a warm one.

The base is SmolLM2-135M in NF4. A cold time counts from the start of `rankwise worker`, a warm one from the moment at
which the job is in the queue; both end with the time of the first point of `train.loss`.
"""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from helpers.local_store import prepared_home
from mlflow import MlflowClient

from rankwise.jobs.job import Job, JobKind, JobState
from rankwise.jobs.store import JobStore
from rankwise.settings import Settings, child_environment

DEFINITION = Path(__file__).parents[2] / "experiments" / "diamonds-rank.yaml"
SMALL = [
    "training.max_steps=2",
    "training.warmup_steps=0",
    "dataset.limit={train: 500, eval: 4}",
    "evaluation.metrics=[loss]",
    "register=null",
]
# What a machine has fetched and converted; quantized bases and tokens are made anew in the first case.
_FETCHED = ("bases", "pypi", "tensor-digests")
_LONGEST_S = 600.0


def first_steps(directory: Path, repeats: int = 3) -> dict[str, float]:
    """Seconds to the first step; of repeated cases the median.

    Args:
        directory: For a home and a cache of its own.
        repeats: Jobs of a cold and of a warm worker.
    """
    home, cache = directory / "home", directory / "cache"
    fetched = Settings.load().cache
    cache.mkdir(parents=True)
    for name in _FETCHED:
        (fetched / name).mkdir(parents=True, exist_ok=True)
        (cache / name).symlink_to(fetched / name)
    if (fetched / "digests.sqlite3").exists():
        shutil.copyfile(fetched / "digests.sqlite3", cache / "digests.sqlite3")
    prepared_home(home)
    environment = child_environment({"RANKWISE_HOME": str(home), "RANKWISE_CACHE": str(cache), "HF_HUB_OFFLINE": "1"})
    for name in ("MLFLOW_TRACKING_URI", "RANKWISE_DATABASE_URL"):
        environment.pop(name, None)
    with _Bench(home, environment) as bench:
        seeds = iter(range(10_000))
        empty = bench.cold(next(seeds))
        cold = [bench.cold(next(seeds)) for _ in range(repeats)]
        bench.start()
        bench.warm(next(seeds))
        warm = [bench.warm(next(seeds)) for _ in range(repeats)]
    return {"empty_cache_seconds": empty, "cold_seconds": _median(cold), "warm_seconds": _median(warm)}


class _Bench:
    """A queue, and one worker at a time."""

    def __init__(self, home: Path, environment: dict[str, str]) -> None:
        self._home, self._environment = home, environment
        self._queue = JobStore(f"sqlite:///{home / 'rankwise.db'}", lock=home / "queue.lock")
        self._client = MlflowClient(f"sqlite:///{home / 'mlflow.db'}")
        self._worker: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> _Bench:
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()
        self._queue.close()

    def start(self) -> float:
        """Start a worker; when that was."""
        began = time.time()
        with (self._home / "worker.log").open("ab") as log:
            self._worker = subprocess.Popen(
                [sys.executable, "-m", "rankwise", "worker"], env=self._environment, stdout=log, stderr=log
            )
        return began

    def stop(self) -> None:
        if self._worker is not None:
            self._worker.send_signal(signal.SIGTERM)
            self._worker.wait()
            self._worker = None

    def cold(self, seed: int) -> float:
        job = self._submit(seed)
        began = self.start()
        try:
            return self._first_step(job) - began
        finally:
            self.stop()

    def warm(self, seed: int) -> float:
        job = self._submit(seed)
        return self._first_step(job) - job.created_at

    def _submit(self, seed: int) -> Job:
        settings = [f"sweep.parameters={{seed: [{seed}], lora.r: [4]}}", f"name=first-step-{seed}", *SMALL]
        done = subprocess.run(
            [sys.executable, "-m", "rankwise", "submit", str(DEFINITION), "--no-preflight", "--json",
             *(f"--set={each}" for each in settings)],
            env=self._environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        (train,) = [job["id"] for job in json.loads(done.stdout)["jobs"] if job["kind"] == JobKind.TRAIN]
        return self._queue.get(train)

    def _first_step(self, job: Job) -> float:
        deadline = time.monotonic() + _LONGEST_S
        while any(each.state is not JobState.SUCCEEDED for each in self._queue.jobs()):
            assert time.monotonic() < deadline, (self._home / "worker.log").read_text()
            time.sleep(0.2)
        run_id = self._queue.get(job.id).mlflow_run_id
        assert run_id is not None
        points = self._client.get_metric_history(run_id, "train.loss")
        return min(point.timestamp for point in points) / 1000


def _median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]

"""Remove what no job needs: from this machine's disk, and LoggedModels.

| kind | what | is removed when |
|---|---|---|
| checkpoint | a pack's checkpoints and results | none of its arms is in an unfinished job, and it is old |
| aside | the state of an arm that left a pack, beside checkpoints that are needed | its job has ended, and it is old |
| model | a LoggedModel of a job, with its files | no version stands on it, it is not its job's result, and it is old |
| log | a job's log, a worker's crash output and stacks | the job, the worker has ended, and it is old |
| outbox | an outbox | everything in it was delivered and its writer is gone |
| quantized, adapter, tokens | entries of the cache | no unfinished job needs it, and it is old |

Old means: for the given time not written and, where the file system notes that, not read. What is removed disappears
under its name in one step. A failed or cancelled job that is tried again begins anew once its checkpoints are gone.

- What the jobs of the queue need on this machine and in MLflow, for those who clean up.
- What lies on this machine's disk or in MLflow that no job needs; nothing here removes before it is told to.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import psutil
from filelock import FileLock

from rankwise.exceptions import TrackingError
from rankwise.files import remove_entry, storage_errors, tree_size
from rankwise.jobs.job import Job, JobState
from rankwise.jobs.store import JobStore, every_job
from rankwise.modeling.quantized_cache import ENTRY_NAME, list_entries
from rankwise.settings import Settings
from rankwise.tracking.cleanup import JobModel, model_bytes, models_of_jobs, remove_model
from rankwise.tracking.outbox import Outbox
from rankwise.tracking.store import Store
from rankwise.training.checkpoint import remove


@dataclass(kw_only=True)
class Needs:
    """What unfinished jobs need, and what ended ones have made.

    Attributes:
        jobs: Numbers of the unfinished jobs.
        arms: The first 12 digits of the spec hashes of arms that are to be trained or evaluated.
        bases: Source and revision of their bases.
        adapters: Names of the directories of adapters that they start from.
        since: When the oldest unfinished job was submitted, seconds since the epoch; None without one.
        models: Run to the LoggedModel that its succeeded train job counts as its result.
        ended: Runs of train jobs that have ended, by (job, run), with their state.
        experiments: Ids of all experiments.
    """

    jobs: set[int] = field(default_factory=set)
    arms: set[str] = field(default_factory=set)
    bases: set[tuple[str, str | None]] = field(default_factory=set)
    adapters: set[str] = field(default_factory=set)
    since: float | None = None
    models: dict[str, str] = field(default_factory=dict)
    ended: dict[tuple[int, str], JobState] = field(default_factory=dict)
    experiments: set[str] = field(default_factory=set)

    @classmethod
    def of(cls, jobs: Iterable[Job]) -> Needs:
        """Read them out of rows."""
        needs = cls()
        for job in jobs:
            if "experiment_id" in job.spec:
                needs.experiments.add(str(job.spec["experiment_id"]))
            if not job.ended:
                needs._add(job)
            elif job.mlflow_run_id is not None:
                needs.ended[job.id, job.mlflow_run_id] = job.state
                if job.state is JobState.SUCCEEDED and (model := (job.result or {}).get("model_id")):
                    needs.models[job.mlflow_run_id] = str(model)
        return needs

    def _add(self, job: Job) -> None:
        self.since = job.created_at if self.since is None else min(self.since, job.created_at)
        self.jobs.add(job.id)
        self.arms.add(job.spec_hash[:12])
        if (arm := _arm(job)) is not None:
            self.bases.add((str(arm["base_model"]), arm.get("base_model_revision")))
            if arm.get("init_from"):
                self.adapters.add(adapter_directory(str(arm["init_from"])))


def adapter_directory(uri: str) -> str:
    """The name of the cache's directory for a registered adapter that an arm starts from."""
    return uri.replace("models:/", "").replace("/", "-")


def _arm(job: Job) -> dict[str, Any] | None:
    # Not as an ArmSpec: a row that another release wrote must not keep anybody from cleaning up.
    arm = job.spec.get("arm")
    values = json.loads(arm) if isinstance(arm, str) else arm
    return values if isinstance(values, dict) and "base_model" in values else None


# Times of files and of the database come from two clocks, and may be read a while apart.
_MARGIN_S = 86_400.0
# An outbox has files beside it that are made before or removed after it.
_SETTLED_S = 3600.0


@dataclass(frozen=True, kw_only=True)
class Item:
    """Something that can be removed.

    Attributes:
        kind: As in the table of `rankwise.tasks.gc`.
        name: A path, or the URI of a model.
        bytes: What it holds.
        reason: Why it is not needed.
        needed: Asked again, with fresh needs, just before it is removed.
        remove: Removes it.
    """

    kind: str
    name: str
    bytes: int
    reason: str
    needed: Callable[[Needs], bool]
    remove: Callable[[], object]

    def to_json(self) -> dict[str, Any]:
        """As `rankwise gc --json` prints it."""
        return {"kind": self.kind, "name": self.name, "bytes": self.bytes, "reason": self.reason}


def checkpoints(settings: Settings, needs: Needs, before: float) -> Iterator[Item]:
    """Checkpoints of packs, and what is put aside of arms beside checkpoints that are needed."""
    for pack in _directories(settings.checkpoints):
        arms = frozenset(path.name.removeprefix("arm-") for path in pack.rglob("arm-*") if path.is_dir())
        if arms.isdisjoint(needs.arms):
            if _last_use(pack) < before:
                yield _checkpoint("checkpoint", pack, "no unfinished job has one of its arms", arms)
            continue
        for aside in _directories(pack / "aside"):
            arm = aside.name.removeprefix("arm-")
            if arm not in needs.arms and _last_use(aside) < before:
                yield _checkpoint("aside", aside, "the job of this arm has ended", frozenset({arm}))

    for path in sorted(settings.checkpoints.glob(".tmp-*")):
        if time.time() - _last_use(path) > _SETTLED_S:
            yield Item(
                kind="checkpoint",
                name=str(path),
                bytes=tree_size(path),
                reason="half removed by a process that died",
                needed=lambda now: False,
                remove=partial(_discard, path),
            )


def _checkpoint(kind: str, path: Path, reason: str, arms: frozenset[str]) -> Item:
    def do() -> None:
        with storage_errors(path, f"removing {path.name}"):
            remove(path)

    return Item(
        kind=kind,
        name=str(path),
        bytes=tree_size(path),
        reason=reason,
        needed=lambda now: not arms.isdisjoint(now.arms),
        remove=do,
    )


def outboxes(settings: Settings) -> Iterator[Item]:
    """Outboxes of which everything was delivered, and what others have left beside their place."""
    for path in sorted(settings.outbox.glob("*.jsonl")):
        try:
            outbox = Outbox.adopt(path)
        except TrackingError:  # No outbox, or of a newer release: `sync` tells of it.
            continue
        if outbox is None:
            continue
        delivered = not outbox.pending
        outbox.release()
        if delivered:
            beside = [path, path.with_suffix(".offset"), path.with_suffix(".files")]
            yield _outbox(path, beside, "everything in it was delivered", partial(_close, path))
    for path in sorted(settings.outbox.glob("*")) if settings.outbox.is_dir() else []:
        alone = path.suffix in {".offset", ".files", ".tmp"} and not path.with_suffix(".jsonl").exists()
        if alone and time.time() - _last_use(path) > _SETTLED_S:
            yield _outbox(path, [path], "its outbox is gone", partial(_discard, path))


def _outbox(path: Path, files: list[Path], reason: str, do: Callable[[], None]) -> Item:
    size = sum(tree_size(file) if file.is_dir() else file.stat().st_size for file in files if file.exists())
    return Item(kind="outbox", name=str(path), bytes=size, reason=reason, needed=lambda now: False, remove=do)


def _close(path: Path) -> None:
    # Another process may have taken it up meanwhile; closing one that is delivered removes it.
    if (outbox := Outbox.adopt(path)) is not None:
        outbox.close()


def _discard(path: Path) -> None:
    with storage_errors(path, f"removing {path.name}"):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def logs(settings: Settings, needs: Needs, before: float) -> Iterator[Item]:
    """Logs of jobs that have ended, and what processes of workers that died have left."""
    for path in sorted((settings.home / "logs" / "jobs").glob("*.log")):
        if not path.stem.isdecimal() or int(path.stem) in needs.jobs or path.stat().st_mtime >= before:
            continue
        yield Item(
            kind="log",
            name=str(path),
            bytes=path.stat().st_size,
            reason=f"job {path.stem} has ended",
            needed=partial(_needs_job, job=int(path.stem)),
            remove=partial(_discard, path),
        )
    for path in sorted((settings.home / "logs" / "workers").glob("child-*")):
        if path.stat().st_mtime < before and not _is_alive(path):
            yield Item(
                kind="log",
                name=str(path),
                bytes=path.stat().st_size,
                reason="its worker has ended",
                needed=lambda now: False,
                remove=partial(_discard, path),
            )


def _needs_job(needs: Needs, job: int) -> bool:
    return job in needs.jobs


def _is_alive(path: Path) -> bool:
    """Whether the worker may live that a file of `rankwise.worker.child` names: `child-PID-...`."""
    pid = path.name.split("-")[1]
    return pid.isdecimal() and psutil.pid_exists(int(pid))


def caches(settings: Settings, needs: Needs, before: float) -> Iterator[Item]:
    """Entries of the cache that were not used for long: quantized bases, adapters to start from, tokens."""
    for entry in list_entries(settings):
        base = (entry.source, entry.revision)
        # Its description is read by every listing.
        if not _needs_base(needs, base) and _last_use(entry.path, without=ENTRY_NAME) < before:
            yield Item(
                kind="quantized",
                name=str(entry.path),
                bytes=entry.bytes,
                reason=f"{entry.source}, quantized: no unfinished job is over it",
                needed=partial(_needs_base, base=base),
                remove=partial(remove_entry, entry.path, settings),
            )
    for path in _directories(settings.cache / "adapters"):
        if path.name not in needs.adapters and _last_use(path) < before:
            yield Item(
                kind="adapter",
                name=str(path),
                bytes=tree_size(path),
                reason="no unfinished job starts from it",
                needed=partial(_needs_adapter, name=path.name),
                remove=partial(remove_entry, path, settings),
            )
    for path in sorted((settings.cache / "tokens").glob("*.arrow")):
        used = _last_use(path)
        if used < before and not _needs_tokens(needs, used):
            yield Item(
                kind="tokens",
                name=str(path),
                bytes=path.stat().st_size,
                reason="not used since before the oldest unfinished job",
                needed=partial(_needs_tokens, used=used),
                remove=partial(_remove_tokens, path),
            )


def _needs_base(needs: Needs, base: tuple[str, str]) -> bool:
    # A base that is still to be pinned may turn out to be this one.
    return base in needs.bases or (base[0], None) in needs.bases


def _needs_adapter(needs: Needs, name: str) -> bool:
    return name in needs.adapters


def _needs_tokens(needs: Needs, used: float) -> bool:
    # Which rows an entry is of cannot be told without the base's tokenizer; a job's are read when it is submitted.
    return needs.since is not None and used > needs.since - _MARGIN_S


def _remove_tokens(path: Path) -> None:
    # The lock of `TokenCache`; its file stays, as another process may wait for it.
    with storage_errors(path, "removing tokens"), FileLock(path.with_suffix(".lock")):
        path.unlink(missing_ok=True)


def models(store: Store, needs: Needs, before: float) -> Iterator[Item]:
    """LoggedModels of jobs that have ended, on which no version stands and which are no job's result.

    Raises:
        TrackingError: The store cannot be reached.
    """
    if not needs.experiments:
        return
    registered = {version.model_id for version in store.registry.search()}
    for model in models_of_jobs(store.client, needs.experiments):
        if model.model_id in registered or model.created_ms / 1000 >= before or _needs_model(needs, model):
            continue
        failed = needs.ended[model.job, model.run_id] is not JobState.SUCCEEDED
        reason = "did not succeed" if failed else "has another one as its result"
        yield Item(
            kind="model",
            name=f"models:/{model.model_id}",
            bytes=model_bytes(store.client, model),
            reason=f"job {model.job} {reason}",
            needed=partial(_needs_model, model=model),
            remove=partial(remove_model, store.client, model),
        )


def _needs_model(needs: Needs, model: JobModel) -> bool:
    # A job that this queue does not know may be another queue's.
    unknown = (model.job, model.run_id) not in needs.ended
    return unknown or needs.models.get(model.run_id) == model.model_id


def _directories(root: Path) -> list[Path]:
    if not root.is_dir():
        return []
    return sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))


def _last_use(path: Path, without: str | None = None) -> float:
    """When anything in it was written or, where the file system notes it, read; seconds since the epoch.

    Args:
        path: A file or directory.
        without: The name of files that do not count.
    """
    files = [path, *(file for file in path.rglob("*") if file.name != without)] if path.is_dir() else [path]
    times = [0.0]
    for file in files:
        try:
            found = file.stat()
        except FileNotFoundError:  # Its owner is at work.
            return time.time()
        # Looking into a directory is no use of it.
        times += [found.st_mtime, *([] if file.is_dir() else [found.st_atime])]
    return max(times)


# How old an answer of the queue may be when something is removed because of it.
_FRESH_S = 2.0


@dataclass(frozen=True, kw_only=True)
class Found:
    """What can be removed, and what could not be looked at."""

    items: tuple[Item, ...]
    problems: tuple[str, ...]


def find_garbage(store: Store, queue: JobStore, settings: Settings, *, older_than: float) -> Found:
    """Look for it; nothing is changed.

    Args:
        store: The MLflow store; while it is away, LoggedModels are passed over.
        queue: The job store.
        settings: Where home and cache are.
        older_than: Seconds.

    Raises:
        JobStoreError: The queue's database cannot be reached.
    """
    needs, before = Needs.of(every_job(queue)), time.time() - older_than
    items = [*checkpoints(settings, needs, before), *outboxes(settings), *caches(settings, needs, before)]
    items += logs(settings, needs, before)
    problems = []
    try:
        items += models(store, needs, before)
    except TrackingError as error:
        problems.append(f"models are passed over: {error}")
    return Found(items=tuple(items), problems=tuple(problems))


def remove_garbage(items: Sequence[Item], queue: JobStore) -> list[Item]:
    """Remove what is still not needed, and return it.

    Raises:
        JobStoreError: The queue's database cannot be reached.
        StorageError: Something cannot be removed.
        TrackingError: The MLflow store refuses.
    """
    removed: list[Item] = []
    needs, asked = Needs(), -_FRESH_S
    for item in items:
        if time.monotonic() - asked >= _FRESH_S:
            needs, asked = Needs.of(every_job(queue)), time.monotonic()
        if not item.needed(needs):
            item.remove()
            removed.append(item)
    return removed

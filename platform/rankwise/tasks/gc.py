"""Garbage collection: finds and removes local files and LoggedModels that no unfinished job needs.

| kind | item | removed when |
|---|---|---|
| checkpoint | checkpoints and results of a pack | no unfinished job has one of its arms, and it is old |
| aside | saved state of an arm that left a pack, next to checkpoints still in use | its job has ended, and it is old |
| model | LoggedModel of a job, with its files | it has no version, is not its job's result, and is old |
| log | log of a job; crash output and stacks of a worker | the job or worker has ended, and it is old |
| outbox | an outbox | everything in it was delivered and its writer is gone |
| quantized, adapter, tokens | cache entries | no unfinished job needs it, and it is old |

Old means not written for the given time and, if the file system records access, not read. Each item disappears in one
step. A failed or cancelled job whose checkpoints were removed starts from the beginning if it is retried.
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

from rankwise.exceptions import TrackingError
from rankwise.files import file_lock, remove_entry, storage_errors, tree_size
from rankwise.jobs.job import Job, JobState
from rankwise.jobs.store import JobStore, every_job
from rankwise.modeling.quantized_cache import ENTRY_NAME, list_entries
from rankwise.settings import Settings
from rankwise.tracking.cleanup import JobModel, model_bytes, models_of_jobs, remove_model
from rankwise.tracking.outbox import Outbox
from rankwise.tracking.store import Store
from rankwise.training.checkpoint import remove


@dataclass(kw_only=True)
class References:
    """What unfinished jobs need, and what ended jobs have made.

    `arms` are 12-digit prefixes of spec hashes, `since` is the submission of the oldest unfinished job, `models` maps
    runs to the LoggedModel that is their result, and `ended` maps (job, run) to the job's state.
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
    def of(cls, jobs: Iterable[Job]) -> References:
        """Collect references from job rows."""
        references = cls()
        for job in jobs:
            if "experiment_id" in job.spec:
                references.experiments.add(str(job.spec["experiment_id"]))
            if not job.ended:
                references._add(job)
            elif job.mlflow_run_id is not None:
                references.ended[job.id, job.mlflow_run_id] = job.state
                if job.state is JobState.SUCCEEDED and (model := (job.result or {}).get("model_id")):
                    references.models[job.mlflow_run_id] = str(model)
        return references

    def _add(self, job: Job) -> None:
        self.since = job.created_at if self.since is None else min(self.since, job.created_at)
        self.jobs.add(job.id)
        self.arms.add(job.spec_hash[:12])
        if (arm := _arm(job)) is not None:
            self.bases.add((str(arm["base_model"]), arm.get("base_model_revision")))
            if arm.get("init_from"):
                self.adapters.add(adapter_directory(str(arm["init_from"])))


def adapter_directory(uri: str) -> str:
    """Cache directory name of a registered adapter that an arm starts from."""
    return uri.replace("models:/", "").replace("/", "-")


def _arm(job: Job) -> dict[str, Any] | None:
    # Not parsed as an ArmSpec: a row that another release wrote must not block garbage collection.
    arm = job.spec.get("arm")
    values = json.loads(arm) if isinstance(arm, str) else arm
    return values if isinstance(values, dict) and "base_model" in values else None


# File times and database times come from two clocks, and may be read a while apart.
_MARGIN_S = 86_400.0
# The files next to an outbox are created before it and removed after it.
_SETTLED_S = 3600.0


@dataclass(frozen=True, kw_only=True)
class GarbageItem:
    """An item that can be removed; `needed` is called again with fresh references just before removal."""

    kind: str
    name: str
    bytes: int
    reason: str
    needed: Callable[[References], bool]
    remove: Callable[[], object]

    def to_json(self) -> dict[str, Any]:
        """The item as `rankwise gc --json` prints it."""
        return {"kind": self.kind, "name": self.name, "bytes": self.bytes, "reason": self.reason}


def checkpoints(settings: Settings, references: References, before: float) -> Iterator[GarbageItem]:
    """Checkpoints of packs, and states set aside by arms that left."""
    for pack in _directories(settings.checkpoints):
        arms = frozenset(path.name.removeprefix("arm-") for path in pack.rglob("arm-*") if path.is_dir())
        if arms.isdisjoint(references.arms):
            if _last_use(pack) < before:
                yield _checkpoint("checkpoint", pack, "no unfinished job has one of its arms", arms)
            continue
        for aside in _directories(pack / "aside"):
            arm = aside.name.removeprefix("arm-")
            if arm not in references.arms and _last_use(aside) < before:
                yield _checkpoint("aside", aside, "the job of this arm has ended", frozenset({arm}))

    for path in sorted(settings.checkpoints.glob(".tmp-*")):
        if time.time() - _last_use(path) > _SETTLED_S:
            yield GarbageItem(
                kind="checkpoint",
                name=str(path),
                bytes=tree_size(path),
                reason="partly removed by a process that died",
                needed=lambda now: False,
                remove=partial(_discard, path),
            )


def _checkpoint(kind: str, path: Path, reason: str, arms: frozenset[str]) -> GarbageItem:
    def remove_checkpoint() -> None:
        with storage_errors(path, f"removing {path.name}"):
            remove(path)

    return GarbageItem(
        kind=kind,
        name=str(path),
        bytes=tree_size(path),
        reason=reason,
        needed=lambda now: not arms.isdisjoint(now.arms),
        remove=remove_checkpoint,
    )


def outboxes(settings: Settings) -> Iterator[GarbageItem]:
    """Delivered outboxes, and stray files next to outboxes that are gone."""
    for path in sorted(settings.outbox.glob("*.jsonl")):
        try:
            outbox = Outbox.adopt(path)
        except TrackingError:  # Not an outbox, or one of a newer release: `sync` reports it.
            continue
        if outbox is None:
            continue
        delivered = not outbox.pending
        outbox.release()
        if delivered:
            files = [path, path.with_suffix(".offset"), path.with_suffix(".files")]
            yield _outbox(path, files, "everything in it was delivered", partial(_close, path))
    for path in sorted(settings.outbox.glob("*")) if settings.outbox.is_dir() else []:
        # What was refused stays with its reasons and files until somebody has looked at it.
        kept = any(path.with_suffix(suffix).exists() for suffix in (".jsonl", ".refused", ".invalid"))
        is_stray = path.suffix in {".offset", ".files", ".tmp", ".reason"} and not kept
        if is_stray and time.time() - _last_use(path) > _SETTLED_S:
            yield _outbox(path, [path], "its outbox is gone", partial(_discard, path))


def _outbox(path: Path, files: list[Path], reason: str, remove_item: Callable[[], None]) -> GarbageItem:
    size = sum(tree_size(file) if file.is_dir() else file.stat().st_size for file in files if file.exists())
    return GarbageItem(
        kind="outbox", name=str(path), bytes=size, reason=reason, needed=lambda now: False, remove=remove_item
    )


def _close(path: Path) -> None:
    # Another process may have adopted it since; closing a delivered outbox removes it.
    if (outbox := Outbox.adopt(path)) is not None:
        outbox.close()


def _discard(path: Path) -> None:
    with storage_errors(path, f"removing {path.name}"):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def logs(settings: Settings, references: References, before: float) -> Iterator[GarbageItem]:
    """Logs of ended jobs, and files of dead workers."""
    for path in sorted((settings.home / "logs" / "jobs").glob("*.log")):
        if not path.stem.isdecimal() or int(path.stem) in references.jobs or path.stat().st_mtime >= before:
            continue
        yield GarbageItem(
            kind="log",
            name=str(path),
            bytes=path.stat().st_size,
            reason=f"job {path.stem} has ended",
            needed=partial(_needs_job, job=int(path.stem)),
            remove=partial(_discard, path),
        )
    for path in sorted((settings.home / "logs" / "workers").glob("child-*")):
        if path.stat().st_mtime < before and not _is_alive(path):
            yield GarbageItem(
                kind="log",
                name=str(path),
                bytes=path.stat().st_size,
                reason="its worker has ended",
                needed=lambda now: False,
                remove=partial(_discard, path),
            )


def _needs_job(references: References, job: int) -> bool:
    return job in references.jobs


def _is_alive(path: Path) -> bool:
    pid = path.name.split("-")[1]
    return pid.isdecimal() and psutil.pid_exists(int(pid))


def caches(settings: Settings, references: References, before: float) -> Iterator[GarbageItem]:
    """Unused cache entries: quantized bases, adapters to start from, tokens."""
    for entry in list_entries(settings):
        base = (entry.source, entry.revision)
        # Every listing reads the description, so that does not count as use.
        if not _needs_base(references, base) and _last_use(entry.path, without=ENTRY_NAME) < before:
            yield GarbageItem(
                kind="quantized",
                name=str(entry.path),
                bytes=entry.bytes,
                reason=f"{entry.source}, quantized: no unfinished job uses it",
                needed=partial(_needs_base, base=base),
                remove=partial(remove_entry, entry.path, settings),
            )
    for path in _directories(settings.cache / "adapters"):
        if path.name not in references.adapters and _last_use(path) < before:
            yield GarbageItem(
                kind="adapter",
                name=str(path),
                bytes=tree_size(path),
                reason="no unfinished job starts from it",
                needed=partial(_needs_adapter, name=path.name),
                remove=partial(remove_entry, path, settings),
            )
    for path in sorted((settings.cache / "tokens").glob("*.arrow")):
        used = _last_use(path)
        if used < before and not _needs_tokens(references, used):
            yield GarbageItem(
                kind="tokens",
                name=str(path),
                bytes=path.stat().st_size,
                reason="not used since before the oldest unfinished job",
                needed=partial(_needs_tokens, used=used),
                remove=partial(_remove_tokens, path),
            )


def _needs_base(references: References, base: tuple[str, str]) -> bool:
    # A base that is not pinned yet may resolve to this one.
    return base in references.bases or (base[0], None) in references.bases


def _needs_adapter(references: References, name: str) -> bool:
    return name in references.adapters


def _needs_tokens(references: References, used: float) -> bool:
    # Only the base's tokenizer could map an entry to its rows; a job reads its entries when it is submitted.
    return references.since is not None and used > references.since - _MARGIN_S


def _remove_tokens(path: Path) -> None:
    # The lock of `TokenCache`. The lock file stays because another process may be waiting for it.
    with storage_errors(path, "removing tokens"), file_lock(path.with_suffix(".lock"), "removing tokens"):
        path.unlink(missing_ok=True)


def models(store: Store, references: References, before: float) -> Iterator[GarbageItem]:
    """LoggedModels of ended jobs without a version that are no job's result."""
    if not references.experiments:
        return
    registered = {version.model_id for version in store.registry.search()}
    for model in models_of_jobs(store.client, references.experiments):
        if model.model_id in registered or model.created_ms / 1000 >= before or _needs_model(references, model):
            continue
        failed = references.ended[model.job, model.run_id] is not JobState.SUCCEEDED
        reason = "did not succeed" if failed else "has another model as its result"
        yield GarbageItem(
            kind="model",
            name=f"models:/{model.model_id}",
            bytes=model_bytes(store.client, model),
            reason=f"job {model.job} {reason}",
            needed=partial(_needs_model, model=model),
            remove=partial(remove_model, store.client, model),
        )


def _needs_model(references: References, model: JobModel) -> bool:
    # A job that is not in this queue may belong to another one.
    unknown = (model.job, model.run_id) not in references.ended
    return unknown or references.models.get(model.run_id) == model.model_id


def _directories(root: Path) -> list[Path]:
    if not root.is_dir():
        return []
    return sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))


def _last_use(path: Path, without: str | None = None) -> float:
    """Epoch time of the last write or recorded read of a file, or of any file of a directory not named `without`."""
    files = [path, *(file for file in path.rglob("*") if file.name != without)] if path.is_dir() else [path]
    times = [0.0]
    for file in files:
        try:
            status = file.stat()
        except FileNotFoundError:  # In use: its owner just removed it.
            return time.time()
        # Listing a directory does not count as use.
        times += [status.st_mtime, *([] if file.is_dir() else [status.st_atime])]
    return max(times)


# How old the queue's state may be when an item is removed.
_FRESH_S = 2.0


@dataclass(frozen=True, kw_only=True)
class Garbage:
    """Items that can be removed, and problems while looking."""

    items: tuple[GarbageItem, ...]
    problems: tuple[str, ...]


def find_garbage(store: Store, queue: JobStore, settings: Settings, *, older_than: float) -> Garbage:
    """List garbage older than this many seconds, without removing it. Skips LoggedModels if MLflow is unavailable."""
    references, before = References.of(every_job(queue)), time.time() - older_than
    items = [*checkpoints(settings, references, before), *outboxes(settings), *caches(settings, references, before)]
    items += logs(settings, references, before)
    problems = []
    try:
        items += models(store, references, before)
    except TrackingError as error:
        problems.append(f"models are skipped: {error}")
    return Garbage(items=tuple(items), problems=tuple(problems))


def remove_garbage(items: Sequence[GarbageItem], queue: JobStore) -> list[GarbageItem]:
    """Remove the items that are still not needed; returns the removed ones."""
    removed: list[GarbageItem] = []
    references, read_at = References(), -_FRESH_S
    for item in items:
        if time.monotonic() - read_at >= _FRESH_S:
            references, read_at = References.of(every_job(queue)), time.monotonic()
        if not item.needed(references):
            item.remove()
            removed.append(item)
    return removed

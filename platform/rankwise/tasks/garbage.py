"""What lies on this machine's disk or in MLflow that no job needs; nothing here removes before it is told to."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil
from filelock import FileLock

from rankwise.assets.entry import remove_entry, tree_size
from rankwise.exceptions import TrackingError
from rankwise.jobs.job import JobState
from rankwise.modeling.quantized_cache import ENTRY_NAME, list_entries
from rankwise.settings import Settings, storage_errors
from rankwise.tasks.needs import Needs
from rankwise.tracking.leavings import JobModel, model_bytes, models_of_jobs, remove_model
from rankwise.tracking.outbox import Outbox
from rankwise.tracking.store import Store
from rankwise.training.files import remove

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

"""Checkpoints of a pack and results of its arms, on disk.

    DIRECTORY/<composition>/passes.json     how the arms were first split into passes
    DIRECTORY/<composition>/step-00000020/pack.json, manifest.json
                                          arm-<short>/adapter/        a PEFT directory
                                                      optimizer.safetensors
                                                      state.json
                                                      best/           a PEFT directory, after an evaluation
    DIRECTORY/<composition>/aside/arm-<short>/step-00000020/  same files: an arm that left the pack unfinished
    DIRECTORY/<composition>/final/arm-<short>/outcome.json, manifest.json, adapter/, best/

A composition is the set of arms that were started together. A generation has all its arms at one pack step and is
published by one rename; two generations are kept. A pack of the same arms resumes from the newest generation that
matches its manifest, with byte-equal results; on a GPU equal within rounding, because the backward pass of torch's
fused attention sums in a nondeterministic order. A pack of other arms takes each arm's newest state from any
composition, with results equal within rounding. States that another version of the engine wrote are not used.

A generation is written, hashed and published by a thread of its own, from copies, while training continues.

Tensors are safetensors, everything else is JSON. All packs of a home may share `DIRECTORY`.
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, TypeVar

import torch
from peft import LoraConfig
from pydantic import Field, TypeAdapter
from safetensors.torch import load_file, save_file

from rankwise.exceptions import AdapterIntegrityError, StorageError
from rankwise.files import complete_directory, make_directory, remove_directory, storage_errors, write_atomically
from rankwise.modeling.adapter import read_adapter, save_adapter, write_adapter
from rankwise.modeling.base import LoadedBase
from rankwise.modeling.fingerprint import check_manifest, write_manifest
from rankwise.records import DamagedRecordError, parse_record
from rankwise.training.arm import ArmOutcome, BestState, TrainingArm
from rankwise.training.optimizer import ArmTensors
from rankwise.training.step import Passes

_TEMPORARY = ".tmp-"


@contextmanager
def replace_directory(path: Path) -> Iterator[Path]:
    """Yield a temporary directory that replaces `path`, with a manifest, when the block ends without an error.

    Raises:
        StorageError: The disk is full, or the directory is not writable.
    """
    with storage_errors(path, f"writing {path.name}"):
        make_directory(path.parent, f"writing {path.name}")

        def place(temporary: Path) -> None:
            write_manifest(temporary)
            if path.exists():
                remove(path)
            temporary.rename(path)

        with complete_directory(_temporary_path(path), place) as temporary:
            yield temporary


def copy_directory(source: Path, target: Path) -> None:
    """Copy a directory with its files."""
    shutil.copytree(source, target)


def remove(path: Path) -> None:
    """Remove a directory atomically: it is renamed first."""
    remove_directory(path, _temporary_path(path))


def remove_temporary(directory: Path) -> None:
    """Remove incomplete directories that killed processes left."""
    for path in directory.glob(f"{_TEMPORARY}*"):
        shutil.rmtree(path, ignore_errors=True)


def _temporary_path(path: Path) -> Path:
    """A unique name, even if several machines share the directory."""
    return path.with_name(f"{_TEMPORARY}{path.name}-{os.getpid()}-{secrets.token_hex(4)}")


logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
ENGINE_VERSION = 2
"""What changes the numbers of a training: dropout masks, products, the order of sums. A training that one engine began
is not finished by another one: its arms start again. Results stay valid."""
GENERATIONS = 2
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class _Versioned:
    """`engine` is missing in checkpoints of the first releases."""

    version: int
    engine: int = 1


@dataclass(frozen=True, kw_only=True)
class _BestRecord:
    step: int
    value: float


@dataclass(frozen=True, kw_only=True)
class _StateRecord:
    """What `state.json` holds for `restore`; `evaluated` is missing in checkpoints of the first releases."""

    step: int
    seconds: float
    tokens: int
    metrics: Mapping[str, float]
    best: _BestRecord | None
    evaluated: int = 0
    without_improvement: int = 0


# Parts of paths, so no separators.
_SpecHash = Annotated[str, Field(pattern=r"^[^/\x00]+$")]


@dataclass(frozen=True, kw_only=True)
class _PackRecord:
    """What `pack.json` holds; `passes` is missing in checkpoints of the first releases."""

    pack_step: int
    living: tuple[_SpecHash, ...]
    ended: Mapping[str, ArmOutcome]
    passes: Passes = field(default_factory=Passes)


_ANY: TypeAdapter[dict[str, Any]] = TypeAdapter(dict[str, Any])
_VERSION, _PACK = TypeAdapter(_Versioned), TypeAdapter(_PackRecord)
_STATE, _PASSES, _OUTCOME = TypeAdapter(_StateRecord), TypeAdapter(Passes), TypeAdapter(ArmOutcome)


@dataclass(frozen=True, kw_only=True)
class ArmState:
    """A saved and verified state of one arm."""

    directory: Path
    step: int

    def restore(self, arm: TrainingArm) -> None:
        """Load this state into an arm."""
        state = parse_record((self.directory / "state.json").read_bytes(), _STATE)
        adapter = read_adapter(self.directory / "adapter")
        arm.load(adapter.tensors, str(adapter.directory))
        assert arm.optimizer is not None
        arm.optimizer.load(arm.name, load_file(self.directory / "optimizer.safetensors"))
        arm.step = state.step
        arm.seconds = state.seconds
        arm.tokens = state.tokens
        arm.metrics = dict(state.metrics)
        arm.evaluated = state.evaluated
        arm.without_improvement = state.without_improvement
        best = state.best
        arm.best = (
            None if best is None else BestState(directory=self.directory / "best", step=best.step, value=best.value)
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class _Snapshot:
    """A state of an arm that is about to be written; `best` is the directory of its best state."""

    tensors: ArmTensors
    config: LoraConfig
    best: Path | None
    state: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, eq=False)
class _Pending:
    """A generation that is being written."""

    pack_step: int
    path: Path
    arms: list[TrainingArm]
    future: Future[None]


@dataclass(frozen=True, kw_only=True)
class CheckpointGeneration:
    """The states of all arms in the pack at one pack step, their split into passes, and outcomes of arms that left."""

    pack_step: int
    passes: Passes
    states: Mapping[str, ArmState]
    ended: Mapping[str, ArmOutcome]


class Checkpoints:
    """The checkpoints of one composition, below the root directory of all compositions."""

    def __init__(self, directory: Path, spec_hashes: Sequence[str], base: LoadedBase) -> None:
        self._root = directory
        self._base = base
        self.directory = _composition(directory, spec_hashes)
        self._final = self.directory / "final"
        remove_temporary(self.directory)
        remove_temporary(self._final)
        for spec_hash in spec_hashes:
            remove_temporary(self._aside(spec_hash))
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: _Pending | None = None
        self._published: list[tuple[int, Path]] = []

    def begin(
        self, pack_step: int, arms: Sequence[TrainingArm], ended: Mapping[str, ArmOutcome], passes: Passes
    ) -> None:
        """Copy the states of all arms, and write them as a generation in the background; see `published`.

        Whatever changes files here waits for that first. The last two generations are kept.

        Raises:
            StorageError: The generation before could not be written.
        """
        self.wait()
        document = {
            "version": FORMAT_VERSION,
            "engine": ENGINE_VERSION,
            "pack_step": pack_step,
            "passes": asdict(passes),
            "living": [arm.spec_hash for arm in arms],
            "ended": {
                spec_hash: _outcome_json(outcome, self.directory) for spec_hash, outcome in sorted(ended.items())
            },
        }
        path = self.directory / _step_name(pack_step)
        snapshots = self._snapshots(arms)
        future = self._writer.submit(self._write, path, document, snapshots)
        self._pending = _Pending(pack_step=pack_step, path=path, arms=list(arms), future=future)

    def save(
        self, pack_step: int, arms: Sequence[TrainingArm], ended: Mapping[str, ArmOutcome], passes: Passes
    ) -> None:
        """Write a generation, and wait until it is published; a full disk is a `StorageError`."""
        self.begin(pack_step, arms, ended, passes)
        self.wait()

    def published(self) -> list[tuple[int, Path]]:
        """Pack steps and directories of the generations that were published since the last call.

        Raises:
            StorageError: A generation could not be written.
        """
        if self._pending is not None and self._pending.future.done():
            self.wait()
        published, self._published = self._published, []
        return published

    def wait(self) -> None:
        """Wait until the generation that is being written is published.

        Raises:
            StorageError: It could not be written.
        """
        pending, self._pending = self._pending, None
        if pending is None:
            return
        pending.future.result()
        for arm in pending.arms:
            if arm.best is not None:
                arm.best = replace(arm.best, directory=pending.path / _arm_name(arm.spec_hash) / "best")
        for old in _steps(self.directory)[GENERATIONS:]:
            remove(old)
        self._published.append((pending.pack_step, pending.path))

    def close(self) -> None:
        """Wait for the writer, and end it. What it could not write is logged: an earlier error is on its way."""
        try:
            self.wait()
        except StorageError as error:
            logger.warning("the last checkpoint is missing: %s", error)
        self._writer.shutdown()

    def _write(self, path: Path, document: Mapping[str, Any], snapshots: Mapping[str, _Snapshot]) -> None:
        with replace_directory(path) as temporary:
            for spec_hash, snapshot in snapshots.items():
                self._write_arm(snapshot, temporary / _arm_name(spec_hash))
            (temporary / "pack.json").write_text(json.dumps(document, indent=1), encoding="utf-8")

    def newest(self) -> CheckpointGeneration | None:
        """The newest intact generation of this composition; None if there is none."""
        for path in _steps(self.directory):
            record = _verified(path, "pack.json", _PACK)
            if record is None:
                continue
            states = {name: _arm_state(path / _arm_name(name)) for name in record.living}
            known = {name: state for name, state in states.items() if state is not None}
            if known.keys() == states.keys():
                return CheckpointGeneration(
                    pack_step=record.pack_step,
                    passes=record.passes,
                    states=known,
                    ended={name: _placed(outcome, self.directory) for name, outcome in record.ended.items()},
                )
        return None

    def initial_passes(self, planned: Passes) -> Passes:
        """The split of the first start of these arms, or `planned`: another split changes the last bits of results."""
        path = self.directory / "passes.json"
        if path.exists():
            try:
                return parse_record(path.read_bytes(), _PASSES)
            except (DamagedRecordError, OSError) as error:
                logger.warning("%s is damaged and is written anew: %s", path, error)
        write_atomically(path, json.dumps(asdict(planned)).encode())
        return planned

    def newest_state(self, spec_hash: str) -> ArmState | None:
        """The newest state of one arm in any composition; None if there is none."""
        name = _arm_name(spec_hash)
        steps = self._root.glob(f"*/step-*/{name}")
        paths = [path for path in steps if _verified(path.parent, "pack.json", _PACK) is not None]
        aside = self._root.glob(f"*/aside/{name}/step-*")
        paths += [path for path in aside if _verified(path, "state.json", _STATE) is not None]
        states = [state for path in paths if (state := _arm_state(path)) is not None]
        return max(states, key=lambda state: state.step, default=None)

    def save_aside(self, arm: TrainingArm) -> None:
        """Write the state of an arm that leaves the pack unfinished, and remove its earlier ones."""
        self.wait()
        directory = self._aside(arm.spec_hash)
        path = directory / _step_name(arm.step)
        # An equal state is not replaced: between its removal and the rename there would be none.
        if not path.exists() or _verified(path, "state.json", _ANY) != _state_document(arm):
            with replace_directory(path) as temporary:
                self._write_arm(self._snapshots([arm])[arm.spec_hash], temporary)
        if arm.best is not None:
            arm.best = replace(arm.best, directory=path / "best")
        for old in _steps(directory):
            if old != path:
                remove(old)

    def save_best(self, arm: TrainingArm, value: float) -> None:
        """Write an arm's adapter as its best so far; the next generation copies it."""
        self.wait()
        path = self.directory / "best" / _arm_name(arm.spec_hash)
        with replace_directory(path) as temporary:
            self._save_adapter(arm, temporary)
        arm.best = BestState(directory=path, step=arm.step, value=value)

    def finish(self, arm: TrainingArm, outcome: ArmOutcome) -> ArmOutcome:
        """Write the result of an arm (non-finite: from its last checkpoint); returns the outcome with directories."""
        self.wait()
        path = self._final / _arm_name(arm.spec_hash)
        with replace_directory(path) as temporary:
            good = outcome.status == "finished"
            if good:
                self._save_adapter(arm, temporary / "adapter")
            else:
                state = self._last_state(arm.spec_hash)
                if state is not None:
                    copy_directory(state.directory / "adapter", temporary / "adapter")
                    good = True
            if arm.best is not None:
                copy_directory(arm.best.directory, temporary / "best")
                outcome = replace(outcome, best=path / "best", best_step=arm.best.step, best_value=arm.best.value)
            outcome = replace(outcome, adapter=path / "adapter" if good else None)
            document = {"version": FORMAT_VERSION, **_outcome_json(outcome, self.directory)}
            (temporary / "outcome.json").write_text(json.dumps(document, indent=1), encoding="utf-8")
        return outcome

    def outcomes(self) -> dict[str, ArmOutcome]:
        """Intact results of this composition on disk, by spec hash."""
        outcomes = {}
        for path in sorted(self._final.glob("arm-*")):
            record = _verified(path, "outcome.json", _OUTCOME)
            if record is not None:
                outcomes[record.spec_hash] = _placed(record, self.directory)
        return outcomes

    def drop_generations(self) -> None:
        """Remove everything except results and arms saved aside."""
        self.wait()
        for path in _steps(self.directory):
            remove(path)
        if (self.directory / "best").exists():
            remove(self.directory / "best")

    def _aside(self, spec_hash: str) -> Path:
        return self.directory / "aside" / _arm_name(spec_hash)

    def _last_state(self, spec_hash: str) -> ArmState | None:
        generation = self.newest()
        return None if generation is None else generation.states.get(spec_hash)

    def _snapshots(self, arms: Sequence[TrainingArm]) -> dict[str, _Snapshot]:
        if not arms:
            return {}
        assert arms[0].optimizer is not None
        tensors = arms[0].optimizer.snapshot()
        return {
            arm.spec_hash: _Snapshot(
                tensors=tensors[arm.name],
                config=copy.deepcopy(self._base.model.peft_config[arm.name]),
                best=None if arm.best is None else arm.best.directory,
                state=_state_document(arm),
            )
            for arm in arms
        }

    def _write_arm(self, snapshot: _Snapshot, directory: Path) -> None:
        write_adapter(
            snapshot.tensors.weights,
            snapshot.config,
            directory / "adapter",
            base_source=self._base.source,
            base_revision=self._base.revision,
        )
        moments = {name: tensor.contiguous() for name, tensor in snapshot.tensors.moments.items()}
        save_file(moments, directory / "optimizer.safetensors")
        if snapshot.best is not None:
            copy_directory(snapshot.best, directory / "best")
        (directory / "state.json").write_text(json.dumps(snapshot.state, indent=1), encoding="utf-8")

    def _save_adapter(self, arm: TrainingArm, directory: Path) -> None:
        save_adapter(
            self._base.model,
            arm.name,
            directory,
            base_source=self._base.source,
            base_revision=self._base.revision,
        )


def remove_composition(directory: Path, spec_hashes: Sequence[str]) -> None:
    """Remove checkpoints and results of a composition, after its arms are published."""
    composition = _composition(directory, spec_hashes)
    if composition.exists():
        remove(composition)


def _composition(directory: Path, spec_hashes: Sequence[str]) -> Path:
    text = "\n".join(sorted(spec_hashes))
    return directory / hashlib.sha256(text.encode()).hexdigest()[:16]


def _arm_name(spec_hash: str) -> str:
    return f"arm-{spec_hash[:12]}"


def _step_name(step: int) -> str:
    return f"step-{step:08d}"


def _steps(directory: Path) -> list[Path]:
    return sorted(directory.glob("step-*"), reverse=True)


def _verified(path: Path, name: str, kind: TypeAdapter[T]) -> T | None:
    """The record of a directory; None, with a warning, if a file is damaged or of another format or engine."""
    try:
        check_manifest(path)
        content = (path / name).read_bytes()
        made_by = parse_record(content, _VERSION)
        if made_by.version != FORMAT_VERSION:
            logger.warning("skipping %s: format version %s, not %s", path, made_by.version, FORMAT_VERSION)
            return None
        if name != "outcome.json" and made_by.engine != ENGINE_VERSION:
            logger.warning(
                "skipping %s, so its arms start again: version %s of the engine began them, and this is version %s",
                path,
                made_by.engine,
                ENGINE_VERSION,
            )
            return None
        return parse_record(content, kind)
    except (AdapterIntegrityError, OSError, DamagedRecordError) as error:
        logger.warning("skipping %s: %s", path, error)
        return None


def _arm_state(directory: Path) -> ArmState | None:
    try:
        return ArmState(directory=directory, step=parse_record((directory / "state.json").read_bytes(), _STATE).step)
    except (OSError, DamagedRecordError) as error:
        logger.warning("skipping %s: %s", directory, error)
        return None


def _state_document(arm: TrainingArm) -> dict[str, Any]:
    return {
        "version": FORMAT_VERSION,
        "engine": ENGINE_VERSION,
        "spec_hash": arm.spec_hash,
        "step": arm.step,
        "micro_step": arm.micro_steps(arm.step).start,
        "seconds": arm.seconds,
        "tokens": arm.tokens,
        "metrics": dict(arm.metrics),
        "evaluated": arm.evaluated,
        "without_improvement": arm.without_improvement,
        "best": None if arm.best is None else {"step": arm.best.step, "value": arm.best.value},
        "torch": torch.__version__,
    }


def _outcome_json(outcome: ArmOutcome, directory: Path) -> dict[str, Any]:
    document = asdict(outcome)
    for key in ("adapter", "best"):
        if document[key] is not None:
            document[key] = document[key].relative_to(directory).as_posix()
    return document


def _placed(outcome: ArmOutcome, directory: Path) -> ArmOutcome:
    """An outcome as it was stored, with its directories below `directory`."""
    return replace(
        outcome,
        adapter=None if outcome.adapter is None else directory / outcome.adapter,
        best=None if outcome.best is None else directory / outcome.best,
    )

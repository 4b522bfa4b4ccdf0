"""Checkpoints of a pack, and the results of its arms, on disk.

    DIRECTORY/<composition>/passes.json     how the arms went through the base at first
    DIRECTORY/<composition>/step-00000020/pack.json, manifest.json
                                          arm-<short>/adapter/        a PEFT directory
                                                      optimizer.safetensors
                                                      state.json
                                                      best/           a PEFT directory, where there is a best
    DIRECTORY/<composition>/aside/arm-<short>/step-00000020/  as in a generation: an arm that left the pack unfinished
    DIRECTORY/<composition>/final/arm-<short>/outcome.json, manifest.json, adapter/, best/

A composition is the set of arms that were started together. One rename publishes all of its arms at one pack step; two
generations are kept. A pack of the same arms goes on from the newest generation whose every file is what was written,
and gives the same bytes as without the interruption; on a GPU the same within rounding, since the backward pass of
torch's fused attention adds up in an order of its own there. A pack of other arms takes each arm from its newest state
in any composition; what it gives is the same within rounding.

Tensors are safetensors, everything else JSON. `DIRECTORY` may be shared by all packs of a home.

- Directories that are either whole or not there: temporary name, fsync, manifest last, rename.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from rankwise.exceptions import AdapterIntegrityError
from rankwise.files import complete_directory, remove_directory, storage_errors, write_atomically
from rankwise.modeling.adapter import read_adapter, save_adapter
from rankwise.modeling.base import LoadedBase
from rankwise.modeling.fingerprint import check_manifest, write_manifest
from rankwise.training.arm import ArmOutcome, Best, LivingArm
from rankwise.training.step import Passes

_TEMPORARY = ".tmp-"


@contextmanager
def whole_directory(path: Path) -> Iterator[Path]:
    """Give a directory to fill, which takes the place of `path` when the block ends without an error.

    A former `path` is replaced. The manifest of the directory is written after everything in it is on the disk.

    Raises:
        StorageError: The disk is full, or the place is not writable.
    """
    with storage_errors(path, f"writing {path.name}"):
        path.parent.mkdir(parents=True, exist_ok=True)

        def place(temporary: Path) -> None:
            write_manifest(temporary)
            if path.exists():
                remove(path)
            temporary.rename(path)

        with complete_directory(_beside(path), place) as temporary:
            yield temporary


def copy_directory(source: Path, target: Path) -> None:
    """Copy plain files of a directory."""
    shutil.copytree(source, target)


def remove(path: Path) -> None:
    """Remove a directory so that no half of it stays behind under its name."""
    remove_directory(path, _beside(path))


def sweep(directory: Path) -> None:
    """Remove what killed processes left half-written in a directory."""
    for path in directory.glob(f"{_TEMPORARY}*"):
        shutil.rmtree(path, ignore_errors=True)


def _beside(path: Path) -> Path:
    """A name that no other process has, also not one of another machine that shares the directory."""
    return path.with_name(f"{_TEMPORARY}{path.name}-{os.getpid()}-{secrets.token_hex(4)}")


logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
GENERATIONS = 2


@dataclass(frozen=True, kw_only=True)
class ArmState:
    """A saved state of one arm: `arm-<short>` of a generation that was checked."""

    directory: Path
    step: int

    def restore(self, arm: LivingArm) -> None:
        """Put an arm into this state.

        Raises:
            ConfigError: The stored adapter is not one of this arm.
        """
        state = json.loads((self.directory / "state.json").read_text(encoding="utf-8"))
        adapter = read_adapter(self.directory / "adapter")
        arm.load(adapter.tensors, str(adapter.directory))
        arm.load_optimizer(load_file(self.directory / "optimizer.safetensors"))
        arm.step = state["step"]
        arm.seconds = state["seconds"]
        arm.tokens = state["tokens"]
        arm.metrics = dict(state["metrics"])
        arm.evaluated = state.get("evaluated", 0)  # not in what the first releases wrote
        best = state["best"]
        arm.best = None if best is None else Best(directory=self.directory / "best", **best)


@dataclass(frozen=True, kw_only=True)
class Generation:
    """All living arms at one pack step, how they went through the base, and how those ended that had left by then."""

    pack_step: int
    passes: Passes
    states: Mapping[str, ArmState]
    ended: Mapping[str, ArmOutcome]


class Checkpoints:
    """The checkpoints of one composition below a directory.

    Args:
        directory: Root, shared by compositions.
        spec_hashes: The arms that are started together.
        base: The base; its source and revision go into the adapters' configuration.
    """

    def __init__(self, directory: Path, spec_hashes: Sequence[str], base: LoadedBase) -> None:
        """Remove what was left half-written."""
        self._root = directory
        self._base = base
        self.directory = _composition(directory, spec_hashes)
        self._final = self.directory / "final"
        sweep(self.directory)
        sweep(self._final)
        for spec_hash in spec_hashes:
            sweep(self._aside(spec_hash))

    def save(self, pack_step: int, arms: Sequence[LivingArm], ended: Mapping[str, ArmOutcome], passes: Passes) -> Path:
        """Write a generation, and remove those before the last two.

        Raises:
            StorageError: The disk is full, or the place is not writable.
        """
        path = self.directory / _step_name(pack_step)
        with whole_directory(path) as temporary:
            for arm in arms:
                self._save_arm(arm, temporary / _arm_name(arm.spec_hash))
            document = {
                "version": FORMAT_VERSION,
                "pack_step": pack_step,
                "passes": asdict(passes),
                "living": [arm.spec_hash for arm in arms],
                "ended": {
                    spec_hash: _outcome_json(outcome, self.directory) for spec_hash, outcome in sorted(ended.items())
                },
            }
            (temporary / "pack.json").write_text(json.dumps(document, indent=1), encoding="utf-8")
        for arm in arms:
            if arm.best is not None:
                arm.best = replace(arm.best, directory=path / _arm_name(arm.spec_hash) / "best")
        for old in _steps(self.directory)[GENERATIONS:]:
            remove(old)
        return path

    def newest(self) -> Generation | None:
        """The newest generation of this composition that verifies; None if there is none."""
        for path in _steps(self.directory):
            document = _checked(path)
            if document is not None:
                return Generation(
                    pack_step=document["pack_step"],
                    passes=Passes(**document.get("passes", {})),  # not in what the first releases wrote
                    states={each: _state(path / _arm_name(each)) for each in document["living"]},
                    ended={
                        spec_hash: _outcome_from(value, self.directory)
                        for spec_hash, value in document["ended"].items()
                    },
                )
        return None

    def first_passes(self, planned: Passes) -> Passes:
        """How the first start of these arms split them: `planned`, if this is the first.

        What is free differs from start to start, and with the split the last bits of all results.
        """
        path = self.directory / "passes.json"
        if path.exists():
            return Passes(**json.loads(path.read_text(encoding="utf-8")))
        write_atomically(path, json.dumps(asdict(planned)).encode())
        return planned

    def newest_of(self, spec_hash: str) -> ArmState | None:
        """The newest state of one arm in any composition."""
        name = _arm_name(spec_hash)
        found = [path for path in self._root.glob(f"*/step-*/{name}") if _checked(path.parent) is not None]
        aside = self._root.glob(f"*/aside/{name}/step-*")
        found += [path for path in aside if _checked(path, "state.json") is not None]
        return max(map(_state, found), key=lambda state: state.step, default=None)

    def put_aside(self, arm: LivingArm) -> None:
        """Write the state of an arm that leaves the pack unfinished, in place of what was put aside of it before."""
        directory = self._aside(arm.spec_hash)
        path = directory / _step_name(arm.step)
        # A state that is there already is not replaced: between its removal and the rename there would be none.
        if not path.exists() or _checked(path, "state.json") != _document(arm):
            with whole_directory(path) as temporary:
                self._save_arm(arm, temporary)
        if arm.best is not None:
            arm.best = replace(arm.best, directory=path / "best")
        for old in _steps(directory):
            if old != path:
                remove(old)

    def save_best(self, arm: LivingArm, value: float) -> None:
        """Write the adapter of an arm as its best so far; the next generation takes a copy."""
        path = self.directory / "best" / _arm_name(arm.spec_hash)
        with whole_directory(path) as temporary:
            self._save_adapter(arm, temporary)
        arm.best = Best(directory=path, step=arm.step, value=value)

    def finish(self, arm: LivingArm, outcome: ArmOutcome) -> ArmOutcome:
        """Write the result of an arm that leaves, and return the outcome with the places of its adapters.

        A finished arm's adapter is the one in memory; that of an arm which became non-finite is its last good
        checkpoint's.
        """
        path = self._final / _arm_name(arm.spec_hash)
        with whole_directory(path) as temporary:
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
        """Results of this composition that are on disk and verify."""
        found = {}
        for path in sorted(self._final.glob("arm-*")):
            document = _checked(path, "outcome.json")
            if document is not None:
                outcome = _outcome_from(document, self.directory)
                found[outcome.spec_hash] = outcome
        return found

    def drop_generations(self) -> None:
        """Remove what only an unfinished pack needs; results stay."""
        for path in _steps(self.directory):
            remove(path)
        if (self.directory / "best").exists():
            remove(self.directory / "best")

    def _aside(self, spec_hash: str) -> Path:
        return self.directory / "aside" / _arm_name(spec_hash)

    def _last_state(self, spec_hash: str) -> ArmState | None:
        generation = self.newest()
        return None if generation is None else generation.states.get(spec_hash)

    def _save_arm(self, arm: LivingArm, directory: Path) -> None:
        self._save_adapter(arm, directory / "adapter")
        save_file(arm.optimizer_tensors(), directory / "optimizer.safetensors")
        if arm.best is not None:
            copy_directory(arm.best.directory, directory / "best")
        (directory / "state.json").write_text(json.dumps(_document(arm), indent=1), encoding="utf-8")

    def _save_adapter(self, arm: LivingArm, directory: Path) -> None:
        save_adapter(
            self._base.model,
            arm.name,
            directory,
            base_source=self._base.source,
            base_revision=self._base.revision,
        )


def remove_composition(directory: Path, spec_hashes: Sequence[str]) -> None:
    """Remove checkpoints and results of arms that were started together, once all of it is published.

    Args:
        directory: Root, as given to `train_pack`.
        spec_hashes: The arms.
    """
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
    """Generations, newest first."""
    return sorted(directory.glob("step-*"), reverse=True)


def _checked(path: Path, name: str = "pack.json") -> dict[str, Any] | None:
    """The JSON document of a directory, if all files of the directory are what was written."""
    try:
        check_manifest(path)
        document: dict[str, Any] = json.loads((path / name).read_text(encoding="utf-8"))
    except (AdapterIntegrityError, OSError, ValueError) as error:
        logger.warning("%s is not used: %s", path, error)
        return None
    if document["version"] != FORMAT_VERSION:
        logger.warning("%s is not used: format version %s, not %s", path, document["version"], FORMAT_VERSION)
        return None
    return document


def _state(directory: Path) -> ArmState:
    state = json.loads((directory / "state.json").read_text(encoding="utf-8"))
    return ArmState(directory=directory, step=int(state["step"]))


def _document(arm: LivingArm) -> dict[str, Any]:
    """What of an arm's state is no tensor."""
    return {
        "version": FORMAT_VERSION,
        "spec_hash": arm.spec_hash,
        "step": arm.step,
        "micro_step": arm.step * arm.accumulation,
        "seconds": arm.seconds,
        "tokens": arm.tokens,
        "metrics": arm.metrics,
        "evaluated": arm.evaluated,
        "best": None if arm.best is None else {"step": arm.best.step, "value": arm.best.value},
        "torch": torch.__version__,
    }


def _outcome_json(outcome: ArmOutcome, directory: Path) -> dict[str, Any]:
    document = asdict(outcome)
    for key in ("adapter", "best"):
        if document[key] is not None:
            document[key] = document[key].relative_to(directory).as_posix()
    return document


def _outcome_from(document: Mapping[str, Any], directory: Path) -> ArmOutcome:
    values = {key: value for key, value in document.items() if key != "version"}
    for key in ("adapter", "best"):
        if values[key] is not None:
            values[key] = directory / values[key]
    values["example_ids"] = tuple(values["example_ids"])
    return ArmOutcome(**values)

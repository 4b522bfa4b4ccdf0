"""Finds the base of a stored adapter, loads it as recorded, and refuses any other.

The search order is the base that the caller names, the recorded source, then `RANKWISE_BASES` and the cache. Content
decides: a copy elsewhere is the same base, and a base with one changed byte is not.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlflow
import torch
from mlflow import MlflowClient

from rankwise.assets.base import ResolvedBase, local_bases, resolve_base
from rankwise.assets.layout import base_files
from rankwise.digests import directory_digest
from rankwise.exceptions import (
    AssetError,
    BaseMismatchError,
    ConfigError,
    QuantizationMismatchError,
    StorageError,
)
from rankwise.experiment.schema import QuantizationSpec
from rankwise.experiment.source import LocalSource, parse_source
from rankwise.flavor.fetch import Fetched
from rankwise.flavor.metadata import BaseFacts
from rankwise.flavor.package import LoadOptions
from rankwise.modeling.adapter import (
    add_rows,
    base_rows,
    embedding_rows,
    rows_needed,
)
from rankwise.modeling.adapter_config import read_adapter_config
from rankwise.modeling.base import (
    DTYPES,
    LoadedBase,
    base_attention,
    cast_modules,
    default_device,
    load_base,
    resolve_dtype,
)
from rankwise.modeling.fingerprint import Fingerprint, differing_part, fingerprint_base
from rankwise.settings import Settings
from rankwise.tracking.connection import tracking_errors

logger = logging.getLogger(__name__)

_PARTS = ("weights", "config", "tokenizer", "chat_template")


@dataclass(frozen=True, kw_only=True)
class Override:
    """A difference from what was recorded when the adapter was logged, which was allowed.

    Attributes:
        what: `base`, `quantization`, `compute_dtype`, `module_dtype`, `attn_implementation`.
    """

    what: str
    recorded: str
    used: str

    def __str__(self) -> str:
        """One line for a log."""
        return f"{self.what}: {self.used} in place of {self.recorded}"


def find_base(
    facts: BaseFacts,
    uri: str,
    settings: Settings,
    *,
    base_model: str | Path | ResolvedBase | None = None,
    allow_base_mismatch: bool = False,
) -> ResolvedBase:
    """Find the base that an adapter was trained on; with `base_model`, look nowhere else.

    With `allow_base_mismatch`, the named or recorded base is accepted whatever its content.

    Raises:
        BaseMismatchError: The only base found is another one.
        AssetError: No base was found; the message lists the places.
        ConfigError: `base_model` has no valid form.
    """
    if base_model is not None:
        named = base_model if isinstance(base_model, ResolvedBase) else _resolve(str(base_model), facts, settings)
        check_base(facts, fingerprint_base(named.path, settings), named, uri, allow=allow_base_mismatch)
        return named
    tried: list[str] = []
    other: ResolvedBase | None = None
    try:
        other = _resolve(facts.source, facts, settings)
        if fingerprint_base(other.path, settings) == facts.fingerprint or allow_base_mismatch:
            return other
        tried.append(f"{facts.source}: another base than the one trained on")
    except (AssetError, ConfigError, StorageError) as error:
        # A cache that cannot be written: the base may be in a place that needs no cache.
        tried.append(f"{facts.source}: {error}")
    for path in local_bases(settings):
        try:
            # There may be many bases: weights, which are large, are hashed only if everything else matches.
            difference = differing_part(path, facts.fingerprint, settings)
        except AssetError as error:
            tried.append(f"{path}: {error}")
            continue
        if difference is None:
            logger.info("base of %s: %s, found by its fingerprint", uri, path)
            digest = directory_digest(path, settings, files=base_files(path))
            return ResolvedBase(source=str(path), revision=digest, path=path, pinned=False)
        tried.append(f"{path}: another base, {difference}")
    if other is not None:
        check_base(facts, fingerprint_base(other.path, settings), other, uri, allow=False)
    listed = "\n  ".join(tried)
    raise AssetError(
        f"the base of {uri} is not on this machine and cannot be fetched: {facts.source} at {facts.revision}, "
        f"fingerprint {facts.fingerprint.digest}. Searched:\n  {listed}\nName it (base_model=...), or put it into a "
        "directory that RANKWISE_BASES lists"
    )


def check_base(facts: BaseFacts, fingerprint: Fingerprint, base: Any, uri: str, *, allow: bool) -> list[Override]:
    """Compare a base's fingerprint with the recorded one, and return the override to record, if any.

    `base` is an object with `source`, `revision` and `path`. With `allow`, a difference gives a warning only.

    Raises:
        BaseMismatchError: They differ and `allow` is not set.
    """
    if fingerprint == facts.fingerprint:
        return []
    lines = [
        f"{part}: found {getattr(fingerprint, part)}, trained on {getattr(facts.fingerprint, part)}"
        for part in _PARTS
        if getattr(fingerprint, part) != getattr(facts.fingerprint, part)
    ]
    text = (
        f"base {base.source} at {base.revision} ({base.path}) is not the one that {uri} was trained on:\n  "
        + "\n  ".join(lines)
        + f"\nTrained on: {facts.source} at {facts.revision}, fingerprint {facts.fingerprint.digest}; found: "
        f"{fingerprint.digest}."
    )
    if not allow:
        raise BaseMismatchError(
            f"{text}\nName the right base (base_model=...), put it into a directory that RANKWISE_BASES lists, or pass "
            "allow_base_mismatch=True to load it anyway; its answers are then not those of the registered model"
        )
    logger.warning("%s\nallow_base_mismatch: loaded anyway; the answers are not those of the registered model", text)
    return [
        Override(
            what="base",
            recorded=f"{facts.source} ({facts.fingerprint.digest})",
            used=f"{base.source} ({fingerprint.digest})",
        )
    ]


def check_quantization(facts: BaseFacts, used: QuantizationSpec, uri: str, *, allow: bool) -> list[Override]:
    """Compare a quantization with the recorded one. The compute dtype depends on the device and does not count.

    Raises:
        QuantizationMismatchError: They differ and `allow` is not set.
    """
    recorded, requested = describe_quantization(facts.quantization), describe_quantization(used)
    if recorded == requested:
        return []
    text = f"{uri} was trained over a base quantized as: {recorded}; requested: {requested}."
    if not allow:
        raise QuantizationMismatchError(
            f"{text} Leave quantization out, or pass allow_base_mismatch=True to load it anyway; its answers are "
            "then not those of the registered model"
        )
    logger.warning("%s allow_base_mismatch: loaded anyway", text)
    return [Override(what="quantization", recorded=recorded, used=requested)]


def describe_quantization(spec: QuantizationSpec) -> str:
    """A quantization in words, without the parts that have no effect."""
    if spec.load_in_4bit:
        double = "with double quantization" if spec.bnb_4bit_use_double_quant else "without double quantization"
        return f"4 bit {spec.bnb_4bit_quant_type} {double}"
    return "8 bit" if spec.load_in_8bit else "not quantized"


def _resolve(text: str, facts: BaseFacts, settings: Settings) -> ResolvedBase:
    try:
        source = parse_source(text)
    except ValueError as error:
        raise ConfigError(f"base_model: {error}") from error
    # A directory is compared by its fingerprint; the same hub id means the recorded commit.
    pinned = text == facts.source and not isinstance(source, LocalSource)
    return resolve_base(text, facts.revision if pinned else None, settings)


OVERRIDES_TAG = "rankwise.overrides"


def load_recorded_base(first: Fetched, options: LoadOptions) -> LoadedBase:
    """Find the base of a stored adapter, check it, and load it as recorded, with the adapter's additional rows.

    Raises:
        QuantizationMismatchError: The options have another quantization.
        BaseMismatchError: The only base found is another one.
        AssetError: No base was found.
    """
    facts, uri = first.metadata.base, first.origin.uri
    spec = options.quantization or facts.quantization
    check_quantization(facts, spec, uri, allow=options.allow_base_mismatch)
    resolved = find_base(
        facts,
        uri,
        options.settings,
        base_model=options.base_model,
        allow_base_mismatch=options.allow_base_mismatch,
    )
    base = _load_as_recorded(resolved, spec, facts, options)
    add_rows(base.model, read_adapter_config(first.adapter))
    return base


def rows_of(first: Fetched, resolved: ResolvedBase) -> int | None:
    """The embedding rows that an adapter was trained with; None if the base's files do not have their number."""
    rows = base_rows(resolved.path)
    return None if rows is None else rows_needed(read_adapter_config(first.adapter), rows)


def loads_plainly(first: Fetched, resolved: ResolvedBase) -> bool:
    """Whether `load_base` with the recorded quantization alone loads the base as recorded.

    If so, an adapter can share the base that training and evaluation load.
    """
    facts = first.metadata.base
    if rows_of(first, resolved) != base_rows(resolved.path):
        return False
    target = default_device()
    if target.type != facts.device_type:
        return True
    plain = resolve_dtype(target, facts.quantization.bnb_4bit_compute_dtype).name
    return {facts.compute_dtype, facts.load_dtype, facts.module_dtype} == {plain}


def recorded_attention(
    facts: BaseFacts, resolved: ResolvedBase, quantization: QuantizationSpec, device: str | None = None
) -> str:
    """The `attn_implementation` for loading a base: what training used if that runs on this device, else `auto`."""
    recorded = facts.attn_implementation or "sdpa"
    try:
        return base_attention(resolved, quantization, recorded, device=device).name
    except ConfigError as error:
        logger.warning("the adapter was trained with attention %s: %s", recorded, error)
        return "auto"


def check_alike(fetched: Sequence[Fetched], *, allow: bool) -> None:
    """Refuse adapters that were not trained over one base in one quantization.

    Raises:
        BaseMismatchError: The bases differ.
        QuantizationMismatchError: The quantizations differ.
    """
    first = fetched[0]
    for other in fetched[1:]:
        mine, theirs = first.metadata.base, other.metadata.base
        if mine.fingerprint != theirs.fingerprint and not allow:
            raise BaseMismatchError(
                f"{first.origin.uri} and {other.origin.uri} were trained on different bases: {mine.source} "
                f"({mine.fingerprint.digest}) and {theirs.source} ({theirs.fingerprint.digest}): "
                f"{'; '.join(mine.fingerprint.differences(theirs.fingerprint))}. Load them separately"
            )
        if describe_quantization(mine.quantization) != describe_quantization(theirs.quantization) and not allow:
            raise QuantizationMismatchError(
                f"{first.origin.uri} and {other.origin.uri} were trained over differently quantized bases: "
                f"{describe_quantization(mine.quantization)} and {describe_quantization(theirs.quantization)}. Load "
                "them separately"
            )


def compare_base(one: Fetched, base: LoadedBase, *, allow: bool) -> tuple[Override, ...]:
    """List the differences between a base in memory and the recorded one; refuse those that are not allowed."""
    facts, uri = one.metadata.base, one.origin.uri
    overrides = check_base(facts, base.fingerprint, base, uri, allow=allow)
    overrides += check_quantization(facts, base.quantization, uri, allow=allow)
    _check_rows(one, base)
    overrides += _implementations(facts, base)
    for override in overrides:
        if override.what not in {"base", "quantization"}:
            logger.info("%s: %s (logged on %s, loaded on %s)", uri, override, facts.device_type, base.device.type)
    return tuple(overrides)


def record_overrides(compared: Sequence[tuple[Fetched, Sequence[Override]]]) -> None:
    """Tag the active run, if any, with the other base or quantization that its results come from.

    Raises:
        TrackingError: MLflow cannot be reached.
    """
    lines = [
        f"{one.origin.uri}: {override}"
        for one, overrides in compared
        for override in overrides
        if override.what in {"base", "quantization"}
    ]
    run = mlflow.active_run() if lines else None
    if run is not None:
        with tracking_errors(f"recording that {lines[0]}"):
            MlflowClient().set_tag(run.info.run_id, OVERRIDES_TAG, "\n".join(lines))


def _check_rows(one: Fetched, base: LoadedBase) -> None:
    """Refuse a base in memory whose embedding has another number of rows than the adapter needs.

    For the other adapters, additional rows would be tokens of zeros, and one of those could be the most likely token.
    """
    recorded = base_rows(base.path)
    present = embedding_rows(base.model)
    needed = present if recorded is None else rows_needed(read_adapter_config(one.adapter), recorded)
    if needed != present:
        raise BaseMismatchError(
            f"{one.origin.uri} was trained with {needed} rows in the embedding, the base in memory has {present} (its "
            f"files have {recorded}): an adapter with rows for new tokens needs a base of its own. Load it "
            "separately (load_model, without base=)"
        )


def _implementations(facts: BaseFacts, base: LoadedBase) -> list[Override]:
    """Differences that change results by rounding only."""
    pairs = (
        ("compute_dtype", facts.compute_dtype, str(base.compute_dtype).removeprefix("torch.")),
        ("module_dtype", facts.module_dtype, str(base.module_dtype).removeprefix("torch.")),
        ("attn_implementation", facts.attn_implementation or base.attention.name, base.attention.name),
    )
    return [Override(what=what, recorded=recorded, used=used) for what, recorded, used in pairs if recorded != used]


def _load_as_recorded(
    resolved: ResolvedBase, spec: QuantizationSpec, facts: BaseFacts, options: LoadOptions
) -> LoadedBase:
    """Load a base in the recorded dtypes, unless the device is of another type or the caller names a dtype."""
    target = torch.device(options.device) if options.device is not None else default_device()
    explicit = options.quantization is not None and options.quantization.bnb_4bit_compute_dtype != "auto"
    # The same dtype on the same type of device gives the same bits.
    plain = explicit or target.type != facts.device_type
    exact = spec if plain else spec.model_copy(update={"bnb_4bit_compute_dtype": facts.compute_dtype})
    attention = options.attn_implementation or recorded_attention(facts, resolved, exact, options.device)
    base = load_base(
        resolved,
        exact,
        options.settings,
        device=options.device,
        module_dtype=None if plain else facts.load_dtype,
        attn_implementation=attention,
        towers=facts.towers,
        kernels=options.kernels,
    )
    if plain:
        return base
    return _cast_modules(base, facts.module_dtype)


def _cast_modules(base: LoadedBase, dtype: str) -> LoadedBase:
    """Cast what is not quantized, as `prepare_model_for_kbit_training` of peft does after loading."""
    wanted = DTYPES[dtype]
    if base.module_dtype == wanted:
        return base
    cast_modules(base.model, wanted)
    return replace(base, module_dtype=wanted)

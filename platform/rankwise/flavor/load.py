"""Loads stored adapters over exactly the base they were trained on; several over one base in memory.

The order: what the caller names, then the recorded source, then the directories of `RANKWISE_BASES` and the cache, by
fingerprint. Whichever it is, its content decides: a copy elsewhere is the same base, a changed byte is not.

Several adapters lie over one base only if all were trained over that base, quantized in one way, with one embedding.

- Finds the base of a stored adapter, and refuses any other.
- The base of stored adapters in memory: loaded as recorded, and compared with what was recorded.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlflow
import torch
from mlflow import MlflowClient
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import AutoTokenizer

from rankwise.assets.base import ResolvedBase, local_bases, resolve_base
from rankwise.assets.layout import base_files
from rankwise.digests import directory_digest
from rankwise.exceptions import (
    AdapterIntegrityError,
    AssetError,
    BaseMismatchError,
    ConfigError,
    QuantizationMismatchError,
    StorageError,
)
from rankwise.experiment.schema import QuantizationSpec
from rankwise.experiment.source import LocalSource, parse_source
from rankwise.flavor.fetch import Fetched, Origin, check, fetch
from rankwise.flavor.metadata import AdapterMetadata, BaseFacts, template_digest
from rankwise.flavor.package import LoadOptions
from rankwise.modeling.adapter import (
    add_rows,
    base_rows,
    embedding_rows,
    load_adapter,
    read_adapter_config,
    rows_needed,
)
from rankwise.modeling.base import DTYPES, LoadedBase, default_device, load_base, quiet_transformers, resolve_dtype
from rankwise.modeling.fingerprint import Fingerprint, differing_part, fingerprint_base
from rankwise.modeling.lora.packed import uninstall
from rankwise.settings import Settings
from rankwise.tracking.connection import tracking_errors

logger = logging.getLogger(__name__)

_PARTS = ("weights", "config", "tokenizer", "chat_template")


@dataclass(frozen=True, kw_only=True)
class Override:
    """Something that is not as it was when the adapter was logged, and was allowed.

    Attributes:
        what: `base`, `quantization`, `compute_dtype`, `module_dtype`.
        recorded: As it was.
        used: As it is.
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
    """Find the base that an adapter was trained on.

    Args:
        facts: What was recorded.
        uri: The adapter, for messages.
        settings: Where to look.
        base_model: Look here and nowhere else.
        allow_base_mismatch: Take the named or recorded base whatever it is.

    Raises:
        BaseMismatchError: What was found is another base.
        AssetError: Nothing was found; the message lists where it was looked for.
        ConfigError: `base_model` cannot be understood.
    """
    if base_model is not None:
        found = base_model if isinstance(base_model, ResolvedBase) else _resolve(str(base_model), facts, settings)
        check_base(facts, fingerprint_base(found.path, settings), found, uri, allow=allow_base_mismatch)
        return found
    tried: list[str] = []
    other: ResolvedBase | None = None
    try:
        other = _resolve(facts.source, facts, settings)
        if fingerprint_base(other.path, settings) == facts.fingerprint or allow_base_mismatch:
            return other
        tried.append(f"{facts.source}: another base than the one trained on")
    except (AssetError, ConfigError, StorageError) as error:
        # A cache that cannot be written: the base may lie where nothing has to be.
        tried.append(f"{facts.source}: {error}")
    for path in local_bases(settings):
        try:
            # Many bases may lie there: gigabytes are hashed only of one that agrees in everything else.
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
        f"fingerprint {facts.fingerprint.digest}. Looked at:\n  {listed}\nName it (base_model=...), or put it into a "
        "directory that RANKWISE_BASES lists"
    )


def check_base(facts: BaseFacts, found: Fingerprint, base: Any, uri: str, *, allow: bool) -> list[Override]:
    """Compare a base's fingerprint with the recorded one, part by part.

    Args:
        facts: What was recorded.
        found: The fingerprint of the base to use.
        base: It has `source`, `revision` and `path`.
        uri: The adapter, for messages.
        allow: Warn only.

    Returns:
        What to record: nothing, or the override.

    Raises:
        BaseMismatchError: They differ and `allow` is not set.
    """
    if found == facts.fingerprint:
        return []
    lines = [
        f"{part}: found {getattr(found, part)}, trained on {getattr(facts.fingerprint, part)}"
        for part in _PARTS
        if getattr(found, part) != getattr(facts.fingerprint, part)
    ]
    text = (
        f"base {base.source} at {base.revision} ({base.path}) is not the one that {uri} was trained on:\n  "
        + "\n  ".join(lines)
        + f"\nTrained on: {facts.source} at {facts.revision}, fingerprint {facts.fingerprint.digest}; found: "
        f"{found.digest}."
    )
    if not allow:
        raise BaseMismatchError(
            f"{text}\nName the right base (base_model=...), put it into a directory that RANKWISE_BASES lists, or pass "
            "allow_base_mismatch=True to load all the same; what it then answers is not what was registered"
        )
    logger.warning(
        "%s\nallow_base_mismatch: loaded all the same; the answers are not those of what was registered", text
    )
    return [
        Override(
            what="base",
            recorded=f"{facts.source} ({facts.fingerprint.digest})",
            used=f"{base.source} ({found.digest})",
        )
    ]


def check_quantization(facts: BaseFacts, used: QuantizationSpec, uri: str, *, allow: bool) -> list[Override]:
    """Compare a quantization with the recorded one; the compute dtype does not count, it follows the device.

    Raises:
        QuantizationMismatchError: They differ and `allow` is not set.
    """
    recorded, asked = describe_quantization(facts.quantization), describe_quantization(used)
    if recorded == asked:
        return []
    text = f"{uri} was trained over a base quantized as: {recorded}; asked for is: {asked}."
    if not allow:
        raise QuantizationMismatchError(
            f"{text} Leave quantization out, or pass allow_base_mismatch=True to load all the same; what it then "
            "answers is not what was registered"
        )
    logger.warning("%s allow_base_mismatch: loaded all the same", text)
    return [Override(what="quantization", recorded=recorded, used=asked)]


def describe_quantization(spec: QuantizationSpec) -> str:
    """A quantization in words, the parts that have no effect left out."""
    if spec.load_in_4bit:
        double = "with double quantization" if spec.bnb_4bit_use_double_quant else "without double quantization"
        return f"4 bit {spec.bnb_4bit_quant_type} {double}"
    return "8 bit" if spec.load_in_8bit else "not quantized"


def _resolve(text: str, facts: BaseFacts, settings: Settings) -> ResolvedBase:
    try:
        source = parse_source(text)
    except ValueError as error:
        raise ConfigError(f"base_model: {error}") from error
    # A directory goes by its fingerprint, which says what differs; the same hub id means the recorded commit.
    pinned = text == facts.source and not isinstance(source, LocalSource)
    return resolve_base(text, facts.revision if pinned else None, settings)


OVERRIDES_TAG = "rankwise.overrides"


def load_recorded_base(first: Fetched, options: LoadOptions) -> LoadedBase:
    """Find the base of a stored adapter, check it, and load it as recorded, with the rows that the adapter brings.

    Raises:
        QuantizationMismatchError: Another quantization is asked for.
        BaseMismatchError: What was found is another base.
        AssetError: Nothing was found.
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
    """The rows of the embedding that an adapter was trained with; None where the base's files do not say theirs."""
    rows = base_rows(resolved.path)
    return None if rows is None else rows_needed(read_adapter_config(first.adapter), rows)


def loads_plainly(first: Fetched, resolved: ResolvedBase) -> bool:
    """Whether `load_base` with the recorded quantization and nothing more gives the base as recorded.

    Then the base of an adapter is the one that training and evaluation load, and may be theirs.
    """
    facts = first.metadata.base
    if rows_of(first, resolved) != base_rows(resolved.path):
        return False
    target = default_device()
    if target.type != facts.device_type:
        return True
    plain = resolve_dtype(target, facts.quantization.bnb_4bit_compute_dtype).name
    return {facts.compute_dtype, facts.load_dtype, facts.module_dtype} == {plain}


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
                f"{'; '.join(mine.fingerprint.differences(theirs.fingerprint))}. Load them apart"
            )
        if describe_quantization(mine.quantization) != describe_quantization(theirs.quantization) and not allow:
            raise QuantizationMismatchError(
                f"{first.origin.uri} and {other.origin.uri} were trained over differently quantized bases: "
                f"{describe_quantization(mine.quantization)} and {describe_quantization(theirs.quantization)}. Load "
                "them apart"
            )


def compare_base(one: Fetched, base: LoadedBase, *, allow: bool) -> tuple[Override, ...]:
    """Everything in which a base in memory is not as recorded; what is not allowed is refused."""
    facts, uri = one.metadata.base, one.origin.uri
    found = check_base(facts, base.fingerprint, base, uri, allow=allow)
    found += check_quantization(facts, base.quantization, uri, allow=allow)
    _check_rows(one, base)
    found += _dtypes(facts, base)
    for override in found:
        if override.what.endswith("dtype"):
            logger.info("%s: %s (logged on %s, loaded on %s)", uri, override, facts.device_type, base.device.type)
    return tuple(found)


def record_overrides(compared: Sequence[tuple[Fetched, Sequence[Override]]]) -> None:
    """Tell the active run, where there is one, that what it will report comes from another base or quantization.

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
    """Refuse a base in memory whose embedding has been resized for another adapter, or was not for this one.

    Rows that one adapter brings would be tokens of zeros to its neighbours, and those could be the likeliest.
    """
    recorded = base_rows(base.path)
    present = embedding_rows(base.model)
    needed = present if recorded is None else rows_needed(read_adapter_config(one.adapter), recorded)
    if needed != present:
        raise BaseMismatchError(
            f"{one.origin.uri} was trained with {needed} rows in the embedding, the base in memory has {present} (its "
            f"files have {recorded}): adapters that bring rows for new tokens lie over a base of their own. Load it "
            "apart (load_model, without base=)"
        )


def _dtypes(facts: BaseFacts, base: LoadedBase) -> list[Override]:
    pairs = (
        ("compute_dtype", facts.compute_dtype, base.compute_dtype),
        ("module_dtype", facts.module_dtype, base.module_dtype),
    )
    return [
        Override(what=what, recorded=recorded, used=str(used).removeprefix("torch."))
        for what, recorded, used in pairs
        if recorded != str(used).removeprefix("torch.")
    ]


def _load_as_recorded(
    resolved: ResolvedBase, spec: QuantizationSpec, facts: BaseFacts, options: LoadOptions
) -> LoadedBase:
    """Load a base in the recorded dtypes; another device decides anew, and a dtype that was asked for is taken."""
    target = torch.device(options.device) if options.device is not None else default_device()
    asked = options.quantization is not None and options.quantization.bnb_4bit_compute_dtype != "auto"
    # The same dtype on the same type of device gives the same bits.
    if asked or target.type != facts.device_type:
        return load_base(resolved, spec, options.settings, device=options.device)
    exact = spec.model_copy(update={"bnb_4bit_compute_dtype": facts.compute_dtype})
    base = load_base(resolved, exact, options.settings, device=options.device, module_dtype=facts.load_dtype)
    return _cast_modules(base, facts.module_dtype)


def _cast_modules(base: LoadedBase, dtype: str) -> LoadedBase:
    """Cast what is not quantized, as peft's `prepare_model_for_kbit_training` does after a base was loaded."""
    wanted = DTYPES[dtype]
    if base.module_dtype == wanted:
        return base
    for parameter in base.model.parameters():
        if parameter.is_floating_point() and not hasattr(parameter, "quant_state"):
            parameter.data = parameter.data.to(wanted)
    return replace(base, module_dtype=wanted)


@dataclass(frozen=True, kw_only=True, eq=False)
class LoadedAdapter:
    """A stored adapter in memory, over its base.

    Attributes:
        model: The base's model with the adapter in it; shared by all adapters over one base.
        tokenizer: The adapter's own, with its chat template.
        metadata: What was recorded when it was logged.
        adapter_name: Its name in `model`.
        base: The base it lies over.
        origin: Which stored model it is: resolved URI, version, run, tags.
        overrides: What is not as it was when the adapter was logged; empty if all is.
    """

    model: Any
    tokenizer: Any
    metadata: AdapterMetadata
    adapter_name: str
    base: LoadedBase
    origin: Origin
    overrides: tuple[Override, ...]

    def activate(self) -> None:
        """Make this adapter, and no other over the base, the one that a plain call of `model` goes through.

        For batches in which rows go through different adapters use `modeling.lora.packed` with `adapter_name`.
        """
        activate(self.model, self.adapter_name)


def load_model(
    uri: str | Path | Fetched,
    base_model: str | Path | ResolvedBase | None = None,
    quantization: QuantizationSpec | None = None,
    allow_base_mismatch: bool = False,
    device: str | None = None,
    settings: Settings | None = None,
    *,
    base: LoadedBase | None = None,
    tracking_uri: str | None = None,
) -> LoadedAdapter:
    """Load a stored adapter over its base.

    Files are checked before they are parsed, the base before any weight is attached. On the same type of device the
    logits are those of before logging, to the bit.

    Args:
        uri: `models:/NAME@ALIAS`, `models:/NAME/VERSION`, `models:/m-...`, `runs:/RUN_ID/NAME`, or a directory; or what
            `fetch` has given for one, within its block.
        base_model: Where the base is; by default the recorded source, then `RANKWISE_BASES`, by fingerprint.
        quantization: How to quantize it; as recorded by default. Another one is refused, unless allowed; only its
            compute dtype may differ.
        allow_base_mismatch: Take another base or quantization all the same, with a warning; see `overrides`. Where a
            run is active (an evaluation, say), its tag `rankwise.overrides` tells of it.
        device: `cpu`, `cuda`, `cuda:1`; the first GPU, else the CPU, by default.
        settings: Where caches and bases are; from the environment by default.
        base: A base in memory to lie over.
        tracking_uri: Of the MLflow store; MLflow's current one by default.

    Raises:
        AdapterIntegrityError: A stored file is not what was stored.
        BaseMismatchError: The base is another one.
        QuantizationMismatchError: The base is quantized in another way.
        AssetError: The base is not to be found.
        TrackingError: MLflow cannot be reached, or has no such model.
    """
    return load_models(
        [uri],
        base_model=base_model,
        quantization=quantization,
        allow_base_mismatch=allow_base_mismatch,
        device=device,
        settings=settings,
        base=base,
        tracking_uri=tracking_uri,
    )[0]


def load_models(
    uris: Sequence[str | Path | Fetched],
    base_model: str | Path | ResolvedBase | None = None,
    quantization: QuantizationSpec | None = None,
    allow_base_mismatch: bool = False,
    device: str | None = None,
    settings: Settings | None = None,
    *,
    base: LoadedBase | None = None,
    find: Callable[[Fetched, LoadOptions], LoadedBase] | None = None,
    tracking_uri: str | None = None,
) -> list[LoadedAdapter]:
    """Load several stored adapters over one base in memory. Arguments are those of `load_model`, and one more.

    `find` gives the base that the first adapter asks for, in place of loading it anew; it is checked as any other. The
    first adapter is active; over a base that may be in memory already (`base`, `find`) nothing changes in what is
    active (see `LoadedAdapter.activate`, and `modeling.lora.packed` for batches whose rows go through different
    adapters).

    Raises:
        RankwiseError: As `load_model`; adapters of different bases or quantizations are refused, with both named.
    """
    if not uris:
        raise ConfigError("load_models needs at least one model")
    if base is not None and (base_model is not None or quantization is not None or device is not None):
        raise ConfigError("base is a base in memory: leave out base_model, quantization and device")
    options = LoadOptions(
        settings=settings or Settings.load(),
        base_model=base_model,
        quantization=quantization,
        allow_base_mismatch=allow_base_mismatch,
        device=device,
    )
    with ExitStack() as stack:
        fetched = [uri if isinstance(uri, Fetched) else stack.enter_context(fetch(uri, tracking_uri)) for uri in uris]
        fresh = base is None and find is None
        if base is None:
            check_alike(fetched, allow=allow_base_mismatch)
            base = (find or load_recorded_base)(fetched[0], options)
        overrides = [compare_base(one, base, allow=allow_base_mismatch) for one in fetched]
        record_overrides(list(zip(fetched, overrides, strict=True)))
        loaded = [_attach(one, base, found) for one, found in zip(fetched, overrides, strict=True)]
        if fresh:
            loaded[0].activate()
        return loaded


def load_directory(directory: Path, origin: Origin, options: LoadOptions) -> LoadedAdapter:
    """Load a model directory that MLflow has fetched; checks and errors are those of `load_model`."""
    one = check(directory, origin)
    base = load_recorded_base(one, options)
    overrides = compare_base(one, base, allow=options.allow_base_mismatch)
    record_overrides([(one, overrides)])
    return _attach(one, base, overrides)


def activate(model: Any, adapter_name: str) -> None:
    """Give a model peft's own forward, through one adapter; nothing asks for a gradient that did not before."""
    uninstall(model)
    asking = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            # A layer that has no such adapter is the bare base then.
            module.set_adapter(adapter_name)
    for parameter in model.parameters():
        if parameter.requires_grad != (id(parameter) in asking):
            parameter.requires_grad_(id(parameter) in asking)


def _attach(one: Fetched, base: LoadedBase, overrides: tuple[Override, ...]) -> LoadedAdapter:
    tokenizer = load_tokenizer(one)
    name = _name(one)
    if name not in (getattr(base.model, "peft_config", None) or {}):
        load_adapter(base.model, one.adapter, name)
    return LoadedAdapter(
        model=base.model,
        tokenizer=tokenizer,
        metadata=one.metadata,
        adapter_name=name,
        base=base,
        origin=one.origin,
        overrides=overrides,
    )


def load_tokenizer(one: Fetched) -> Any:
    """The tokenizer that is stored with an adapter.

    Raises:
        AdapterIntegrityError: It cannot be read, or its template is not the recorded one.
    """
    with quiet_transformers():
        try:
            tokenizer = AutoTokenizer.from_pretrained(str(one.adapter), local_files_only=True, trust_remote_code=False)
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise AdapterIntegrityError(f"the tokenizer of {one.origin.uri} cannot be loaded: {error}") from error
    digest = template_digest(tokenizer)
    if digest != one.metadata.chat_template:
        raise AdapterIntegrityError(
            f"the chat template of {one.origin.uri} is {digest}, stored was {one.metadata.chat_template}"
        )
    return tokenizer


def _name(one: Fetched) -> str:
    """A name in the model: readable, without dots, and of the same content only (the manifest's digest is in it)."""
    readable = re.sub(r"[^A-Za-z0-9_-]+", "-", one.origin.name or "adapter").strip("-")
    return f"{readable}-{one.metadata.manifest.removeprefix('sha256:')[:12]}"

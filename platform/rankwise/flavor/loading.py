"""Loads stored adapters over exactly the base they were trained on; several over one base in memory."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import AutoTokenizer

from rankwise.assets.base import ResolvedBase
from rankwise.exceptions import AdapterIntegrityError, BaseMismatchError, ConfigError, QuantizationMismatchError
from rankwise.experiment.schema import QuantizationSpec
from rankwise.flavor.bases import Override, check_base, check_quantization, describe_quantization, find_base
from rankwise.flavor.fetch import Fetched, Origin, check, fetch
from rankwise.flavor.metadata import AdapterMetadata, BaseFacts, template_digest
from rankwise.modeling.adapter import load_adapter
from rankwise.modeling.adapter_config import read_adapter_config
from rankwise.modeling.base import LoadedBase, load_base
from rankwise.modeling.dtype import DTYPES, default_device
from rankwise.modeling.embeddings import add_rows, base_rows, embedding_rows, rows_needed
from rankwise.modeling.packed_lora import uninstall
from rankwise.modeling.quiet import quiet_transformers
from rankwise.settings import Settings

logger = logging.getLogger(__name__)


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

        For batches in which rows go through different adapters use `modeling.packed_lora` with `adapter_name`.
        """
        activate(self.model, self.adapter_name)


def load_model(
    uri: str | Path,
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
        uri: `models:/NAME@ALIAS`, `models:/NAME/VERSION`, `models:/m-...`, `runs:/RUN_ID/NAME`, or a directory.
        base_model: Where the base is; by default the recorded source, then `RANKWISE_BASES`, by fingerprint.
        quantization: How to quantize it; as recorded by default. Another one is refused, unless allowed; only its
            compute dtype may differ.
        allow_base_mismatch: Take another base or quantization all the same, with a warning; see `overrides`.
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
    uris: Sequence[str | Path],
    base_model: str | Path | ResolvedBase | None = None,
    quantization: QuantizationSpec | None = None,
    allow_base_mismatch: bool = False,
    device: str | None = None,
    settings: Settings | None = None,
    *,
    base: LoadedBase | None = None,
    tracking_uri: str | None = None,
) -> list[LoadedAdapter]:
    """Load several stored adapters over one base in memory. Arguments are those of `load_model`.

    The first is active; over a `base` that is in memory already nothing changes in what is active (see
    `LoadedAdapter.activate`, and `modeling.packed_lora` for batches whose rows go through different adapters).

    Raises:
        RankwiseError: As `load_model`; adapters of different bases or quantizations are refused, with both named.
    """
    if not uris:
        raise ConfigError("load_models needs at least one model")
    if base is not None and (base_model is not None or quantization is not None or device is not None):
        raise ConfigError("base is a base in memory: leave out base_model, quantization and device")
    chosen = settings or Settings.load()
    with ExitStack() as stack:
        fetched = [stack.enter_context(fetch(uri, tracking_uri)) for uri in uris]
        fresh = base is None
        if base is None:
            _check_alike(fetched, allow=allow_base_mismatch)
            base = _load_base(fetched[0], base_model, quantization, chosen, device, allow=allow_base_mismatch)
        overrides = [_compare(one, base, allow=allow_base_mismatch) for one in fetched]
        loaded = [_attach(one, base, found) for one, found in zip(fetched, overrides, strict=True)]
        if fresh:
            loaded[0].activate()
        return loaded


def load_directory(
    directory: Path,
    origin: Origin,
    *,
    base_model: str | None,
    device: str | None,
    allow_base_mismatch: bool,
    settings: Settings,
) -> LoadedAdapter:
    """Load a model directory that MLflow has fetched; checks and errors are those of `load_model`."""
    one = check(directory, origin)
    base = _load_base(one, base_model, None, settings, device, allow=allow_base_mismatch)
    return _attach(one, base, _compare(one, base, allow=allow_base_mismatch))


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


def _load_base(
    first: Fetched,
    base_model: str | Path | ResolvedBase | None,
    quantization: QuantizationSpec | None,
    settings: Settings,
    device: str | None,
    *,
    allow: bool,
) -> LoadedBase:
    facts, uri = first.metadata.base, first.origin.uri
    spec = quantization or facts.quantization
    check_quantization(facts, spec, uri, allow=allow)
    resolved = find_base(facts, uri, settings, base_model=base_model, allow_base_mismatch=allow)
    base = _load_as_recorded(resolved, spec, facts, settings, device, keep=quantization is not None)
    add_rows(base.model, read_adapter_config(first.adapter))
    return base


def _load_as_recorded(
    resolved: ResolvedBase,
    spec: QuantizationSpec,
    facts: BaseFacts,
    settings: Settings,
    device: str | None,
    *,
    keep: bool,
) -> LoadedBase:
    """Load a base in the recorded dtypes, but for another device, or where `keep` and `spec` names one itself."""
    target = torch.device(device) if device is not None else default_device()
    # The same dtype on the same type of device gives the same bits; another device decides anew.
    if (keep and spec.bnb_4bit_compute_dtype != "auto") or target.type != facts.device_type:
        return load_base(resolved, spec, settings, device=device)
    exact = spec.model_copy(update={"bnb_4bit_compute_dtype": facts.compute_dtype})
    base = load_base(resolved, exact, settings, device=device, module_dtype=facts.load_dtype)
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


def _check_alike(fetched: Sequence[Fetched], *, allow: bool) -> None:
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


def _compare(one: Fetched, base: LoadedBase, *, allow: bool) -> tuple[Override, ...]:
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

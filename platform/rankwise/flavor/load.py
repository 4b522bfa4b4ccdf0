"""Loads stored adapters over exactly the base they were trained on; several adapters over one base in memory.

Adapters share a base only if all were trained over that base, in one quantization, with embeddings of one size.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import AutoTokenizer

from rankwise.assets.base import ResolvedBase
from rankwise.exceptions import (
    AdapterIntegrityError,
    ConfigError,
)
from rankwise.experiment.schema import QuantizationSpec
from rankwise.flavor.base import Override, check_alike, compare_base, load_recorded_base, record_overrides
from rankwise.flavor.fetch import Fetched, Origin, check, fetch
from rankwise.flavor.metadata import AdapterMetadata, template_digest
from rankwise.flavor.package import LoadOptions
from rankwise.modeling.adapter import (
    load_adapter,
)
from rankwise.modeling.base import Kernels, LoadedBase, quiet_transformers
from rankwise.modeling.lora.packed import uninstall
from rankwise.settings import Settings


@dataclass(frozen=True, kw_only=True, eq=False)
class LoadedAdapter:
    """A stored adapter in memory, over its base.

    `model` is the base's, shared by all adapters over it; `adapter_name` is the adapter's name there. `tokenizer` is
    the adapter's own, with its chat template. `overrides` are differences from what was recorded.
    """

    model: Any
    tokenizer: Any
    metadata: AdapterMetadata
    adapter_name: str
    base: LoadedBase
    origin: Origin
    overrides: tuple[Override, ...]

    def activate(self) -> None:
        """Make this adapter the only active one of `model`.

        For batches whose rows use different adapters, see `rankwise.modeling.lora.packed`.
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
    attn_implementation: str | None = None,
    kernels: Kernels = "exact",
    base: LoadedBase | None = None,
    tracking_uri: str | None = None,
) -> LoadedAdapter:
    """Load a stored adapter over its base.

    Files are checked before they are parsed, and the base before any weight is attached. On the same type of device,
    the logits are bit for bit those from before logging.

    Args:
        uri: `models:/NAME@ALIAS`, `models:/NAME/VERSION`, `models:/m-...`, `runs:/RUN_ID/NAME`, a directory, or the
            result of `fetch`, inside its block.
        base_model: Where the base is; by default the recorded source, then `RANKWISE_BASES`, by fingerprint.
        quantization: By default the recorded one. Only its compute dtype may differ, unless a mismatch is allowed.
        allow_base_mismatch: Accept another base or quantization, with a warning and an entry in `overrides`. The tag
            `rankwise.overrides` of the active run, if any, records it.
        device: `cpu`, `cuda`, `cuda:1`; by default the first GPU, or the CPU without one.
        attn_implementation: By default what training used, where that runs on this device, and the fastest supported
            one elsewhere; or `auto`, `sdpa`, `eager`, `flash_attention_2`, `flex_attention`.
        settings: Where caches and bases are; by default from the environment.
        kernels: `exact` computes what rankwise trains and evaluates with. `library` lets bitsandbytes choose: on CPUs
            with AVX512-BF16 it repacks 4-bit weights, and the logits are those of a plain peft model there.
        base: A base in memory to use.
        tracking_uri: By default MLflow's current store.

    Raises:
        AdapterIntegrityError: A file is not what was stored.
        BaseMismatchError: The base is another one.
        QuantizationMismatchError: The base has another quantization.
        AssetError: The base was not found.
        TrackingError: MLflow cannot be reached, or has no such model.
    """
    return load_models(
        [uri],
        base_model=base_model,
        quantization=quantization,
        allow_base_mismatch=allow_base_mismatch,
        device=device,
        settings=settings,
        attn_implementation=attn_implementation,
        kernels=kernels,
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
    attn_implementation: str | None = None,
    kernels: Kernels = "exact",
    base: LoadedBase | None = None,
    find: Callable[[Fetched, LoadOptions], LoadedBase] | None = None,
    tracking_uri: str | None = None,
) -> list[LoadedAdapter]:
    """Load several stored adapters over one base in memory. The arguments are those of `load_model`, and `find`.

    `find` returns the base for the first adapter, in place of loading it; that base is checked too. The first adapter
    is active. Over a base that was in memory before (`base`, `find`), the active adapter does not change.

    Raises:
        RankwiseError: As in `load_model`, and if the adapters have different bases or quantizations.
    """
    if not uris:
        raise ConfigError("load_models needs at least one model")
    if kernels not in get_args(Kernels):
        raise ConfigError(f"kernels must be exact or library, got {kernels!r}")
    if base is not None and kernels != base.kernels:
        raise ConfigError(f"base is a base in memory with {base.kernels} kernels, got kernels={kernels!r}")
    if base is not None and any(given is not None for given in (base_model, quantization, device, attn_implementation)):
        raise ConfigError(
            "base is a base in memory: leave out base_model, quantization, device and attn_implementation"
        )
    options = LoadOptions(
        settings=settings or Settings.load(),
        base_model=base_model,
        quantization=quantization,
        allow_base_mismatch=allow_base_mismatch,
        device=device,
        attn_implementation=attn_implementation,
        kernels=kernels,
    )
    with ExitStack() as stack:
        fetched = [uri if isinstance(uri, Fetched) else stack.enter_context(fetch(uri, tracking_uri)) for uri in uris]
        fresh = base is None and find is None
        if base is None:
            check_alike(fetched, allow=allow_base_mismatch)
            base = (find or load_recorded_base)(fetched[0], options)
        overrides = [compare_base(one, base, allow=allow_base_mismatch) for one in fetched]
        record_overrides(list(zip(fetched, overrides, strict=True)))
        loaded = [_attach(one, base, differences) for one, differences in zip(fetched, overrides, strict=True)]
        if fresh:
            loaded[0].activate()
        return loaded


def load_directory(directory: Path, origin: Origin, options: LoadOptions) -> LoadedAdapter:
    """Load a model directory that MLflow has downloaded; checks and errors are those of `load_model`."""
    one = check(directory, origin)
    base = load_recorded_base(one, options)
    overrides = compare_base(one, base, allow=options.allow_base_mismatch)
    record_overrides([(one, overrides)])
    return _attach(one, base, overrides)


def activate(model: Any, adapter_name: str) -> None:
    """Give a model peft's own forward, through one adapter; which parameters require a gradient does not change."""
    uninstall(model)
    trainable = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            # A layer without that adapter computes the base alone.
            module.set_adapter(adapter_name)
    for parameter in model.parameters():
        if parameter.requires_grad != (id(parameter) in trainable):
            parameter.requires_grad_(id(parameter) in trainable)


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
    """A readable name in the model, without dots. It contains the manifest's digest: one name, one content."""
    readable = re.sub(r"[^A-Za-z0-9_-]+", "-", one.origin.name or "adapter").strip("-")
    return f"{readable}-{one.metadata.manifest.removeprefix('sha256:')[:12]}"

"""The base of stored adapters in memory: loaded as recorded, and compared with what was recorded.

Several adapters lie over one base only if all were trained over that base, quantized in one way, with one embedding.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

import mlflow
import torch
from mlflow import MlflowClient

from rankwise.assets.base import ResolvedBase
from rankwise.exceptions import BaseMismatchError, QuantizationMismatchError
from rankwise.experiment.schema import QuantizationSpec
from rankwise.flavor.bases import Override, check_base, check_quantization, describe_quantization, find_base
from rankwise.flavor.fetch import Fetched
from rankwise.flavor.metadata import BaseFacts
from rankwise.flavor.options import LoadOptions
from rankwise.modeling.adapter_config import read_adapter_config
from rankwise.modeling.base import LoadedBase, load_base
from rankwise.modeling.dtype import DTYPES, default_device, resolve_dtype
from rankwise.modeling.embeddings import add_rows, base_rows, embedding_rows, rows_needed
from rankwise.tracking.errors import tracking_errors

OVERRIDES_TAG = "rankwise.overrides"

logger = logging.getLogger(__name__)


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

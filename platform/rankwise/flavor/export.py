"""Exports a stored adapter merged into its base, and compares the merged model with the registered one.

`rankwise_export.json` and the card record what it was merged into and how well the two models agree.
"""

from __future__ import annotations

import gc
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoModelForCausalLM

from rankwise import __version__
from rankwise.assets.base import ResolvedBase
from rankwise.assets.layout import read_json, tensors
from rankwise.exceptions import ConfigError, StorageError
from rankwise.experiment.schema import QuantizationSpec
from rankwise.flavor.base import describe_quantization
from rankwise.flavor.card import merged_card
from rankwise.flavor.inputs import BUILT_IN, tokens_of
from rankwise.flavor.load import LoadedAdapter, load_model
from rankwise.flavor.package import check_target, placed
from rankwise.modeling.adapter import adapter_tensors
from rankwise.modeling.base import DTYPES, config_from, load_base, quiet_transformers
from rankwise.modeling.merge import (
    Agreement,
    Reference,
    compare_answers,
    merge_adapter,
    record_answers,
    take_dequantized,
)
from rankwise.modeling.rope import per_row
from rankwise.modeling.wrappers import loading_of
from rankwise.settings import Settings

logger = logging.getLogger(__name__)

EXPORT_NAME = "rankwise_export.json"
MERGED_INTO = {
    "16bit": "the 16-bit base, as its files hold it",
    "nf4-dequantized": "the 4-bit base that the adapter was trained over, dequantized",
}
_SHARD = "5GB"

Into = Literal["16bit", "nf4-dequantized"]


@dataclass(frozen=True, kw_only=True)
class Export:
    """A merged model on disk.

    Attributes:
        into: What the adapter was merged into.
        reason: The reason for that, in words.
        record: The content of `rankwise_export.json`.
    """

    directory: Path
    into: Into
    reason: str
    agreement: Agreement
    record: dict[str, Any]


def export_merged(
    uri: str | Path,
    directory: Path,
    *,
    into: Into | None = None,
    dtype: str | None = None,
    prompts: Sequence[Any] | None = None,
    max_new_tokens: int = 32,
    base_model: str | Path | None = None,
    device: str | None = None,
    settings: Settings | None = None,
    tracking_uri: str | None = None,
) -> Export:
    """Merge a stored adapter into its base, and write a directory that `AutoModelForCausalLM` loads.

    Needs memory for the quantized base, the base in `dtype`, and the targeted weights in float32.

    Args:
        uri: As in `rankwise.flavor.load_model`.
        directory: Created with its parents, complete or not at all. Replaces an earlier, unchanged export.
        into: `16bit` or `nf4-dequantized`; for a 4-bit base the default is the second, which agrees better.
        dtype: Of the merged weights: `bfloat16`, `float16`, `float32`; by default the 16-bit type of the base's files,
            or bfloat16.
        prompts: Texts or chats to measure the agreement on; by default a few built-in ones.
        max_new_tokens: Length of each compared answer.
        base_model: Where the base is, as in `load_model`.
        device: Where the models are compared, as in `load_model`; merging uses the CPU.
        settings: Where caches and bases are; by default from the environment.
        tracking_uri: By default MLflow's current store.

    Raises:
        ConfigError: `nf4-dequantized` is chosen for a base that is not in 4 bit, or an argument is not valid.
        AdapterIntegrityError: A file is not what was stored, or a merged weight is not finite.
        BaseMismatchError: The base is another one.
        StorageError: The directory contains something else, or cannot be written.
    """
    target = directory.expanduser().absolute()
    check_target(target)
    chosen = settings or Settings.load()
    loaded = load_model(uri, base_model, device=device, settings=chosen, tracking_uri=tracking_uri)
    used, reason = _choose(into, loaded)
    result = DTYPES[dtype] if dtype is not None else _sixteen_bit(loaded)
    logger.info("merging %s into %s (%s), in %s", loaded.origin.uri, MERGED_INTO[used], reason, result)
    metadata = loaded.metadata
    tokens = tokens_of(list(prompts or BUILT_IN), loaded.tokenizer, loaded.base.path, metadata.system, metadata.reading)
    references = record_answers(loaded.model, loaded.tokenizer, tokens, max_new_tokens=max_new_tokens)
    merged = _merge(loaded, used, result, chosen)
    with placed(target, f"exporting {loaded.origin.uri}") as temporary:
        with quiet_transformers():
            merged.save_pretrained(str(temporary), max_shard_size=_SHARD)
            loaded.tokenizer.save_pretrained(str(temporary))
        del merged
        record = _record(loaded, used, reason, result)
        # Free everything that the comparison does not need.
        compute, where, attention = loaded.base.module_dtype, loaded.base.device, loaded.base.attention.name
        metadata, origin = loaded.metadata, loaded.origin
        del loaded
        gc.collect()
        agreement = _measure(temporary, references, compute, where, attention)
        record["agreement"] = {
            **agreement.to_dict(),
            "prompts_from": "given" if prompts else "built in",
            "max_new_tokens": max_new_tokens,
            "computed_in": _name(compute),
            "device": where.type,
        }
        text = json.dumps(record, indent=2, ensure_ascii=False) + "\n"
        (temporary / EXPORT_NAME).write_text(text, encoding="utf-8")
        (temporary / "README.md").write_text(merged_card(metadata, origin.uri, record), encoding="utf-8")
    return Export(directory=target, into=used, reason=reason, agreement=agreement, record=record)


def _choose(into: Into | None, loaded: LoadedAdapter) -> tuple[Into, str]:
    quantization = loaded.metadata.base.quantization
    if into is None:
        if quantization.load_in_4bit and not loaded.base.share_4bit:
            return "16bit", "by default: no layer of the base is in 4 bit"
        if quantization.load_in_4bit:
            return "nf4-dequantized", "by default: it is what the adapter was trained over"
        return "16bit", f"by default: the base is {describe_quantization(quantization)}"
    if into == "nf4-dequantized" and not quantization.load_in_4bit:
        raise ConfigError(
            f"the base of {loaded.origin.uri} is {describe_quantization(quantization)}, so there is nothing in 4 bit "
            "to dequantize; merge into 16bit"
        )
    return into, "as requested"


def _sixteen_bit(loaded: LoadedAdapter) -> torch.dtype:
    """The 16-bit type of the base's files; bfloat16 if they have another type."""
    largest = max(tensors(loaded.base.path), key=lambda entry: entry.stop - entry.start)
    return torch.float16 if largest.dtype == "F16" else torch.bfloat16


def _merge(loaded: LoadedAdapter, into: Into, dtype: torch.dtype, settings: Settings) -> Any:
    base = loaded.base
    resolved = ResolvedBase(source=base.source, revision=base.revision, path=base.path, pinned=True)
    if base.prequantized and into == "16bit":
        raise ConfigError(
            f"the files of base {base.source} are quantized themselves, so there is no 16-bit base to merge into; "
            "merge into nf4-dequantized"
        )
    quantization = base.quantization if base.prequantized else QuantizationSpec(load_in_4bit=False)
    # With the towers of a multimodal wrapper, so that the result is a whole model.
    towers = base.model.config.get_text_config() is not base.model.config
    plain = load_base(resolved, quantization, settings, device="cpu", module_dtype=_name(dtype), towers=towers).model
    if base.prequantized:
        plain = plain.dequantize()
    if into == "nf4-dequantized":
        take_dequantized(plain, base.model)
    config = loaded.model.peft_config[loaded.adapter_name]
    return merge_adapter(plain, config, adapter_tensors(loaded.model, loaded.adapter_name), dtype)


def _measure(
    directory: Path, references: list[Reference], dtype: torch.dtype, device: torch.device, attention: str
) -> Agreement:
    """Load the written model as a user would, and compare it along the registered model's answers."""
    with quiet_transformers():
        config = config_from(read_json(directory / "config.json"))
        model_class = loading_of(config, towers=True).model_class or AutoModelForCausalLM
        model, info = model_class.from_pretrained(
            str(directory),
            dtype=dtype,
            attn_implementation=attention,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
            **({} if model_class is not AutoModelForCausalLM else {"trust_remote_code": False}),
        )
    wrong = sorted({*info["missing_keys"], *info["unexpected_keys"], *map(str, info["mismatched_keys"])})
    if wrong:
        raise StorageError(f"the merged model does not load as it was written: {', '.join(wrong[:5])}")
    per_row(model)  # The registered model's rows are computed so, too.
    return compare_answers(references, model.to(device).eval())


def _record(loaded: LoadedAdapter, into: Into, reason: str, dtype: torch.dtype) -> dict[str, Any]:
    facts, origin = loaded.metadata.base, loaded.origin
    return {
        "format": "rankwise-export",
        "version": 1,
        "model": origin.uri,
        "manifest": loaded.metadata.manifest,
        "merged_into": into,
        "merged_into_text": MERGED_INTO[into],
        "reason": reason,
        "dtype": _name(dtype),
        "base": {
            "source": facts.source,
            "revision": facts.revision,
            "fingerprint": facts.fingerprint.digest,
            "quantization": describe_quantization(facts.quantization),
        },
        "lora": dict(loaded.metadata.lora),
        "overrides": [str(override) for override in loaded.overrides],
        "rankwise": __version__,
    }


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

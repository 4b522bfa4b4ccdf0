"""`adapter_config.json`: read strictly, written so that the same adapter gives the same bytes."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import peft
from peft import LoraConfig

from rankwise.exceptions import AdapterIntegrityError
from rankwise.settings import write_atomically

CONFIG_NAME = "adapter_config.json"

# Not a field of the file: peft drops it on saving and warns on loading.
_NOT_IN_FILES = {"runtime_config"}
# What changes the base itself, imports a module by name or reads another file; none of it belongs to a plain adapter.
_MUST_BE_EMPTY = (
    "megatron_config", "layer_replication", "loftq_config", "eva_config", "corda_config", "lora_ga_config",
    "velora_config", "monteclora_config", "arrow_config", "kasa_config", "use_bdlora", "alora_invocation_tokens",
)  # fmt: skip
# PiSSA, OLoRA, CorDA, LoftQ and the like put a part of the base's weights into the adapter and change the base.
_PLAIN_INITIALISATIONS = (True, False, "gaussian", "orthogonal", "eva")


def read_adapter_config(directory: Path) -> LoraConfig:
    """Read and check the configuration of a PEFT directory.

    Raises:
        AdapterIntegrityError: The file is missing or no JSON object; has keys that the installed peft does not know,
            `auto_map` anywhere, a mapping to code outside of transformers, another method than LoRA, or settings that
            change the base.
    """
    path = directory / CONFIG_NAME
    try:
        document = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise AdapterIntegrityError(f"{directory} has no {CONFIG_NAME}, so it is no PEFT adapter") from error
    except (OSError, ValueError) as error:
        raise AdapterIntegrityError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(document, dict):
        raise AdapterIntegrityError(f"{path} must hold a JSON object, got {type(document).__name__}")
    _check(document, path)
    values = {key: value for key, value in document.items() if key not in {"auto_mapping", "peft_type"}}
    try:
        config = LoraConfig(**values)
    except (TypeError, ValueError) as error:
        raise AdapterIntegrityError(f"{path}: peft {peft.__version__} refuses it: {error}") from error
    if not isinstance(config.r, int) or isinstance(config.r, bool) or config.r <= 0:
        raise AdapterIntegrityError(f"{path}: r must be a positive integer, got {config.r!r}")
    return config


def write_adapter_config(
    config: LoraConfig, directory: Path, *, base_source: str | None, base_revision: str | None
) -> None:
    """Write `adapter_config.json`, with the base that the adapter belongs to.

    Raises:
        StorageError: The directory cannot be written.
    """
    values = {key: _plain(value) for key, value in config.to_dict().items()}
    # Readers such as `AutoPeftModelForCausalLM` choose the class by it; injected adapters have none.
    values["task_type"] = values["task_type"] or "CAUSAL_LM"
    values.update(base_model_name_or_path=base_source, revision=base_revision, inference_mode=True, auto_mapping=None)
    content = json.dumps(values, indent=2, sort_keys=True, default=str).encode() + b"\n"
    write_atomically(directory / CONFIG_NAME, content)


def _check(document: dict[str, Any], path: Path) -> None:
    if _has_key(document, "auto_map"):
        raise AdapterIntegrityError(f"{path} has auto_map, which asks for code to be run on loading; it is refused")
    known = {field.name for field in fields(LoraConfig)} - _NOT_IN_FILES
    unknown = sorted(set(document) - known)
    if unknown:
        raise AdapterIntegrityError(
            f"{path} has keys that peft {peft.__version__} does not know: {', '.join(unknown)} (written by peft "
            f"{document.get('peft_version', 'unknown')}); they may change what the adapter computes: upgrade peft, or "
            "take the keys out if they have no effect"
        )
    if document.get("peft_type") != "LORA":
        raise AdapterIntegrityError(f"{path}: peft_type must be LORA, got {document.get('peft_type')!r}")
    mapping = document.get("auto_mapping")
    if mapping is not None and not (
        isinstance(mapping, dict)
        and set(mapping) <= {"base_model_class", "parent_library"}
        and str(mapping.get("parent_library")).startswith("transformers.models.")
    ):
        raise AdapterIntegrityError(f"{path}: auto_mapping names code outside of transformers: {mapping!r}")
    used = [key for key in _MUST_BE_EMPTY if document.get(key)]
    if used:
        raise AdapterIntegrityError(f"{path}: settings that a plain LoRA adapter does not have: {', '.join(used)}")
    if document.get("init_lora_weights", True) not in _PLAIN_INITIALISATIONS:
        raise AdapterIntegrityError(
            f"{path}: init_lora_weights is {document['init_lora_weights']!r}, which moves a part of the base's weights "
            "into the adapter; convert it with peft's `path_initial_model_for_weight_conversion` first"
        )


def _has_key(value: Any, key: str) -> bool:
    if isinstance(value, dict):
        return key in value or any(_has_key(entry, key) for entry in value.values())
    return isinstance(value, list) and any(_has_key(entry, key) for entry in value)


def _plain(value: Any) -> Any:
    """Sets become sorted lists: their order changes from process to process, and with it the file's digest."""
    if isinstance(value, set | frozenset):
        return sorted(value)
    return value

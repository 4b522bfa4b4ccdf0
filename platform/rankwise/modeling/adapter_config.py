"""The strict reader, and the writer, of `adapter_config.json`: the only place that parses this file.

The file may come from anybody. Types, ranges, sizes and nesting are checked before peft sees a value. What peft ignores
is dropped: a key with null, an unknown key that is switched off, and what other tools add without effect.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import peft
from peft import LoraConfig
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from rankwise.exceptions import AdapterConfigError, AdapterIntegrityError
from rankwise.files import write_atomically
from rankwise.modeling.module_patterns import PatternError, full_matches, is_plain, shown

CONFIG_NAME = "adapter_config.json"

MAX_BYTES = 4 << 20
MAX_DEPTH = 6
MAX_TEXT = 4096
"""Characters of a text that is no regular expression."""
MAX_PATTERN = 20_000
"""Characters of a regular expression; unsloth writes several hundred."""
MAX_PATTERNS = 2000
MAX_RANK = 1 << 20
_MAX_ALPHA = 1e9
_MAX_TOKEN = (1 << 31) - 1

# These change the base, import a module by name, or read another file.
_MUST_BE_EMPTY = (
    "megatron_config", "layer_replication", "corda_config", "lora_ga_config", "velora_config", "monteclora_config",
    "arrow_config", "kasa_config", "use_bdlora", "alora_invocation_tokens",
)  # fmt: skip
# PiSSA, OLoRA, CorDA, LoftQ and similar move part of the base's weights into the adapter.
_PLAIN_INITIALISATIONS = (True, False, "gaussian", "orthogonal", "eva")
# Settings of the start of training, of another tool's training, of an older peft's layers, or of peft at run time.
_WITHOUT_EFFECT = {
    "eva_config", "loftq_config", "lorap_lr_ratio", "lorap_emb_lr", "merge_weights", "megatron_core", "runtime_config",
}  # fmt: skip


def _plain_name(text: str) -> str:
    if not is_plain(text):
        raise ValueError
    return text


def _bounded(number: float) -> float:
    if not abs(number) <= _MAX_ALPHA:  # Also for NaN.
        raise ValueError
    return number


Name = Annotated[str, Field(min_length=1)]
# peft puts some names into regular expressions of its own.
PlainName = Annotated[Name, AfterValidator(_plain_name)]
Rank = Annotated[int, Field(ge=1, le=MAX_RANK)]
Alpha = Annotated[int | float, AfterValidator(_bounded)]
TokenIds = list[Annotated[int, Field(ge=0, le=_MAX_TOKEN)]]
LayerIndex = Annotated[int, Field(ge=0, le=100_000)]


class AdapterConfig(BaseModel):
    """The content of a plain LoRA adapter's `adapter_config.json`; names and defaults are peft's."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")

    peft_type: Literal["LORA"]
    task_type: Literal[
        "SEQ_CLS", "SEQ_2_SEQ_LM", "CAUSAL_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION", None
    ] = None
    peft_version: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False
    r: Rank = 8
    target_modules: list[Name] | str | None = None
    exclude_modules: list[Name] | str | None = None
    lora_alpha: Alpha = 8
    lora_dropout: Annotated[float, Field(ge=0, le=1)] = 0.0
    fan_in_fan_out: bool = False
    bias: Literal["none", "all", "lora_only"] = "none"
    use_rslora: bool = False
    modules_to_save: list[PlainName] | None = None
    init_lora_weights: bool | str = True
    layers_to_transform: list[LayerIndex] | LayerIndex | None = None
    layers_pattern: list[PlainName] | Annotated[str, AfterValidator(_plain_name)] | None = None
    rank_pattern: Annotated[dict[str, Rank], Field(max_length=MAX_PATTERNS)] = Field(default_factory=dict)
    alpha_pattern: Annotated[dict[str, Alpha], Field(max_length=MAX_PATTERNS)] = Field(default_factory=dict)
    trainable_token_indices: TokenIds | dict[PlainName, TokenIds] | None = None
    use_dora: bool = False
    use_qalora: bool = False
    qalora_group_size: Annotated[int, Field(ge=1)] = 16
    lora_bias: bool = False
    target_parameters: list[Name] | None = None
    ensure_weight_tying: bool = False

    def patterns(self) -> Iterator[tuple[str, str]]:
        """Every regular expression in it, as peft would run it on a module's whole name, with its key."""
        for key in ("target_modules", "exclude_modules"):
            if isinstance(text := getattr(self, key), str):
                yield key, text
        for key in ("rank_pattern", "alpha_pattern"):
            for text in getattr(self, key):
                yield key, named_by(text)


_ALLOWED = {
    "peft_type": "LORA",
    "task_type": "a task type of peft, such as CAUSAL_LM",
    "r": f"an integer from 1 to {MAX_RANK:,}",
    "lora_alpha": "a finite number",
    "lora_dropout": "a number from 0 to 1",
    "bias": "none, all or lora_only",
    "target_modules": "a list of module names, a regular expression, or all-linear",
    "exclude_modules": "a list of module names, or a regular expression",
    "modules_to_save": "a list of module names",
    "layers_to_transform": "an index of a layer, or a list of them",
    "layers_pattern": "a name such as layers, or a list of names",
    "rank_pattern": f"a mapping of at most {MAX_PATTERNS:,} module names to ranks from 1 to {MAX_RANK:,}",
    "alpha_pattern": f"a mapping of at most {MAX_PATTERNS:,} module names to finite numbers",
    "trainable_token_indices": "a list of token ids, or a mapping of module names to such lists",
    "target_parameters": "a list of parameter names",
    "init_lora_weights": "true, false or the name of an initialization",
    "qalora_group_size": "a positive integer",
}


def named_by(key: str) -> str:
    """The expression for the whole name of a module that peft makes of a key of `rank_pattern` or `alpha_pattern`."""
    return rf"(.*\.)?({key})$"


def read_adapter_document(directory: Path) -> AdapterConfig:
    """Read and check the `adapter_config.json` of a PEFT directory.

    Raises:
        AdapterConfigError: It is not JSON, too large, or has a value that is not allowed; has `auto_map` anywhere, or a
            mapping to code outside of transformers; is not LoRA, or has settings that change the base; has keys that
            the installed peft does not know and that may have an effect; or a regular expression is invalid.
        AdapterIntegrityError: The file is missing or unreadable.
    """
    path = directory / CONFIG_NAME
    return _checked(_document(path), path)


def read_adapter_config(directory: Path) -> LoraConfig:
    """Read and check the configuration of a PEFT directory, as `read_adapter_document` does, for peft.

    Its regular expressions are those of the file. peft must not run them: see `rankwise.modeling.adapter_targets`.
    """
    document = read_adapter_document(directory)
    values = document.model_dump(exclude={"peft_type"})
    if values["init_lora_weights"] == "eva":
        values["init_lora_weights"] = True  # It only chose the start of training.
    try:
        return LoraConfig(**values)
    except (TypeError, ValueError) as error:
        raise AdapterConfigError(f"{directory / CONFIG_NAME}: peft {peft.__version__} rejects it: {error}") from error


def write_adapter_config(
    config: LoraConfig, directory: Path, *, base_source: str | None, base_revision: str | None
) -> dict[str, Any]:
    """Write `adapter_config.json` with the source and revision of its base; return its content.

    Raises:
        StorageError: The directory cannot be written.
    """
    values = {key: _plain(value) for key, value in config.to_dict().items()}
    # `AutoPeftModelForCausalLM` chooses the class by task_type, which injected adapters lack.
    values["task_type"] = values["task_type"] or "CAUSAL_LM"
    values.update(base_model_name_or_path=base_source, revision=base_revision, inference_mode=True, auto_mapping=None)
    content = json.dumps(values, indent=2, sort_keys=True, default=str).encode() + b"\n"
    write_atomically(directory / CONFIG_NAME, content)
    return values


def _plain(value: Any) -> Any:
    """Convert sets to sorted lists: their order, and with it the file's digest, varies between processes."""
    if isinstance(value, set | frozenset):
        return sorted(value)
    return value


def _document(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except FileNotFoundError as error:
        raise AdapterIntegrityError(f"{path.parent} has no {CONFIG_NAME}, so it is not a PEFT adapter") from error
    except OSError as error:
        raise AdapterIntegrityError(f"{path} cannot be read: {error}") from error
    if len(content) > MAX_BYTES:
        raise AdapterConfigError(f"{path} is larger than {MAX_BYTES >> 20} MiB, so it is no adapter's configuration")
    try:
        document = json.loads(content)
    except ValueError as error:
        raise AdapterConfigError(f"{path} cannot be read as JSON: {error}") from error
    except RecursionError as error:
        raise AdapterConfigError(f"{path} cannot be read as JSON: it is nested too deeply") from error
    if not isinstance(document, dict):
        raise AdapterConfigError(f"{path} must contain a JSON object, got {type(document).__name__}")
    return document


def _checked(document: dict[str, Any], path: Path) -> AdapterConfig:
    _check_values(document, path)
    if document.get("peft_type") != "LORA":
        raise AdapterConfigError(f"{path}: peft_type must be LORA, got {_value(document.get('peft_type'))}")
    mapping = document.get("auto_mapping")
    if mapping and not _names_transformers(mapping):
        raise AdapterConfigError(f"{path}: auto_mapping must name a transformers model, got {_value(mapping)}")
    if used := [key for key in _MUST_BE_EMPTY if document.get(key)]:
        raise AdapterConfigError(f"{path}: only plain LoRA is supported, but these are set: {', '.join(used)}")
    ignored = {*_MUST_BE_EMPTY, *_WITHOUT_EFFECT, "auto_mapping"}
    kept = {key: value for key, value in document.items() if key not in ignored}
    _check_unknown({key: value for key, value in kept.items() if key not in AdapterConfig.model_fields}, path, document)
    # peft fails on a rank or alpha of null. Where it accepts null, that is the default.
    values = {
        key: value
        for key, value in kept.items()
        if key in AdapterConfig.model_fields and (value is not None or key in {"r", "lora_alpha"})
    }
    try:
        config = AdapterConfig.model_validate(values)
    except ValidationError as error:
        raise AdapterConfigError(_problems(error, values, path)) from error
    if config.init_lora_weights not in _PLAIN_INITIALISATIONS:
        raise AdapterConfigError(
            f"{path}: init_lora_weights is {_value(config.init_lora_weights)}, which moves part of the base's weights "
            "into the adapter; convert it first with peft's `path_initial_model_for_weight_conversion`"
        )
    _check_patterns(config, path)
    return config


def _check_values(document: dict[str, Any], path: Path) -> None:
    """Check nesting and texts of the whole document, also of keys that are dropped."""
    waiting: list[tuple[str, Any, int]] = [(key, value, 1) for key, value in document.items()]
    texts: list[tuple[str, str]] = [("a key", key) for key in document]
    while waiting:
        key, value, depth = waiting.pop()
        if key == "auto_map":
            raise AdapterConfigError(
                f"{path} has auto_map, which would run code on loading; remove it to load the adapter"
            )
        if depth > MAX_DEPTH:
            raise AdapterConfigError(f"{path} is nested deeper than {MAX_DEPTH} levels")
        if isinstance(value, dict):
            waiting += [(inner, entry, depth + 1) for inner, entry in value.items()]
            texts += [(f"a key of {key}", inner) for inner in value]
        elif isinstance(value, list):
            waiting += [(f"an entry of {key}" if depth == 1 else key, entry, depth + 1) for entry in value]
        elif isinstance(value, str):
            texts.append((key, value))
    for key, text in texts:
        limit = MAX_PATTERN if key in {"target_modules", "exclude_modules"} else MAX_TEXT
        if len(text) > limit:
            raise AdapterConfigError(f"{path}: {shown(key)} has more than {limit:,} characters")
        if not text.isprintable() and not all(char.isprintable() or char in "\n\t\r" for char in text):
            raise AdapterConfigError(f"{path}: {shown(key)} has a character that cannot be printed: {_value(text)}")


def _names_transformers(mapping: Any) -> bool:
    """Whether it is the mapping that peft writes, which other tools extend by values of their own."""
    if not isinstance(mapping, dict) or any(isinstance(value, dict | list) for value in mapping.values()):
        return False
    library = mapping.get("parent_library")
    return library is None or str(library).startswith("transformers.models.")


def _check_unknown(unknown: dict[str, Any], path: Path, document: dict[str, Any]) -> None:
    """Refuse unknown keys, unless they are switched off or only name a version."""
    effective = sorted(
        key for key, value in unknown.items() if value not in (None, False, [], {}) and not key.endswith("_version")
    )
    if effective:
        raise AdapterConfigError(
            f"{path} has keys that peft {peft.__version__} does not know: {', '.join(map(_name, effective))} (written "
            f"by peft {_name(str(document.get('peft_version') or 'unknown'))}); they may change what the adapter "
            "computes; upgrade peft, or remove the keys if they have no effect"
        )


def _check_patterns(config: AdapterConfig, path: Path) -> None:
    patterns = [(key, text) for key, text in config.patterns() if not is_plain(text)]
    try:
        full_matches([text for _, text in patterns], [])
    except PatternError as error:
        keys = ", ".join(dict.fromkeys(key for key, _ in patterns))
        raise AdapterConfigError(f"{path}: {keys}: {error}") from error


def _problems(error: ValidationError, values: dict[str, Any], path: Path) -> str:
    keys = list(dict.fromkeys(str(problem["loc"][0]) for problem in error.errors(include_input=False)))
    lines = [
        f"{key} must be {_ALLOWED.get(key) or _type(AdapterConfig.model_fields[key].annotation)}, "
        f"got {_value(values.get(key))}"
        for key in keys
    ]
    return f"{path}: " + "; ".join(lines)


def _type(annotation: Any) -> str:
    return "true or false" if annotation is bool else "a text"


def _name(key: str) -> str:
    return key if is_plain(key) and len(key) <= 100 else shown(key)


def _value(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."

"""Adapters on disk: a standard PEFT directory (`adapter_config.json`, `adapter_model.safetensors`), strictly.

PEFT itself warns where a tensor is missing, falls back to pickled `.bin` files, and asks the hub while it saves. Here
every tensor of the file must have its place in the model and the other way round, before the model is touched.

A model is a transformers model with injected LoRA layers, or a `PeftModel`.

An adapter brings rows by `LoraConfig(trainable_token_indices=...)`: they are stored with it. One that brings all rows
beyond the base's is loaded over the base with as many rows added; what these hold does not matter, since the adapter's
own take their place.

- `adapter_config.json`: read strictly, written so that the same adapter gives the same bytes.
- Rows of the embedding: an adapter cannot stand for rows that its base does not have, unless it brings them.
- Rank and scaling of one module, as an adapter's configuration says.
"""

from __future__ import annotations

import copy
import json
import math
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import peft
import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from rankwise.assets.layout import read_json
from rankwise.compat.peft import SEVERAL_ADAPTERS, by_pattern, plain_module
from rankwise.compat.transformers import note_injected_adapter
from rankwise.exceptions import AdapterIntegrityError, BaseMismatchError, ConfigError
from rankwise.files import write_atomically
from rankwise.modeling.base import expected_warning, skeleton
from rankwise.modeling.fingerprint import MANIFEST_NAME, check_manifest

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


def embedding_rows(model: Any) -> int:
    """The number of tokens that the model's input embedding has rows for."""
    return int(plain_module(model.get_input_embeddings()).weight.shape[0])


def base_rows(base_path: Path) -> int | None:
    """The number of rows that a base's directory has; None where its `config.json` does not say."""
    values = read_json(base_path / "config.json")
    recorded = values.get("vocab_size", values.get("text_config", {}).get("vocab_size"))
    return None if recorded is None else int(recorded)


def rows_needed(config: LoraConfig, rows: int) -> int:
    """The number of rows that an adapter needs over a base with `rows`: more, where it brings some beyond them."""
    return max(rows, max(token_indices(config), default=-1) + 1)


def check_rows(model: Any, config: LoraConfig, base_path: Path) -> None:
    """Refuse an adapter over a resized embedding, unless all new rows are stored with it.

    Args:
        model: The adapted model.
        config: The adapter's configuration; `trainable_token_indices` names the rows that are stored.
        base_path: The base's directory, whose `config.json` says how many rows it has.

    Raises:
        BaseMismatchError: Rows beyond the base's are not stored.
    """
    recorded, rows = base_rows(base_path), embedding_rows(model)
    if recorded is None or rows == recorded:
        return
    if rows > recorded and not (lost := _lost(model, config, recorded, rows)):
        return
    named = f" ({len(lost)} of them, from {lost[0]})" if rows > recorded and lost else ""
    raise BaseMismatchError(
        f"the model's embedding has {rows} rows, its base {base_path} has {recorded}: the new rows are not stored with "
        f"the adapter{named}, so it could not be loaded over its base again. Use tokens within the base's rows, or "
        "train the new rows of the embedding, and of a head of its own, with LoraConfig(trainable_token_indices=...)"
    )


def add_rows(model: Any, config: LoraConfig) -> bool:
    """Give a bare base the rows that an adapter brings; nothing is done where it brings none beyond the base's.

    Args:
        model: A base without adapters: its embedding is replaced by a larger one.
        config: The configuration of the adapter that is to be attached next.

    Returns:
        Whether rows were added.

    Raises:
        BaseMismatchError: The adapter does not bring all rows up to its highest one.
    """
    rows = embedding_rows(model)
    needed = rows_needed(config, rows)
    if needed == rows:
        return False
    if lost := _lost(model, config, rows, needed):
        raise BaseMismatchError(
            f"the adapter has rows for tokens up to {needed - 1}, the base's embedding has {rows} rows, and those "
            f"between are not all stored with the adapter ({len(lost)} are not, from {lost[0]}): what they were is "
            "not known. Take a base with more rows, or train the adapter again with all new rows in "
            "LoraConfig(trainable_token_indices=...)"
        )
    device = model.get_input_embeddings().weight.device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        model.resize_token_embeddings(needed, mean_resizing=False)
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        if module is not None:
            module.weight.data[rows:] = 0
    model.requires_grad_(False)
    return True


def check_indices(model: Any, config: LoraConfig) -> None:
    """Refuse an adapter with rows for tokens that the model's embedding does not have.

    Raises:
        BaseMismatchError: An index is beyond the embedding.
    """
    rows = embedding_rows(model)
    beyond = sorted(index for index in set(token_indices(config)) if not 0 <= index < rows)
    if beyond:
        raise BaseMismatchError(
            f"the adapter has rows for tokens {beyond[:5]}, the base's embedding has {rows} rows; add rows first "
            "(`rankwise.modeling.adapter.add_rows`), as `rankwise.flavor.load_model` does"
        )


def token_indices(config: LoraConfig) -> list[int]:
    """The token ids of all rows stored with an adapter."""
    return [index for entries in _entries(config) for index in entries]


def _entries(config: LoraConfig) -> list[list[int]]:
    """The stored token ids, a list for each embedding that has some."""
    indices = config.trainable_token_indices or []
    lists = list(indices.values()) if isinstance(indices, dict) else [indices]
    return [[int(index) for index in entries] for entries in lists]


def _lost(model: Any, config: LoraConfig, start: int, stop: int) -> list[int]:
    """Rows from `start` up to `stop` that are not stored for the embedding, or not for a head of its own."""
    head = plain_module(model.get_output_embeddings())
    tied = head is None or bool(getattr(model.config, "tie_word_embeddings", False))
    entries = _entries(config)
    if not tied and (len(entries) < 2 or getattr(head, "bias", None) is not None):
        # A head with a bias has one more number a row, which peft does not store.
        return list(range(start, stop))
    return [row for row in range(start, stop) if not all(row in one for one in entries)]


WEIGHTS_NAME = "adapter_model.safetensors"
# Every name in a PEFT file starts with this, whatever the model in memory is wrapped in.
PREFIX = "base_model.model."
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.pickle", "*.ckpt")


def adapter_tensors(model: Any, adapter_name: str) -> dict[str, torch.Tensor]:
    """The parameters of one adapter under the names that a PEFT file gives them; not copies.

    Raises:
        ConfigError: The model has no such adapter.
    """
    config = _configs(model).get(adapter_name)
    if config is None:
        raise ConfigError(f"the model has no adapter {adapter_name!r}; it has {sorted(_configs(model))}")
    # Not `model.state_dict()`: that packs the quantization state of every layer, and unpacks repacked weights in place.
    state = dict(model.named_parameters(remove_duplicate=False))
    if config.modules_to_save:
        state.update(model.named_buffers(remove_duplicate=False))
    found = get_peft_model_state_dict(model, state_dict=state, adapter_name=adapter_name, save_embedding_layers=False)
    return {name if name.startswith(PREFIX) else PREFIX + name: tensor for name, tensor in sorted(found.items())}


def save_adapter(
    model: Any,
    adapter_name: str,
    directory: Path,
    *,
    base_source: str | None,
    base_revision: str | None,
    base_path: Path | None = None,
) -> None:
    """Write one adapter as a PEFT directory. The same weights give the same bytes; no network is asked.

    Args:
        model: The model that has the adapter.
        adapter_name: Its name in the model; it does not appear in the files.
        directory: Made if need be. Other files in it are left alone.
        base_source: What names the base, for `base_model_name_or_path`.
        base_revision: The commit or digest that was trained on, for `revision`.
        base_path: The base's local directory; with it, a resized embedding is noticed.

    Raises:
        BaseMismatchError: The embedding was resized and its new rows are not stored with the adapter.
        ConfigError: The model has no such adapter.
        StorageError: The directory cannot be written.
    """
    tensors = adapter_tensors(model, adapter_name)
    config = _configs(model)[adapter_name]
    if base_path is not None:
        check_rows(model, config, base_path)
    content = save(
        {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()},
        metadata={"format": "pt"},
    )
    write_atomically(directory / WEIGHTS_NAME, content)
    write_adapter_config(config, directory, base_source=base_source, base_revision=base_revision)


@dataclass(frozen=True, kw_only=True, eq=False)
class StoredAdapter:
    """A PEFT directory that was checked and read.

    Attributes:
        directory: Where it is.
        config: What `adapter_config.json` says.
        tensors: What `adapter_model.safetensors` holds, on the CPU.
    """

    directory: Path
    config: LoraConfig
    tensors: dict[str, torch.Tensor]

    @property
    def weights(self) -> Path:
        """The file of tensors."""
        return self.directory / WEIGHTS_NAME

    @cached_property
    def parameters(self) -> int:
        """Numbers in all tensors."""
        return sum(tensor.numel() for tensor in self.tensors.values())


def read_adapter(directory: Path) -> StoredAdapter:
    """Read a PEFT directory after checking its manifest, if it has one.

    Raises:
        AdapterIntegrityError: A file is not what was stored, missing, pickled, or cannot be parsed.
    """
    if (directory / MANIFEST_NAME).exists():
        check_manifest(directory)
    pickles = sorted(path.name for pattern in _PICKLES for path in directory.glob(pattern))
    if pickles:
        raise AdapterIntegrityError(
            f"{directory} has pickled files ({', '.join(pickles)}), which can run code when they are read; only "
            f"{WEIGHTS_NAME} is read, and a directory with pickles is refused"
        )
    config = read_adapter_config(directory)
    path = directory / WEIGHTS_NAME
    if not path.is_file():
        raise AdapterIntegrityError(f"{directory} has {CONFIG_NAME} but no {WEIGHTS_NAME}")
    try:
        with safe_open(str(path), framework="pt", device="cpu") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise AdapterIntegrityError(f"{path} is not a readable safetensors file: {error}") from error
    return StoredAdapter(directory=directory, config=config, tensors=tensors)


def load_adapter(model: Any, adapter: Path | StoredAdapter, adapter_name: str) -> LoraConfig:
    """Attach a stored adapter to a model under a name, its parameters frozen.

    The first adapter of a model becomes the active one, later ones do not; what is active and what asks for a
    gradient stays as it was.

    Args:
        model: A base, adapted already or not.
        adapter: What `read_adapter` returned, or a PEFT directory to read. On the CPU the model shares its tensors.
        adapter_name: A new name, without dots.

    Returns:
        The adapter's configuration, as peft holds it in the model.

    Raises:
        AdapterIntegrityError: See `read_adapter`; or a tensor is missing, surplus or of another shape than this model
            and the adapter's configuration ask for.
        BaseMismatchError: The adapter has rows for tokens beyond the model's embedding, or targets nothing in it.
        ConfigError: The name is taken or not possible; or one of the model's adapters and this one differ in whether
            they have rows of their own for tokens.
    """
    if "." in adapter_name or not adapter_name:
        raise ConfigError(
            f"an adapter's name must not be empty or contain a dot (a rule of peft), got {adapter_name!r}"
        )
    if adapter_name in _configs(model):
        raise ConfigError(f"the model has an adapter {adapter_name!r} already; give this one another name")
    stored = read_adapter(adapter) if isinstance(adapter, Path) else adapter
    # peft changes the configuration that it is given.
    directory, config = stored.directory, copy.deepcopy(stored.config)
    # peft reads and activates adapters of one model as if all of them had such rows, or none.
    if any(
        bool(each.trainable_token_indices) != bool(config.trainable_token_indices) for each in _configs(model).values()
    ):
        raise ConfigError(
            f"the adapter in {directory} cannot lie beside others of this model: adapters with rows of their own for "
            "tokens (trainable_token_indices) and adapters without are loaded over one base each"
        )
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    check_indices(base, config)
    _check_shapes(base, config, stored.tensors, directory)
    _attach(model, config, adapter_name)
    places = adapter_tensors(model, adapter_name)
    with torch.no_grad():
        for name, tensor in stored.tensors.items():
            place = places[name]
            if isinstance(place, torch.nn.Parameter):
                # peft has made it in the base's compute dtype; copying into that would round what is stored.
                place.data = tensor.to(place.device)
                place.requires_grad_(False)
            else:
                place.copy_(tensor)
    return _configs(model)[adapter_name]


def _configs(model: Any) -> dict[str, LoraConfig]:
    return getattr(model, "peft_config", None) or {}


def _check_shapes(base: Any, config: LoraConfig, tensors: dict[str, torch.Tensor], directory: Path) -> None:
    """Compare with what the adapter's configuration gives on a model without weights, so that nothing is touched."""
    empty = skeleton(base.config)
    try:
        inject_adapter_in_model(copy.deepcopy(config), empty, "default", low_cpu_mem_usage=True)
    except ValueError as error:
        raise BaseMismatchError(
            f"the adapter in {directory} does not fit {type(base).__name__} of {base.name_or_path}: {error}"
        ) from error
    expected = {name: tuple(tensor.shape) for name, tensor in adapter_tensors(empty, "default").items()}
    problems = [f"missing: {name}" for name in sorted(set(expected) - set(tensors))]
    problems += [f"surplus: {name}" for name in sorted(set(tensors) - set(expected))]
    problems += [
        f"{name}: shape {tuple(tensors[name].shape)}, the model needs {expected[name]}"
        for name in sorted(set(expected) & set(tensors))
        if tuple(tensors[name].shape) != expected[name]
    ]
    problems += [
        f"{name}: dtype {tensor.dtype} is no floating point"
        for name, tensor in sorted(tensors.items())
        if not tensor.is_floating_point()
    ]
    if problems:
        shown = problems[:10] + ([f"... and {len(problems) - 10} more"] if len(problems) > 10 else [])
        raise AdapterIntegrityError(
            f"the tensors in {directory / WEIGHTS_NAME} are not those that {CONFIG_NAME} asks for on "
            f"{type(base).__name__}:\n  " + "\n  ".join(shown)
        )


def _attach(model: Any, config: LoraConfig, adapter_name: str) -> None:
    trainable = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    # The random numbers that peft fills new parameters with are overwritten; the caller's generator must not notice.
    # They are drawn on the CPU: keeping the state of the GPUs' generators would begin a context on each GPU.
    with torch.random.fork_rng(devices=[]), expected_warning(SEVERAL_ADAPTERS):
        if isinstance(model, PeftModel):
            model.add_adapter(adapter_name, config)
        else:
            inject_adapter_in_model(config, model, adapter_name)
            note_injected_adapter(model)
    for name, parameter in model.named_parameters():
        if name in trainable:
            parameter.requires_grad_(trainable[name])
    # peft leaves new layers in training mode, with dropout on, whatever the model's own mode is.
    for module in model.modules():
        if isinstance(module, LoraLayer) and adapter_name in module.lora_A:
            module.train(model.training)


def scaling_of(config: LoraConfig, module: str, *, rank: int) -> float:
    """lora_alpha / r, or lora_alpha / sqrt(r) with rsLoRA (Kalajdzievski 2023), of one module.

    Args:
        config: The adapter's configuration; `alpha_pattern` gives some modules an alpha of their own.
        module: The module's full name in the base.
        rank: The module's rank, which `rank_pattern` may set apart.
    """
    alpha = float(by_pattern(config.alpha_pattern, module, config.lora_alpha))
    return alpha / (math.sqrt(rank) if config.use_rslora else rank)


def rank_of(config: LoraConfig, module: str) -> int:
    """The rank that the configuration gives a module; `rank_pattern` gives some modules one of their own."""
    return int(by_pattern(config.rank_pattern, module, config.r))

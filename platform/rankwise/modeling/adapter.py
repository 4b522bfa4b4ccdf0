"""Adapters on disk: strict reading and writing of PEFT directories, and the embedding rows that adapters bring.

PEFT only warns about missing tensors, falls back to pickled `.bin` files and queries the hub while saving. Here every
tensor of the file must match one of the model and vice versa, before the model changes. Writing is deterministic: the
same adapter gives the same bytes.

A model is a transformers model with injected LoRA layers, or a `PeftModel`.

An adapter may bring embedding rows (`LoraConfig(trainable_token_indices=...)`), which are stored with it. If it brings
all rows beyond the base's, the base is enlarged before loading; the initial content of those rows does not matter,
because the adapter's rows replace it.
"""

from __future__ import annotations

import copy
import logging
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from rankwise.assets.layout import read_json
from rankwise.compat.peft import (
    SEVERAL_ADAPTERS,
    TRANSPOSED_WEIGHT,
    base_name,
    by_pattern,
    plain_module,
    target_names,
)
from rankwise.compat.transformers import note_injected_adapter
from rankwise.exceptions import (
    AdapterConfigError,
    AdapterIntegrityError,
    AdapterTargetError,
    BaseMismatchError,
    ConfigError,
)
from rankwise.files import write_atomically
from rankwise.modeling.adapter_config import CONFIG_NAME, read_adapter_config, write_adapter_config
from rankwise.modeling.adapter_targets import resolve_patterns, resolve_targets
from rankwise.modeling.base import expected_warning, skeleton
from rankwise.modeling.base_copies import check_base_copies, is_base_copy
from rankwise.modeling.fingerprint import MANIFEST_NAME, check_manifest
from rankwise.modeling.wrappers import has_towers

logger = logging.getLogger(__name__)


def embedding_rows(model: Any) -> int:
    """Rows of the model's input embedding."""
    return int(plain_module(model.get_input_embeddings()).weight.shape[0])


def base_rows(base_path: Path) -> int | None:
    """Rows of a base according to its `config.json`; None if it does not say."""
    values = read_json(base_path / "config.json")
    recorded = values.get("vocab_size", values.get("text_config", {}).get("vocab_size"))
    return None if recorded is None else int(recorded)


def rows_needed(config: LoraConfig, rows: int) -> int:
    """Embedding rows that an adapter needs over a base with `rows`."""
    return max(rows, max(token_indices(config), default=-1) + 1)


def check_rows(model: Any, config: LoraConfig, base_path: Path) -> None:
    """Refuse an adapter over a resized embedding unless all new rows are stored with it.

    Raises:
        BaseMismatchError: Rows beyond the base's are not stored.
    """
    recorded, rows = base_rows(base_path), embedding_rows(model)
    if recorded is None or rows == recorded:
        return
    lost = _lost(model, config, recorded, rows) if rows > recorded else None
    if rows > recorded and lost is None:
        return
    named = f" ({lost[0]} of them, starting at {lost[1]})" if lost is not None else ""
    raise BaseMismatchError(
        f"the model's embedding has {rows} rows, but its base {base_path} has {recorded}. The new rows are not stored "
        f"with the adapter{named}, so it could not be loaded again. Use tokens within the base's rows, or train the "
        "new rows of the embedding (and of the head, if separate) with LoraConfig(trainable_token_indices=...)"
    )


def add_rows(model: Any, config: LoraConfig) -> bool:
    """Enlarge a bare base's embedding for the rows of an adapter attached next; return whether rows were added.

    Raises:
        AdapterTargetError: The adapter does not bring all rows up to its highest one.
    """
    rows = embedding_rows(model)
    needed = rows_needed(config, rows)
    if needed == rows:
        return False
    if lost := _lost(model, config, rows, needed):
        raise AdapterTargetError(
            f"the adapter has rows for tokens up to {needed - 1}, but the base's embedding has {rows} rows, and not "
            f"all rows between are stored with the adapter ({lost[0]} missing, starting at {lost[1]}). Use a base "
            "with more rows, or train the adapter again with all new rows in LoraConfig(trainable_token_indices=...)"
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
    """Refuse an adapter with rows beyond the model's embedding.

    Raises:
        AdapterTargetError: An index is beyond the embedding.
    """
    rows = embedding_rows(model)
    beyond = sorted(index for index in set(token_indices(config)) if not 0 <= index < rows)
    if beyond:
        raise AdapterTargetError(
            f"the adapter has rows for tokens {beyond[:5]}, but the base's embedding has {rows} rows; add rows first "
            "with `rankwise.modeling.adapter.add_rows`, or use `rankwise.flavor.load_model`"
        )


def token_indices(config: LoraConfig) -> list[int]:
    """Token ids of all rows stored with an adapter."""
    return [index for entries in _entries(config) for index in entries]


def _entries(config: LoraConfig) -> list[list[int]]:
    """The stored token ids, one list per embedding that has some."""
    indices = config.trainable_token_indices or []
    lists = list(indices.values()) if isinstance(indices, dict) else [indices]
    return [[int(index) for index in entries] for entries in lists]


def _lost(model: Any, config: LoraConfig, start: int, stop: int) -> tuple[int, int] | None:
    """How many rows from `start` up to `stop` are not stored for the embedding or a separate head, and the first."""
    head = plain_module(model.get_output_embeddings())
    tied = head is None or bool(getattr(model.config, "tie_word_embeddings", False))
    entries = _entries(config)
    stored: set[int] = set()
    # peft does not store the rows of a head's bias.
    if entries and (tied or (len(entries) > 1 and getattr(head, "bias", None) is None)):
        stored = set.intersection(*map(set, entries))
    # A foreign adapter may name any token: the rows between are never listed.
    missing = stop - start - sum(start <= row < stop for row in stored)
    if missing <= 0:
        return None
    return missing, next(row for row in range(start, stop) if row not in stored)


WEIGHTS_NAME = "adapter_model.safetensors"
# Every name in a PEFT file starts with this, however the model in memory is wrapped.
PREFIX = "base_model.model."
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.pickle", "*.ckpt")


def adapter_tensors(model: Any, adapter_name: str) -> dict[str, torch.Tensor]:
    """The parameters of one adapter, named as in a PEFT file; not copies.

    Raises:
        ConfigError: The model has no such adapter.
    """
    config = _configs(model).get(adapter_name)
    if config is None:
        raise ConfigError(f"the model has no adapter {adapter_name!r}; it has {sorted(_configs(model))}")
    # `model.state_dict()` would pack every layer's quantization state and unpack repacked weights in place.
    state = dict(model.named_parameters(remove_duplicate=False))
    if config.modules_to_save:
        state.update(model.named_buffers(remove_duplicate=False))
    tensors = get_peft_model_state_dict(model, state_dict=state, adapter_name=adapter_name, save_embedding_layers=False)
    return {name if name.startswith(PREFIX) else PREFIX + name: tensor for name, tensor in sorted(tensors.items())}


def save_adapter(
    model: Any,
    adapter_name: str,
    directory: Path,
    *,
    base_source: str | None,
    base_revision: str | None,
    base_path: Path | None = None,
) -> None:
    """Write one adapter as a PEFT directory. Deterministic; no network access; other files in it stay in place.

    `base_source` and `base_revision` are recorded in the configuration. With `base_path`, the base's local directory, a
    resized embedding is detected.

    Raises:
        BaseMismatchError: The embedding was resized and its new rows are not stored with the adapter.
        ConfigError: The model has no such adapter.
        StorageError: The directory cannot be written.
    """
    tensors = adapter_tensors(model, adapter_name)
    config = _configs(model)[adapter_name]
    if base_path is not None:
        check_rows(model, config, base_path)
    write_adapter(
        {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()},
        config,
        directory,
        base_source=base_source,
        base_revision=base_revision,
    )


def write_adapter(
    tensors: Mapping[str, torch.Tensor],
    config: LoraConfig,
    directory: Path,
    *,
    base_source: str | None,
    base_revision: str | None,
) -> None:
    """Write a PEFT directory from tensors of the CPU under their names in the file, and a configuration.

    Raises:
        StorageError: The directory cannot be written.
    """
    content = save({name: tensor.contiguous() for name, tensor in tensors.items()}, metadata={"format": "pt"})
    write_atomically(directory / WEIGHTS_NAME, content)
    write_adapter_config(config, directory, base_source=base_source, base_revision=base_revision)


@dataclass(frozen=True, kw_only=True, eq=False)
class StoredAdapter:
    """A checked PEFT directory, its tensors on the CPU.

    The keys of the configuration's `rank_pattern` and `alpha_pattern` are names of modules; `target_modules` and
    `exclude_modules` are as in the file, because only a base says what they match. `base_copies` are the base's own
    weights in the file, by their names in the base; they belong to no adapter.
    """

    directory: Path
    config: LoraConfig
    tensors: dict[str, torch.Tensor]
    base_copies: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def weights(self) -> Path:
        """The safetensors file."""
        return self.directory / WEIGHTS_NAME

    @cached_property
    def parameters(self) -> int:
        """Elements of all tensors."""
        return sum(tensor.numel() for tensor in self.tensors.values())


def read_adapter(directory: Path) -> StoredAdapter:
    """Read a PEFT directory, after checking its manifest if it has one.

    Raises:
        AdapterConfigError: Its configuration is invalid or not supported, see `read_adapter_document`.
        AdapterIntegrityError: A file is missing, modified, pickled or unreadable.
    """
    if (directory / MANIFEST_NAME).exists():
        check_manifest(directory)
    pickles = sorted(path.name for pattern in _PICKLES for path in directory.glob(pattern))
    if pickles:
        raise AdapterIntegrityError(
            f"{directory} has pickled files ({', '.join(pickles)}), which can run code when loaded; remove them (only "
            f"{WEIGHTS_NAME} is read)"
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
    modules = dict.fromkeys(base_name(name.removeprefix(PREFIX).partition(".lora_")[0]) for name in sorted(tensors))
    config = resolve_patterns(config, list(modules), str(directory / CONFIG_NAME))
    copies = [name for name in tensors if is_base_copy(name, config.modules_to_save)]
    base_copies = {name.removeprefix(PREFIX): tensors.pop(name) for name in copies}
    return StoredAdapter(directory=directory, config=config, tensors=tensors, base_copies=base_copies)


def load_adapter(model: Any, adapter: Path | StoredAdapter, adapter_name: str) -> LoraConfig:
    """Attach a stored adapter to a model, with frozen parameters; return its configuration as held in the model.

    A model's first adapter becomes active, later ones do not. `requires_grad` of other parameters is unchanged. On the
    CPU the model shares the tensors of a `StoredAdapter`. `adapter_name` is new and has no dots.

    Raises:
        AdapterIntegrityError: See `read_adapter`.
        AdapterConfigError: A tensor is missing, surplus or has another shape than the configuration requires.
        AdapterTargetError: The adapter has rows for tokens beyond the model's embedding, or targets nothing in it.
        BaseMismatchError: The adapter has a copy of a weight of the base that differs from the model's.
        ConfigError: The name is taken or invalid; or only some of the adapters have embedding rows.
    """
    if "." in adapter_name or not adapter_name:
        raise ConfigError(
            f"an adapter's name must not be empty or contain a dot (a rule of peft), got {adapter_name!r}"
        )
    if adapter_name in _configs(model):
        raise ConfigError(f"the model already has an adapter {adapter_name!r}; give this one another name")
    stored = read_adapter(adapter) if isinstance(adapter, Path) else adapter
    # peft modifies the configuration.
    directory, config = stored.directory, copy.deepcopy(stored.config)
    # peft assumes that either all adapters of a model have such rows, or none.
    if any(
        bool(other.trainable_token_indices) != bool(config.trainable_token_indices)
        for other in _configs(model).values()
    ):
        raise ConfigError(
            f"the adapter in {directory} cannot be combined with this model's other adapters, because only some of "
            "them have token rows of their own (trainable_token_indices); load it over a separate base"
        )
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    check_indices(base, config)
    check_base_copies(base, stored.base_copies, str(stored.weights))
    empty = skeleton(base.config, towers=has_towers(base))
    modules = [name for name, _ in empty.named_modules() if name]
    config = resolve_targets(config, modules, str(directory / CONFIG_NAME))
    told = _check_shapes(base, empty, config, stored.tensors, directory)
    _attach(model, config, adapter_name, told)
    places = adapter_tensors(model, adapter_name)
    with torch.no_grad():
        for name, tensor in stored.tensors.items():
            place = places[name]
            if isinstance(place, torch.nn.Parameter):
                # peft created it in the base's compute dtype; copying would round the stored values.
                place.data = tensor.to(place.device)
                place.requires_grad_(False)
            else:
                place.copy_(tensor)
    return _configs(model)[adapter_name]


def _configs(model: Any) -> dict[str, LoraConfig]:
    return getattr(model, "peft_config", None) or {}


def _check_shapes(
    base: Any, empty: Any, config: LoraConfig, tensors: dict[str, torch.Tensor], directory: Path
) -> list[str]:
    """Compare the tensors with those that the configuration gives on `empty`, the base without weights.

    Returns peft's warnings about the configuration, which are logged.
    """
    try:
        with _warnings_of_peft() as told, target_names(config), expected_warning(TRANSPOSED_WEIGHT):
            inject_adapter_in_model(copy.deepcopy(config), empty, "default", low_cpu_mem_usage=True)
    except (TypeError, ValueError) as error:
        raise AdapterTargetError(
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
        f"{name}: dtype {tensor.dtype} is not floating point"
        for name, tensor in sorted(tensors.items())
        if not tensor.is_floating_point()
    ]
    if problems:
        shown = problems[:10] + ([f"... and {len(problems) - 10} more"] if len(problems) > 10 else [])
        raise AdapterConfigError(
            f"the tensors in {directory / WEIGHTS_NAME} do not match {CONFIG_NAME} on "
            f"{type(base).__name__}:\n  " + "\n  ".join(shown)
        )
    for text in told:
        logger.warning("%s: peft warns: %s", directory / CONFIG_NAME, text)
    return told


@contextmanager
def _warnings_of_peft() -> Iterator[list[str]]:
    """Collect what peft finds odd in a configuration; other warnings, such as of deprecations, are passed on."""
    texts: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield texts
    for entry in caught:
        if not issubclass(entry.category, UserWarning | RuntimeWarning):
            warnings.warn_explicit(entry.message, entry.category, entry.filename, entry.lineno)
        elif str(entry.message) not in texts:
            texts.append(str(entry.message))


def _attach(model: Any, config: LoraConfig, adapter_name: str, told: Sequence[str]) -> None:
    trainable = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    # peft draws random initial values on the CPU; the caller's generator must not change. Forking the GPUs' generators
    # would create a context on each GPU.
    with torch.random.fork_rng(devices=[]), target_names(config), ExitStack() as expected:
        for text in (SEVERAL_ADAPTERS, TRANSPOSED_WEIGHT, *told):
            expected.enter_context(expected_warning(text))
        if isinstance(model, PeftModel):
            model.add_adapter(adapter_name, config)
        else:
            inject_adapter_in_model(config, model, adapter_name)
            note_injected_adapter(model)
    for name, parameter in model.named_parameters():
        if name in trainable:
            parameter.requires_grad_(trainable[name])
    # peft leaves new layers in training mode, whatever the model's mode.
    for module in model.modules():
        if isinstance(module, LoraLayer) and adapter_name in module.lora_A:
            module.train(model.training)


def scaling_of(config: LoraConfig, module: str, *, rank: int) -> float:
    """lora_alpha / r, or lora_alpha / sqrt(r) with rsLoRA (Kalajdzievski 2023), of one module.

    `alpha_pattern` may override a module's alpha; `rank` is its own rank (see `rank_of`).
    """
    alpha = float(by_pattern(config.alpha_pattern, module, config.lora_alpha))
    return alpha / (math.sqrt(rank) if config.use_rslora else rank)


def rank_of(config: LoraConfig, module: str) -> int:
    """Rank of a module, considering `rank_pattern`."""
    return int(by_pattern(config.rank_pattern, module, config.r))

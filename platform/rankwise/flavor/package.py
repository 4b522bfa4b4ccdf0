"""Builds the complete directory of a stored adapter, and replaces directories atomically.

MLmodel                  written last, by MLflow's own class; contains the section `qlora`
manifest.json            SHA-256 of every other file
signature.json           the signature, if RANKWISE_SIGNING_KEY is set
adapter/                 a standard PEFT directory: configuration, safetensors, tokenizer, card
input_example.json, serving_input_example.json
requirements.txt, conda.yaml, python_env.yaml, wheels/
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]
from mlflow.models import Model, ModelSignature

from rankwise.assets.base import ResolvedBase
from rankwise.compat.mlflow import (
    PYFUNC_IMPORT_WARNING,
    combined_requirements,
    conda_environment,
    save_example,
    write_python_environment,
)
from rankwise.data.prompting import Reading
from rankwise.exceptions import AdapterIntegrityError, ConfigError, StorageError
from rankwise.experiment.schema import QuantizationSpec
from rankwise.files import complete_directory, make_directory, share, storage_errors, temporary_name
from rankwise.flavor.card import library_versions, model_card, pip_requirements
from rankwise.flavor.metadata import (
    ADAPTER_DIRECTORY,
    EXAMPLE,
    FLAVOR_NAME,
    FORMAT_VERSION,
    AdapterMetadata,
    BaseFacts,
    make_signature,
    section_digest,
    template_digest,
)
from rankwise.flavor.signing import Statement, sign
from rankwise.modeling.adapter import WEIGHTS_NAME, StoredAdapter
from rankwise.modeling.adapter_config import write_adapter_config
from rankwise.modeling.base import Kernels, expected_warning, quiet_transformers
from rankwise.modeling.fingerprint import MANIFEST_NAME, check_manifest, write_manifest
from rankwise.settings import Settings


@dataclass(frozen=True, kw_only=True)
class PackageOptions:
    """Content of a model directory beside the adapter.

    Attributes:
        system: A system prompt to put before plain texts.
        reading: How rows became prompts in training, with the template that later prompts are made with.
        metrics: Results for the card.
        signature, pip_requirements: Replace the flavor's own.
        input_example: Stored as it is; no model is loaded to check it.
        metadata: Free values for MLflow's `metadata`.
    """

    system: str | None = None
    reading: Reading = field(default_factory=Reading)
    metrics: Mapping[str, float] | None = None
    signature: ModelSignature | None = None
    input_example: Any = field(default_factory=lambda: EXAMPLE)
    pip_requirements: Sequence[str] | None = None
    extra_pip_requirements: Sequence[str] = ()
    metadata: Mapping[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class LogOptions(PackageOptions):
    """How an adapter is logged to MLflow.

    Attributes:
        run_id: By default the active run, if any.
        experiment_id: For a model without a run.
        tags: Set on the LoggedModel and on the version when they are created.
        metrics: Tags of the version and lines of the card. With a run, also metrics of the LoggedModel, if the run has
            them at `step`.
        description: Of the version.
    """

    run_id: str | None = None
    experiment_id: str | None = None
    tags: Mapping[str, Any] | None = None
    step: int = 0
    description: str | None = None
    tracking_uri: str | None = None
    model_type: str | None = None


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """How the base of a stored adapter is found and loaded; see `rankwise.flavor.load_model`."""

    settings: Settings
    base_model: str | Path | ResolvedBase | None = None
    quantization: QuantizationSpec | None = None
    allow_base_mismatch: bool = False
    device: str | None = None
    attn_implementation: str | None = None
    kernels: Kernels = "exact"


with expected_warning(PYFUNC_IMPORT_WARNING):
    from mlflow.pyfunc import add_to_model

# Values that can be set at load. MLflow ignores keys that are not here.
MODEL_CONFIG: dict[str, Any] = {
    "base_model": None,
    "device": None,
    "allow_base_mismatch": False,
    "attn_implementation": None,
    "kernels": "exact",
}
_LORA_KEYS = (
    "r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "use_rslora", "use_dora", "bias",
    "rank_pattern", "alpha_pattern", "layers_to_transform", "modules_to_save", "trainable_token_indices",
)  # fmt: skip
_CARD = "README.md"
_OF_THIS_MACHINE = {"name_or_path", "tokenizer_file", "is_local", "local_files_only"}


@dataclass(frozen=True, kw_only=True)
class Package:
    """A complete model directory except for `MLmodel`.

    `section` is the digest of the sealed parts of `model`; `signature` is the value of the tag, or None without a key.
    """

    directory: Path
    metadata: AdapterMetadata
    model: Model
    section: str
    signature: str | None


def build(
    directory: Path,
    adapter: StoredAdapter,
    tokenizer: Any,
    facts: BaseFacts,
    options: PackageOptions,
    name: str | None = None,
) -> Package:
    """Build a model directory; a signature covers `name`, the registered model, if it is given.

    Only the configuration and the weights of `adapter` are used. `tokenizer` is the adapter's, with its chat template.

    Raises:
        ConfigError: The tokenizer has more tokens than the base has rows, or the signing key cannot be used.
        StorageError: The disk is full or not writable.
    """
    with storage_errors(directory, "storing an adapter"):
        target = directory / ADAPTER_DIRECTORY
        make_directory(target, "storing an adapter", shared=True)
        shutil.copyfile(adapter.weights, target / WEIGHTS_NAME)
        settings = write_adapter_config(adapter.config, target, base_source=facts.source, base_revision=facts.revision)
        tokenizer_files = _save_tokenizer(tokenizer, target)
        description = Model(metadata=dict(options.metadata) if options.metadata else None)
        save_example(description, options.input_example, directory)
        _write_environment(directory, options.pip_requirements, options.extra_pip_requirements)
        stored = AdapterMetadata(
            base=facts,
            lora={key: settings[key] for key in _LORA_KEYS if settings.get(key) not in (None, {}, [])},
            parameters=adapter.parameters,
            bytes=(target / WEIGHTS_NAME).stat().st_size,
            tokenizer_files=tokenizer_files,
            chat_template=template_digest(tokenizer),
            system=options.system,
            reading=options.reading,
            # Earlier releases can use what they could have trained.
            format_version=1 if options.reading.rendering == 1 else FORMAT_VERSION,
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
    """Copy a package's description into a model that MLflow made (with ids), and write `MLmodel`."""
    model.flavors = package.model.flavors
    model.signature = package.model.signature
    model.saved_input_example_info = package.model.saved_input_example_info
    model.model_size_bytes = package.model.model_size_bytes
    if package.model.metadata:
        model.metadata = {**(model.metadata or {}), **package.model.metadata}
    with storage_errors(package.directory, "storing an adapter"):
        model.save(str(package.directory / "MLmodel"))


def check_tokenizer_files(directory: Path) -> None:
    """Refuse tokenizer files that need code.

    Raises:
        AdapterIntegrityError: A JSON file has `auto_map`, or cannot be parsed.
    """
    for path in sorted(directory.glob("*.json")):
        try:
            document = json.loads(path.read_bytes())
        except ValueError as error:
            raise AdapterIntegrityError(f"{path} cannot be read as JSON: {error}") from error
        if isinstance(document, dict) and "auto_map" in document:
            raise AdapterIntegrityError(f"{path} has auto_map, which would run code on loading; it is refused")


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
        # Paths of this machine do not belong in a stored model.
        kept = {key: value for key, value in document.items() if key not in _OF_THIS_MACHINE}
        path.write_text(json.dumps(kept, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
    check_tokenizer_files(target)
    return tuple(names)


def _write_environment(directory: Path, requirements: Sequence[str] | None, extra: Sequence[str]) -> None:
    default = pip_requirements(directory) if requirements is None else None
    lines, constraints = combined_requirements(
        default, list(requirements) if requirements is not None else None, list(extra) or None
    )
    (directory / "requirements.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    if constraints:
        (directory / "constraints.txt").write_text("\n".join(constraints) + "\n", encoding="utf-8")
    conda = conda_environment(lines)
    (directory / "conda.yaml").write_text(yaml.safe_dump(conda, default_flow_style=False), encoding="utf-8")
    write_python_environment(directory / "python_env.yaml")


def check_target(target: Path) -> None:
    """Refuse to overwrite anything but an earlier, unchanged output.

    Raises:
        StorageError: The target is a file, a mount point, or a directory with other content.
    """
    if target.exists():
        with _turn(target.parent):
            _check(target)


def _check(target: Path) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise StorageError(f"{target} is a file; name a directory")
    if target.is_mount():
        raise StorageError(f"{target} is a mount point, which cannot be replaced; name a directory in it")
    if not any(target.iterdir()):
        return
    try:
        check_manifest(target)
    except AdapterIntegrityError as error:
        raise StorageError(
            f"{target} is not empty, and not an unchanged output of rankwise; name another directory"
        ) from error


@contextmanager
def placed(target: Path, doing: str) -> Iterator[Path]:
    """A temporary directory to fill; after the block it gets a manifest and replaces `target`, an absolute path.

    An earlier output is replaced if it is unchanged, and kept if its content is the same. After an error nothing
    remains. If several processes fill one target, the last one wins.

    Raises:
        StorageError: The target has other content, or the disk is full or not writable.
    """
    target = target.resolve()
    check_target(target)

    def place(temporary: Path) -> None:
        manifest = write_manifest(temporary)
        share(temporary)
        with _turn(target.parent):
            _check(target)
            if (target / MANIFEST_NAME).is_file() and check_manifest(target) == manifest:
                return
            # Moved, not removed: a process that reads from it keeps all files until the new directory is in place.
            old = temporary_name(target)
            with suppress(FileNotFoundError):
                target.rename(old)
            try:
                temporary.rename(target)
            finally:
                shutil.rmtree(old, ignore_errors=True)

    with storage_errors(target, doing):
        make_directory(target.parent, doing, shared=True)
        with complete_directory(temporary_name(target), place) as temporary:
            yield temporary


@contextmanager
def _turn(directory: Path) -> Iterator[None]:
    """One process at a time. The lock is on the directory itself, so it leaves no file."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with suppress(OSError):  # Without locks on directories, two processes may refuse each other.
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)

"""What a stored adapter says of itself: the section `qlora` of the file `MLmodel`.

Digests of this section and of the manifest are tags of the LoggedModel and of the model version, since `MLmodel` itself
cannot be in the manifest (MLflow writes it last).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rankwise.exceptions import AdapterIntegrityError, ConfigError
from rankwise.experiment.schema import QuantizationSpec
from rankwise.modeling.fingerprint import Fingerprint

FLAVOR_NAME = "qlora"
FORMAT_VERSION = 1
ADAPTER_DIRECTORY = "adapter"
MANIFEST_TAG = "rankwise.manifest"
SECTION_TAG = "rankwise.section"
# The parts of MLmodel that decide what is loaded and how; the rest names ids and times.
_SEALED = ("flavors", "signature", "saved_input_example_info")


@dataclass(frozen=True, kw_only=True)
class BaseFacts:
    """The base that an adapter was trained on, and how it was loaded.

    Attributes:
        source: `org/name`, an absolute path, or `pypi:...`.
        revision: The commit or digest that was trained on.
        fingerprint: The identity of its content.
        quantization: As it was asked for.
        compute_dtype: What quantized layers computed in: `float32`, `bfloat16`, `float16`.
        load_dtype: What it was loaded in; of quantized layers, what their weights come back in.
        module_dtype: The dtype of the modules that are not quantized: as `load_dtype`, or what they were cast to
            (peft's `prepare_model_for_kbit_training` casts them to float32).
        device_type: `cpu`, `cuda`, ...
    """

    source: str
    revision: str
    fingerprint: Fingerprint
    quantization: QuantizationSpec
    compute_dtype: str
    load_dtype: str
    module_dtype: str
    device_type: str


@dataclass(frozen=True, kw_only=True)
class AdapterMetadata:
    """A stored adapter.

    Attributes:
        base: What it was trained on.
        lora: peft's settings that decide what it computes (`r`, `lora_alpha`, `lora_dropout`, `target_modules`, ...).
        parameters: Numbers in its tensors.
        bytes: Size of `adapter_model.safetensors`.
        tokenizer_files: Names of the tokenizer's files beside the weights.
        chat_template: `sha256:...` of the template that prompts are rendered with; `none` without one.
        system: The system prompt put before a bare text; None for none.
        versions: Library versions that wrote it.
        manifest: Digest of `manifest.json`.
        format_version: Of this section.
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
            "versions": dict(self.versions),
            "manifest": self.manifest,
        }

    @classmethod
    def from_section(cls, section: Mapping[str, Any], where: str) -> AdapterMetadata:
        """The inverse of `to_section`.

        Args:
            section: The section of the flavor.
            where: The model's URI or path, for messages.

        Raises:
            ConfigError: It was written by a newer release.
            AdapterIntegrityError: It lacks a value or has one of another kind.
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
                ),
                lora=dict(section["adapter"]["lora"]),
                parameters=int(section["adapter"]["parameters"]),
                bytes=int(section["adapter"]["bytes"]),
                tokenizer_files=tuple(section["tokenizer"]["files"]),
                chat_template=str(section["tokenizer"]["chat_template"]),
                system=section["tokenizer"]["system"],
                versions=dict(section["versions"]),
                manifest=str(section["manifest"]),
                format_version=version,
            )
        except ConfigError:
            raise
        except (KeyError, TypeError, ValueError) as error:
            raise AdapterIntegrityError(
                f"the section {FLAVOR_NAME} in the MLmodel of {where} is not what was stored: {error!r}; fetch the "
                "model again, or take another version of it"
            ) from error


def section_digest(mlmodel: Mapping[str, Any]) -> str:
    """Digest (`sha256:...`) of the parts of an MLmodel file that decide what is loaded: flavors, signature, example."""
    sealed = {key: mlmodel[key] for key in _SEALED if mlmodel.get(key) is not None}
    content = json.dumps(sealed, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return "sha256:" + hashlib.sha256(content.encode()).hexdigest()


def template_digest(tokenizer: Any) -> str:
    """Digest (`sha256:...`) of a tokenizer's chat template, or of all of them by name; `none` without one."""
    template = tokenizer.chat_template
    if not template:
        return "none"
    text = template if isinstance(template, str) else json.dumps(template, sort_keys=True)
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()

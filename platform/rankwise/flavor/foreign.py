"""Adapters that this flavor has not stored: PEFT directories, and models of `mlflow.transformers`. What do they say?

Neither says enough: a PEFT directory has no quantization and rarely a revision, and `mlflow.transformers` saves peft
models in ways that do not load as they were. Whatever is missing or wrong becomes a finding, in words.

| how `mlflow.transformers` (3.17) was given the base | what it stores |
|---|---|
| from a local path | the injected base: targeted weights under names with `base_layer`, which come back at random |
| from a local path, with `base_model_path` | the path; no quantization, and any base of the same shape is accepted |
| from the hub | the hub's newest commit at saving time, not the one trained on; no quantization |
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rankwise.assets.layout import read_json
from rankwise.assets.weights import weight_files
from rankwise.exceptions import AdapterIntegrityError, ConfigError
from rankwise.experiment.schema import QuantizationSpec
from rankwise.flavor.describe import quantization_from
from rankwise.flavor.fetch import read_mlmodel
from rankwise.flavor.metadata import FLAVOR_NAME
from rankwise.flavor.saved_base import reinitialised_weights
from rankwise.modeling.adapter import WEIGHTS_NAME
from rankwise.modeling.adapter_config import CONFIG_NAME

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.pickle", "*.ckpt")
_WEIGHTS = ("adapter_model*.bin", "pytorch_model*.bin")
_CARD_PREFIX = "The following `bitsandbytes` quantization config was used during training:"
_KEYS = ("load_in_4bit", "load_in_8bit", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant", "bnb_4bit_compute_dtype")


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Something that a person should know of an adapter that is adopted.

    Attributes:
        code: `base_reinitialised`, `quantization_lost`, `wrong_revision`, `base_not_proven`, `base_compared`,
            `quantization_assumed`, `another_base_named`, `left_out`, `untrained`.
        text: The same in words, with values.
    """

    code: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Foreign:
    """An adapter somewhere, and what is said of its base there.

    Attributes:
        kind: `peft` or `mlflow.transformers`.
        adapter: The directory with configuration and weights.
        tokenizer: A directory with a tokenizer, or None.
        base_model: What names the base, or None.
        base_revision: A commit that may be believed, or None.
        quantization: Of the base, where it is recorded.
        saved_base: A copy of the base that was saved with it, or None.
        findings: What is missing or wrong.
    """

    kind: str
    adapter: Path
    tokenizer: Path | None
    base_model: str | None
    base_revision: str | None
    quantization: QuantizationSpec | None
    saved_base: Path | None = None
    findings: tuple[Finding, ...] = ()


def read_foreign(directory: Path, named: str) -> Foreign:
    """Find out what a directory holds, and what it says of the base. No weight is read, and no pickle.

    Args:
        directory: A PEFT directory, or a model directory of `mlflow.transformers`.
        named: How the user named it, for messages.

    Raises:
        ConfigError: It is neither.
        AdapterIntegrityError: Its weights are pickled, or a file cannot be parsed.
    """
    if (directory / "MLmodel").is_file():
        return _of_mlflow(directory, named)
    if (directory / CONFIG_NAME).is_file():
        return _of_peft(directory)
    below = sorted(path.parent.name for path in directory.glob(f"*/{CONFIG_NAME}"))
    hint = f"; {', '.join(below[:5])} in it has one: name that" if below else ""
    raise ConfigError(
        f"{named} is neither a PEFT directory (it has no {CONFIG_NAME}) nor a model of mlflow.transformers (it has no "
        f"MLmodel){hint}"
    )


def _of_peft(directory: Path) -> Foreign:
    left_out = _refuse_pickled_weights(directory)
    config = _read(directory / CONFIG_NAME)
    source = config.get("base_model_name_or_path")
    return Foreign(
        kind="peft",
        adapter=directory,
        tokenizer=directory if (directory / "tokenizer_config.json").is_file() else None,
        base_model=str(source) if source else None,
        base_revision=config.get("revision"),
        quantization=_of_card(directory / "README.md"),
        findings=tuple(left_out),
    )


def _of_mlflow(directory: Path, named: str) -> Foreign:
    flavors = read_mlmodel(directory).get("flavors") or {}
    if FLAVOR_NAME in flavors:
        raise ConfigError(
            f"{named} is a model of the flavor {FLAVOR_NAME} already: load it as it is. To register its adapter under "
            "another name, `rankwise pull` it first, and import that directory"
        )
    flavor = flavors.get("transformers")
    if not isinstance(flavor, dict):
        raise ConfigError(f"{named} is no model of mlflow.transformers; it has the flavors {sorted(flavors)}")
    folder = flavor.get("peft_adaptor")
    if not folder:
        raise ConfigError(f"{named} is a whole model without an adapter; only LoRA adapters are adopted")
    peft = _of_peft(_beside(directory, folder))
    source = flavor.get("local_base_model_path") or flavor.get("source_model_name") or peft.base_model
    tokenizer = directory / "components" / "tokenizer"
    # What it is said to be a copy of must not be found by it: it would agree with itself.
    saved = _beside(directory, flavor["model_binary"]) if flavor.get("model_binary") else None
    recorded, findings = peft.quantization, list(peft.findings)
    if saved is not None and (saved / "config.json").is_file():
        recorded = recorded or _of_config(saved)
        if names := reinitialised_weights(saved):
            findings.append(_corrupted(names))
    elif recorded is None:
        dtype = str(flavor.get("torch_dtype", "")).removeprefix("torch.") or "its own dtype"
        findings.append(
            Finding(
                code="quantization_lost",
                text="mlflow.transformers stored no quantization of the base: if the adapter was trained over a "
                f"quantized base, that is lost there (mlflow.transformers.load_model gives a plain base in {dtype})",
            )
        )
    if revision := flavor.get("source_model_revision"):
        findings.append(
            Finding(
                code="wrong_revision",
                text=f"the revision that mlflow.transformers recorded, {revision}, is the newest commit of {source} "
                "at the time of saving, whatever was trained on; it is not taken",
            )
        )
    return Foreign(
        kind="mlflow.transformers",
        adapter=peft.adapter,
        tokenizer=tokenizer if tokenizer.is_dir() else peft.tokenizer,
        base_model=str(source) if source else None,
        base_revision=peft.base_revision,
        quantization=recorded,
        saved_base=saved if saved is not None and weight_files(saved) else None,
        findings=tuple(findings),
    )


def _beside(directory: Path, name: Any) -> Path:
    found = directory / str(name)
    if found.resolve().parent != directory.resolve():
        raise AdapterIntegrityError(f"{directory / 'MLmodel'} names {name!r}, which is no file or directory beside it")
    return found


def _corrupted(names: list[str]) -> Finding:
    leaves = sorted({name.removesuffix(".weight").rpartition(".")[2] for name in names})
    return Finding(
        code="base_reinitialised",
        text=f"mlflow.transformers saved a corrupted base: {len(names)} weights that the adapter targets "
        f"({', '.join(leaves)}) are stored under names with 'base_layer', which transformers does not know, so that "
        "mlflow.transformers.load_model fills them with random numbers without an exception (of a 4-bit base it "
        "fails). The copy is not used",
    )


def _of_config(saved: Path) -> QuantizationSpec:
    """The quantization in the `config.json` of a saved base; not quantized where there is none."""
    values = read_json(saved / "config.json").get("quantization_config")
    return QuantizationSpec(load_in_4bit=False) if values is None else quantization_from(values)[0]


def _of_card(path: Path) -> QuantizationSpec | None:
    """The quantization that older releases of peft wrote into the card, or None."""
    if not path.is_file():
        return None
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    if _CARD_PREFIX not in lines:
        return None
    listed = (line[2:].partition(": ") for line in lines[lines.index(_CARD_PREFIX) + 1 :] if line.startswith("- "))
    found = {key: value for key, _, value in listed if key in _KEYS}
    values: dict[str, Any] = {key: {"True": True, "False": False}.get(value, value) for key, value in found.items()}
    if not values.get("load_in_4bit"):
        return QuantizationSpec(load_in_4bit=False, load_in_8bit=bool(values.get("load_in_8bit")))
    values.setdefault("bnb_4bit_quant_type", "fp4")  # bitsandbytes' own defaults.
    values.setdefault("bnb_4bit_use_double_quant", False)
    return QuantizationSpec(
        bnb_4bit_quant_type=values["bnb_4bit_quant_type"], bnb_4bit_use_double_quant=values["bnb_4bit_use_double_quant"]
    )


def _refuse_pickled_weights(directory: Path) -> list[Finding]:
    """Refuse weights in pickles; other pickles (a trainer's state) are left where they are, and that is said."""
    weights = sorted(path.name for pattern in _WEIGHTS for path in directory.glob(pattern))
    if weights:
        convert = (
            "import torch; from safetensors.torch import save_file; "
            f"save_file({{k: v.contiguous() for k, v in torch.load('{weights[0]}', weights_only=True).items()}}, "
            f"'{WEIGHTS_NAME}')"
        )
        raise AdapterIntegrityError(
            f"{directory} has its weights in {', '.join(weights)}: a pickle, which can run code when it is read, and "
            f"is never read here. Where you trust it, convert it once, delete it, and import again:\n"
            f'  cd {directory} && python -c "{convert}"'
        )
    others = sorted({path.name for pattern in _PICKLES for path in directory.glob(pattern)})
    if not others:
        return []
    return [Finding(code="left_out", text=f"pickles are never read, and were left out: {', '.join(others)}")]


def _read(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise AdapterIntegrityError(f"there is no {path}, so it is no PEFT adapter") from error
    except (OSError, ValueError) as error:
        raise AdapterIntegrityError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(document, dict):
        raise AdapterIntegrityError(f"{path} must hold a JSON object, got {type(document).__name__}")
    return document

"""Reads adapters that rankwise did not store: PEFT directories and models of `mlflow.transformers`.

A PEFT directory has no quantization and rarely a revision. `mlflow.transformers` stores peft models in ways that do not
load as they were. Whatever is missing or wrong becomes a finding, in words.

| base given to `mlflow.transformers` (3.17) | what it stores |
|---|---|
| a local path | the base with adapters in it: targeted weights have `base_layer` in their names and load as random |
| a local path, with `base_model_path` | the path; no quantization, and any base of the same shape is accepted |
| a hub id | the hub's newest commit at saving time, not the one trained on; no quantization |
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open

from rankwise.assets.layout import read_json, weight_files
from rankwise.exceptions import AdapterIntegrityError, BaseMismatchError, ConfigError
from rankwise.experiment.schema import QuantizationSpec
from rankwise.flavor.fetch import read_mlmodel
from rankwise.flavor.metadata import FLAVOR_NAME
from rankwise.modeling.adapter import WEIGHTS_NAME
from rankwise.modeling.adapter_config import CONFIG_NAME, read_adapter_document
from rankwise.modeling.base_copies import is_same_weight
from rankwise.modeling.prequantized import quantization_from

# peft puts it between the name of a targeted layer and `weight`; transformers does not know such names.
_WRAPPED = ".base_layer."


def reinitialised_weights(saved: Path) -> list[str]:
    """Names of the weights in a saved base that transformers fills with random numbers on loading."""
    names: list[str] = []
    for path in weight_files(saved):
        with safe_open(str(path), framework="pt", device="cpu") as file:
            names += [name for name in file.keys() if name.endswith(f"{_WRAPPED}weight")]  # noqa: SIM118
    return sorted(name.replace(_WRAPPED, ".") for name in names)


def compare_saved_base(saved: Path, base: Path, source: str) -> int:
    """Compare a base with the copy saved with an adapter, and return the number of compared tensors.

    All tensors that are not quantized are compared, also after rounding to 16-bit types: the copy is as in memory.

    Raises:
        BaseMismatchError: A tensor differs.
        AssetError: A file cannot be read.
    """
    theirs: dict[str, Path] = {}
    for path in weight_files(base):
        with safe_open(str(path), framework="pt", device="cpu") as file:
            theirs.update(dict.fromkeys(file.keys(), path))
    count = 0
    for path in weight_files(saved):
        with safe_open(str(path), framework="pt", device="cpu") as file:
            for name in file.keys():  # noqa: SIM118
                plain = name.replace(_WRAPPED, ".")
                if plain not in theirs or not (mine := file.get_tensor(name)).is_floating_point():
                    continue
                with safe_open(str(theirs[plain]), framework="pt", device="cpu") as other:
                    if not is_same_weight(mine, other.get_tensor(plain)):
                        raise BaseMismatchError(
                            f"base {source} is not the one that the adapter was trained on: the copy of the base that "
                            f"was saved with it differs in {plain}. Name the base that it was trained on (--base)"
                        )
                count += 1
    return count


_PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.pickle", "*.ckpt")
_WEIGHTS = ("adapter_model*.bin", "pytorch_model*.bin")
_CARD_PREFIX = "The following `bitsandbytes` quantization config was used during training:"
_KEYS = ("load_in_4bit", "load_in_8bit", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant", "bnb_4bit_compute_dtype")


@dataclass(frozen=True, kw_only=True)
class ImportFinding:
    """Something about an imported adapter that the user should know.

    Attributes:
        code: `base_reinitialised`, `quantization_lost`, `wrong_revision`, `base_not_proven`, `base_compared`,
            `quantization_assumed`, `another_base_named`, `left_out`, `untrained`, `targets_resolved`,
            `base_copies_dropped`.
        text: The same in words, with values.
    """

    code: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Foreign:
    """An adapter that rankwise did not store (`kind` is `peft` or `mlflow.transformers`), and the records of its base.

    `base_revision` is only a commit that can be trusted; `saved_base` is a copy of the base saved with the adapter.
    """

    kind: str
    adapter: Path
    tokenizer: Path | None
    base_model: str | None
    base_revision: str | None
    quantization: QuantizationSpec | None
    saved_base: Path | None = None
    findings: tuple[ImportFinding, ...] = ()


def read_foreign(directory: Path, named: str) -> Foreign:
    """Read what a directory records about its adapter and base; reads neither weights nor pickles.

    Raises:
        ConfigError: It is neither a PEFT directory nor a model of `mlflow.transformers`.
        AdapterConfigError: Its `adapter_config.json` is invalid or not supported.
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
    config = read_adapter_document(directory)
    return Foreign(
        kind="peft",
        adapter=directory,
        tokenizer=directory if (directory / "tokenizer_config.json").is_file() else None,
        base_model=config.base_model_name_or_path or None,
        base_revision=config.revision,
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
        raise ConfigError(f"{named} is not a model of mlflow.transformers; it has the flavors {sorted(flavors)}")
    folder = flavor.get("peft_adaptor")
    if not folder:
        raise ConfigError(f"{named} is a whole model without an adapter; only LoRA adapters can be imported")
    peft = _of_peft(_beside(directory, folder))
    source = flavor.get("local_base_model_path") or flavor.get("source_model_name") or peft.base_model
    tokenizer = directory / "components" / "tokenizer"
    # The copy must not be taken for the base that it is compared with.
    saved = _beside(directory, flavor["model_binary"]) if flavor.get("model_binary") else None
    recorded, findings = peft.quantization, list(peft.findings)
    if saved is not None and (saved / "config.json").is_file():
        recorded = recorded or _of_config(saved)
        if names := reinitialised_weights(saved):
            findings.append(_corrupted(names))
    elif recorded is None:
        dtype = str(flavor.get("torch_dtype", "")).removeprefix("torch.") or "its own dtype"
        findings.append(
            ImportFinding(
                code="quantization_lost",
                text="mlflow.transformers stored no quantization of the base: if the adapter was trained over a "
                f"quantized base, that is lost there (mlflow.transformers.load_model gives a plain base in {dtype})",
            )
        )
    if revision := flavor.get("source_model_revision"):
        findings.append(
            ImportFinding(
                code="wrong_revision",
                text=f"the revision that mlflow.transformers recorded, {revision}, is the newest commit of {source} "
                "at the time of saving, which may not be the one trained on; it is not used",
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
    path = directory / str(name)
    if path.resolve().parent != directory.resolve():
        raise AdapterIntegrityError(f"{directory / 'MLmodel'} names {name!r}, which is no file or directory beside it")
    return path


def _corrupted(names: list[str]) -> ImportFinding:
    leaves = sorted({name.removesuffix(".weight").rpartition(".")[2] for name in names})
    return ImportFinding(
        code="base_reinitialised",
        text=f"mlflow.transformers saved a corrupted base: {len(names)} weights that the adapter targets "
        f"({', '.join(leaves)}) are stored under names with 'base_layer', which transformers does not know, so that "
        "mlflow.transformers.load_model fills them with random numbers without an exception (of a 4-bit base it "
        "fails). The copy is not used",
    )


def _of_config(saved: Path) -> QuantizationSpec:
    """The quantization in the `config.json` of a saved base; not quantized without an entry."""
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
    recorded = {key: value for key, _, value in listed if key in _KEYS}
    values: dict[str, Any] = {key: {"True": True, "False": False}.get(value, value) for key, value in recorded.items()}
    if not values.get("load_in_4bit"):
        return QuantizationSpec(load_in_4bit=False, load_in_8bit=bool(values.get("load_in_8bit")))
    values.setdefault("bnb_4bit_quant_type", "fp4")  # bitsandbytes' own defaults.
    values.setdefault("bnb_4bit_use_double_quant", False)
    return QuantizationSpec(
        bnb_4bit_quant_type=values["bnb_4bit_quant_type"], bnb_4bit_use_double_quant=values["bnb_4bit_use_double_quant"]
    )


def _refuse_pickled_weights(directory: Path) -> list[ImportFinding]:
    """Refuse pickled weights; report other pickles, such as a trainer's state, and leave them out."""
    weights = sorted(path.name for pattern in _WEIGHTS for path in directory.glob(pattern))
    if weights:
        convert = (
            "import torch; from safetensors.torch import save_file; "
            f"save_file({{k: v.contiguous() for k, v in torch.load('{weights[0]}', weights_only=True).items()}}, "
            f"'{WEIGHTS_NAME}')"
        )
        raise AdapterIntegrityError(
            f"{directory} has its weights in {', '.join(weights)}: a pickle, which can run code when it is read, and "
            f"is never read here. If you trust it, convert it once, delete it, and import again:\n"
            f'  cd {directory} && python -c "{convert}"'
        )
    others = sorted({path.name for pattern in _PICKLES for path in directory.glob(pattern)})
    if not others:
        return []
    return [ImportFinding(code="left_out", text=f"pickles are never read, and were left out: {', '.join(others)}")]

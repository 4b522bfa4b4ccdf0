"""Adopts adapters that were trained and stored elsewhere: registers them with this flavor, over a base that is named.

An adapter is loaded over its base before it is registered, so that what is registered loads.

It cannot be loaded as it was, but it tells which base the adapter was trained on.

Neither says enough: a PEFT directory has no quantization and rarely a revision, and `mlflow.transformers` saves peft
models in ways that do not load as they were. Whatever is missing or wrong becomes a finding, in words.

| how `mlflow.transformers` (3.17) was given the base | what it stores |
|---|---|
| from a local path | the injected base: targeted weights under names with `base_layer`, which come back at random |
| from a local path, with `base_model_path` | the path; no quantization, and any base of the same shape is accepted |
| from the hub | the hub's newest commit at saving time, not the one trained on; no quantization |

- A copy of the base that `mlflow.transformers` has saved with an adapter, peft's layers in it.
- Adapters that this flavor has not stored: PEFT directories, and models of `mlflow.transformers`. What do they say?
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from mlflow import MlflowClient
from mlflow.models.model import ModelInfo
from safetensors import safe_open
from transformers import AutoTokenizer

from rankwise.assets.base import ResolvedBase, resolve_base
from rankwise.assets.layout import read_json, weight_files
from rankwise.exceptions import AdapterIntegrityError, AssetError, BaseMismatchError, ConfigError
from rankwise.experiment.schema import NAMED_QUANTIZATIONS, QuantizationSpec
from rankwise.experiment.source import HubSource, parse_source
from rankwise.flavor.fetch import Origin, local_path, obtain, read_mlmodel, resolve_uri
from rankwise.flavor.load import describe_quantization
from rankwise.flavor.metadata import FLAVOR_NAME, quantization_from
from rankwise.flavor.package import check_tokenizer_files
from rankwise.flavor.store import log_adapter
from rankwise.modeling.adapter import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    StoredAdapter,
    add_rows,
    load_adapter,
    read_adapter,
)
from rankwise.modeling.base import LoadedBase, load_base, quiet_transformers
from rankwise.modeling.fingerprint import MANIFEST_NAME, check_manifest
from rankwise.settings import Settings
from rankwise.tracking.connection import tracking_errors

# Between the name of a layer that an adapter targets and `weight`: a name that transformers does not know.
_WRAPPED = ".base_layer."


def reinitialised_weights(saved: Path) -> list[str]:
    """Names of the weights in a saved base that transformers fills with random numbers on loading."""
    names: list[str] = []
    for path in weight_files(saved):
        with safe_open(str(path), framework="pt", device="cpu") as file:
            names += [name for name in file.keys() if name.endswith(f"{_WRAPPED}weight")]  # noqa: SIM118
    return sorted(name.replace(_WRAPPED, ".") for name in names)


def compare_saved_base(saved: Path, base: Path, source: str) -> int:
    """Compare the copy of a base that was saved with an adapter with the base that it is to be registered over.

    Compared are all tensors that are not quantized, through 16-bit types too: the copy is as it was in memory.

    Args:
        saved: The copy's directory.
        base: The base's directory.
        source: What names the base.

    Returns:
        How many tensors were compared.

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
                    if not _same(mine, other.get_tensor(plain)):
                        raise BaseMismatchError(
                            f"base {source} is not the one that the adapter was trained on: the copy of the base that "
                            f"was saved with it differs in {plain}. Name the base that it was trained on (--base)"
                        )
                count += 1
    return count


def _same(copy: torch.Tensor, stored: torch.Tensor) -> bool:
    rows = min(len(copy), len(stored))  # An embedding may have been resized.
    if copy.shape[1:] != stored.shape[1:]:
        return False
    # It may have been loaded in a narrower type than it was saved in.
    return any(
        torch.equal(stored[:rows].to(loaded).to(copy.dtype), copy[:rows])
        for loaded in (copy.dtype, torch.bfloat16, torch.float16)
    )


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


QUANTIZATIONS = {{"int8": "8bit"}.get(name, name): spec for name, spec in NAMED_QUANTIZATIONS.items()}
_NAME = "adopted"
_RUN = re.compile(r"runs:/(?P<run>[0-9a-f]+)/(?P<path>.+)")


@dataclass(frozen=True, kw_only=True)
class Imported:
    """An adapter that was adopted.

    Attributes:
        uri: `models:/NAME/VERSION`.
        kind: `peft` or `mlflow.transformers`.
        base: What it is registered over.
        quantization_from: `given`, `recorded` or `assumed`.
        findings: What a person should know.
        info: MLflow's description.
    """

    uri: str
    kind: str
    base: LoadedBase
    quantization_from: str
    findings: tuple[Finding, ...]
    info: ModelInfo

    def to_dict(self) -> dict[str, Any]:
        """As plain values."""
        base, adapter = self.base, self.info.flavors[FLAVOR_NAME]["adapter"]
        return {
            "model_uri": self.uri,
            "kind": self.kind,
            "adapter": {"parameters": adapter["parameters"], "bytes": adapter["bytes"]},
            "base": {"source": base.source, "revision": base.revision, "fingerprint": base.fingerprint.digest},
            "quantization": describe_quantization(base.quantization),
            "quantization_from": self.quantization_from,
            "findings": [asdict(finding) for finding in self.findings],
        }


def import_adapter(
    uri: str | Path,
    name: str,
    *,
    base_model: str | Path | None = None,
    base_revision: str | None = None,
    quantization: QuantizationSpec | None = None,
    alias: str | None = None,
    system: str | None = None,
    device: str | None = None,
    settings: Settings | None = None,
    tracking_uri: str | None = None,
) -> Imported:
    """Register an adapter that another program has stored.

    Args:
        uri: A PEFT directory or a model of `mlflow.transformers`: a path, `models:/...`, or `runs:/RUN_ID/PATH` (a
            logged model, or a directory among the run's artifacts).
        name: Of the registered model.
        base_model: The base that it was trained on (`org/name`, a directory, `pypi:...`); what is recorded by default.
        base_revision: Its commit or digest.
        quantization: How the base was quantized in training; what is recorded by default, and where nothing is, 4 bit
            NF4 with double quantization, which is said.
        alias: Also set on the new version.
        system: A system prompt to put before bare texts.
        device: As in `load_model`.
        settings: Where caches and bases are; from the environment by default.
        tracking_uri: Of the MLflow store; MLflow's current one by default.

    Raises:
        ConfigError: It is no such adapter, or its base is not known.
        AdapterIntegrityError: Its weights are pickled, not plain LoRA, do not fit the base, or are not finite.
        BaseMismatchError: The base is not the one whose copy was saved with it, or lacks what the adapter targets.
        AssetError: The adapter or the base is not to be found.
        TrackingError: MLflow cannot be reached or refuses.
    """
    if not name or re.search(r"[/:@]", name):
        raise ConfigError(f"name: a registered model's name has no '/', ':' or '@' and is not empty, got {name!r}")
    chosen = settings or Settings.load()
    origin = _find(uri, tracking_uri)
    with obtain(origin, tracking_uri) as directory, tempfile.TemporaryDirectory(prefix="rankwise-") as scratch:
        foreign = read_foreign(directory, str(uri))
        adapter = _copy(foreign, Path(scratch))
        resolved, findings = _base(foreign, base_model, base_revision, chosen)
        if foreign.saved_base is not None:
            count = compare_saved_base(foreign.saved_base, resolved.path, resolved.source)
            text = f"{count} tensors of the base's copy that was saved with the adapter are those of {resolved.source}"
            findings.append(Finding(code="base_compared", text=text))
        else:
            text = f"nothing that was stored proves that {resolved.source} is the base that the adapter was trained on"
            findings.append(Finding(code="base_not_proven", text=text))
        spec, came_from = _quantization(foreign, quantization, findings)
        base = load_base(resolved, spec, chosen, device=device)
        findings += _attach(base, adapter)
        tokenizer = _tokenizer(foreign.tokenizer) if foreign.tokenizer is not None else base.tokenizer
        info = log_adapter(
            adapter,
            base,
            tokenizer,
            registered_model_name=name,
            system=system,
            tags=_tags(origin, foreign, came_from, findings),
            description=f"Imported from {uri} ({foreign.kind}).\n\n" + "\n".join(f"- {one.text}" for one in findings),
            tracking_uri=tracking_uri,
        )
    if alias is not None:
        with tracking_errors(f"setting the alias {alias!r} of {name}"):
            client = MlflowClient(tracking_uri=tracking_uri)
            client.set_registered_model_alias(name, alias, str(info.registered_model_version))
    return Imported(
        uri=f"models:/{name}/{info.registered_model_version}",
        kind=foreign.kind,
        base=base,
        quantization_from=came_from,
        findings=tuple(findings),
        info=info,
    )


def _find(uri: str | Path, tracking_uri: str | None) -> Origin:
    try:
        return resolve_uri(uri, tracking_uri)
    except AssetError:
        if not (found := _RUN.fullmatch(str(uri).rstrip("/"))):
            raise
        # Files that a script has put among the run's artifacts are no LoggedModel.
        with tracking_errors(f"looking up {uri}"):
            client = MlflowClient(tracking_uri=tracking_uri)
            if not client.list_artifacts(found["run"], found["path"]):
                raise
            root = client.get_run(found["run"]).info.artifact_uri
        location = local_path(f"{root.rstrip('/')}/{found['path']}")
        return Origin(uri=str(uri), location=location, run_id=found["run"])


def _copy(foreign: Foreign, target: Path) -> StoredAdapter:
    """Configuration and weights alone; a trainer's state beside them is not taken along."""
    if (foreign.adapter / MANIFEST_NAME).is_file():
        check_manifest(foreign.adapter)
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        if (foreign.adapter / name).is_file():
            shutil.copyfile(foreign.adapter / name, target / name)
    return read_adapter(target)


def _base(
    foreign: Foreign, base_model: str | Path | None, revision: str | None, settings: Settings
) -> tuple[ResolvedBase, list[Finding]]:
    findings = list(foreign.findings)
    recorded = foreign.base_model
    if base_model is None and recorded is None:
        raise ConfigError(
            "the adapter does not say which base it was trained on; name it: --base org/name or a directory"
        )
    named = str(base_model if base_model is not None else recorded)
    if base_model is not None and recorded not in {None, named}:
        text = f"the adapter names {recorded} as its base; it is registered over {named}"
        findings.append(Finding(code="another_base_named", text=text))
    try:
        source = parse_source(named)
    except ValueError as error:
        raise ConfigError(f"base: {error}; say where the base is: --base org/name or a directory") from error
    if revision is None and named == recorded:
        revision = foreign.base_revision
    if isinstance(source, HubSource) and revision is None and base_model is None:
        wrong = next((finding.text for finding in findings if finding.code == "wrong_revision"), None)
        raise ConfigError(
            f"the commit of {named} that the adapter was trained on is not known"
            + (f": {wrong}" if wrong else "")
            + ". Say it: --base-revision and the 40 hex digits"
        )
    return resolve_base(named, revision, settings), findings


def _quantization(
    foreign: Foreign, given: QuantizationSpec | None, findings: list[Finding]
) -> tuple[QuantizationSpec, str]:
    if given is not None:
        return given, "given"
    if foreign.quantization is not None:
        return foreign.quantization, "recorded"
    spec = QuantizationSpec()
    findings.append(
        Finding(
            code="quantization_assumed",
            text="how the base was quantized in training is not recorded; assumed is: "
            f"{describe_quantization(spec)}. If that is wrong, import again with --quantization "
            f"({', '.join(QUANTIZATIONS)})",
        )
    )
    return spec, "assumed"


@torch.no_grad()
def _attach(base: LoadedBase, adapter: StoredAdapter) -> list[Finding]:
    """Load the adapter over the base, as everybody will who loads it from the registry."""
    add_rows(base.model, adapter.config)
    load_adapter(base.model, adapter, _NAME)
    ids = torch.arange(1, 9, device=base.device)[None]
    if not torch.isfinite(base.model(input_ids=ids, use_cache=False).logits).all():
        raise AdapterIntegrityError("the adapter's logits over its base are not finite; it cannot be used")
    seconds = [tensor for name, tensor in adapter.tensors.items() if "lora_B" in name or "lora_embedding_B" in name]
    if seconds and not any(bool(tensor.any()) for tensor in seconds):
        text = "every B of the adapter is 0: it changes nothing, as before the first step of training"
        return [Finding(code="untrained", text=text)]
    return []


def _tokenizer(directory: Path) -> Any:
    check_tokenizer_files(directory)
    with quiet_transformers():
        try:
            return AutoTokenizer.from_pretrained(str(directory), local_files_only=True, trust_remote_code=False)
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise AdapterIntegrityError(f"the tokenizer in {directory} cannot be loaded: {error}") from error


def _tags(origin: Origin, foreign: Foreign, came_from: str, findings: list[Finding]) -> dict[str, str]:
    tags = {
        "rankwise.import.from": origin.uri,
        "rankwise.import.kind": foreign.kind,
        "rankwise.import.quantization": came_from,
        "rankwise.import.findings": json.dumps([finding.code for finding in findings]),
    }
    return {**tags, "rankwise.import.run": origin.run_id} if origin.run_id else tags

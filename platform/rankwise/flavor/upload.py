"""Uploads a built model directory to MLflow: as a LoggedModel, and as a version of a registered model.

Everything goes through `MlflowClient` with explicit ids. `Model.log` would need MLflow's global active run: given only
a run id it puts the LoggedModel into the default experiment, and it prints. All tags are set when the LoggedModel and
the version are created: MLflow has no compare-and-set, so who comes later must be able to tell whose they are.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlflow
from mlflow import MlflowClient
from mlflow.entities import LoggedModelOutput
from mlflow.environment_variables import MLFLOW_TRACKING_URI
from mlflow.models import Model
from mlflow.models.model import ModelInfo
from mlflow.tracking._tracking_service.utils import _use_tracking_uri

from rankwise.experiment.arm import param_name
from rankwise.flavor.metadata import MANIFEST_TAG, SECTION_TAG, BaseFacts
from rankwise.flavor.options import LogOptions
from rankwise.flavor.package import Package, build, describe_into
from rankwise.flavor.signing import SIGNATURE_TAG
from rankwise.tracking.errors import tracking_errors
from rankwise.tracking.linking import link_metrics
from rankwise.tracking.registry import Registry


def log_directory(
    adapter: Path,
    facts: BaseFacts,
    tokenizer: Any,
    name: str,
    registered_model_name: str | None,
    options: LogOptions,
) -> ModelInfo:
    """Build the model directory of an adapter and log it.

    Args:
        adapter: A PEFT directory.
        facts: The base that it was trained on.
        tokenizer: The tokenizer to use with it.
        name: Of the LoggedModel.
        registered_model_name: Also makes a version of this registered model.
        options: How.

    Raises:
        AdapterIntegrityError: The directory is not a whole plain LoRA adapter.
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
                with _current_store(options.tracking_uri):
                    version = Registry(lambda: client).create_version(
                        registered_model_name,
                        str(info.model_id),
                        run_id=run_id,
                        tags=tags,
                        description=options.description,
                    )
                info.registered_model_version = str(version.version)
        return info


@contextmanager
def _current_store(uri: str | None) -> Iterator[None]:
    """Make a store MLflow's current one: its SQL registry looks LoggedModels up there, whatever its client's store is.

    The environment comes back as it was, which MLflow's own context manager does not see to.
    """
    if uri is None or uri == mlflow.get_tracking_uri():
        yield
        return
    before = MLFLOW_TRACKING_URI.get_raw()
    try:
        with _use_tracking_uri(uri):
            yield
    finally:
        if before is None:
            MLFLOW_TRACKING_URI.unset()
        else:
            MLFLOW_TRACKING_URI.set(before)


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
        experiment_id = mlflow.tracking.fluent._get_experiment_id()
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
    """What a person filters versions by, under the names that runs use for their params."""
    base, lora = package.metadata.base, package.metadata.lora
    targets = lora.get("target_modules", "")
    quantization = "4bit" if base.quantization.load_in_4bit else "8bit" if base.quantization.load_in_8bit else "none"
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
        "adapter.parameters": str(package.metadata.parameters),
        "adapter.bytes": str(package.metadata.bytes),
        **{key: repr(float(value)) for key, value in (metrics or {}).items()},
    }

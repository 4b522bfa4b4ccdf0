"""The model registry: versions, tags, aliases, model URIs, and links between runs and LoggedModels.

Functions and methods raise `TrackingError` if the store refuses or is unreachable.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from mlflow import MlflowClient
from mlflow.entities import LoggedModelInput, Metric
from mlflow.entities.model_registry import ModelVersion as MlflowVersion
from mlflow.exceptions import MlflowException

from rankwise.compat.mlflow import MODEL_VERSIONS
from rankwise.exceptions import TrackingError
from rankwise.tracking.connection import paged, tracking_errors
from rankwise.tracking.values import DatasetRecord

JOB = "rankwise.job"
CANDIDATE = "rankwise.candidate_for"
_PAGE = 1000
_LOGGED_MODEL = re.compile(r"m-[0-9a-f]{32}")
_LOGGED_SOURCE = re.compile(r"models:/(m-[0-9a-f]{32})")
_VERSION_SOURCE = re.compile(r"models:/[^/]+/[0-9]+")
_FORMS = "`models:/NAME/VERSION`, `models:/NAME@ALIAS`, `models:/m-ID` or `runs:/RUN_ID/NAME`"


@dataclass(frozen=True, kw_only=True)
class ModelVersion:
    """A version of a registered model, created by run `run_id`.

    `model_id` is the LoggedModel behind it (`m-...`), `source` what was registered (`models:/m-...` for a LoggedModel);
    `status` is READY once it can be loaded.
    """

    name: str
    version: int
    run_id: str | None
    model_id: str | None
    source: str
    status: str
    tags: Mapping[str, str]
    aliases: tuple[str, ...]
    created_ms: int

    @property
    def uri(self) -> str:
        """`models:/NAME/VERSION`."""
        return f"models:/{self.name}/{self.version}"

    @property
    def is_copy(self) -> bool:
        """Whether it is a copy of another version (`copy_model_version`), with that version's tags, run and job."""
        return _VERSION_SOURCE.fullmatch(self.source) is not None

    @classmethod
    def of(cls, version: MlflowVersion) -> ModelVersion:
        """Convert MLflow's entity."""
        return cls(
            name=version.name,
            version=int(version.version),
            run_id=version.run_id or None,
            # SQL stores have it only in the source.
            model_id=version.model_id
            or (match[1] if (match := _LOGGED_SOURCE.fullmatch(version.source or "")) else None),
            source=version.source or "",
            status=version.status,
            tags=dict(version.tags),
            aliases=tuple(version.aliases),
            created_ms=version.creation_timestamp,
        )


@dataclass(frozen=True, kw_only=True)
class ResolvedModel:
    """The model that a URI currently refers to.

    `uri` is fixed: an alias becomes its version. `source` is where the files are, or the registered `models:/m-...`.
    """

    uri: str
    source: str
    run_id: str | None
    model_id: str | None
    version: ModelVersion | None


class Registry:
    """The model registry of a store."""

    def __init__(self, client: Callable[[], MlflowClient]) -> None:
        """Use `Store.registry`. `client` is called when the store is first needed."""
        self._make = client

    @property
    def _client(self) -> MlflowClient:
        return self._make()

    def ensure_model(self, name: str) -> None:
        """Create the registered model if it does not exist."""
        with tracking_errors(f"creating the registered model {name!r}"):
            try:
                self._client.create_registered_model(name)
            except MlflowException as error:
                if error.error_code not in {"RESOURCE_ALREADY_EXISTS", "ALREADY_EXISTS"}:
                    raise

    def create_version(
        self,
        name: str,
        model_id: str,
        *,
        run_id: str | None = None,
        tags: Mapping[str, str] | None = None,
        description: str | None = None,
    ) -> ModelVersion:
        """Register a LoggedModel (`m-...`) as a version; create the registered model if necessary.

        The LoggedModel is tagged with the version, so that the UI links both. `run_id` defaults to the LoggedModel's
        run.
        """
        self.ensure_model(name)
        with tracking_errors(f"registering a version of {name!r}"):
            version = self._client.create_model_version(
                name, f"models:/{model_id}", run_id, tags=dict(tags or {}), description=description, model_id=model_id
            )
            model = self._client.get_logged_model(model_id)
            links = json.loads(model.tags.get(MODEL_VERSIONS, "[]"))
            links.append({"name": name, "version": str(version.version)})
            self._client.set_logged_model_tags(model_id, {MODEL_VERSIONS: json.dumps(links)})
        return ModelVersion.of(version)

    def versions(self, name: str) -> list[ModelVersion]:
        """Return all versions, oldest first; none if the model does not exist."""
        return self._search(f"name = '{_quoted(name)}'")

    def get(self, name: str, version: int) -> ModelVersion:
        """Return one version, with its aliases."""
        with tracking_errors(f"reading models:/{name}/{version}"):
            return ModelVersion.of(self._client.get_model_version(name, str(version)))

    def find_by_tag(self, name: str, key: str, value: str) -> list[ModelVersion]:
        """Return the versions with this tag, oldest first."""
        return self._search(f"name = '{_quoted(name)}' AND tags.`{key}` = '{_quoted(value)}'")

    def of_job(self, name: str, job: int | str, run_id: str | None) -> list[ModelVersion]:
        """Return the versions that a job registered, without copies, oldest first.

        Queues that share one MLflow store have jobs of the same number, so `run_id` tells them apart; None allows any
        run.
        """
        versions = self.find_by_tag(name, JOB, str(job))
        return [version for version in versions if run_id in (None, version.run_id) and not version.is_copy]

    def search(self) -> list[ModelVersion]:
        """Return all versions of all registered models."""
        return self._search("")

    def tag_version(self, name: str, version: int, tags: Mapping[str, str | int | float | None]) -> None:
        """Set tags of a version; None values are skipped."""
        with tracking_errors(f"tagging models:/{name}/{version}"):
            for key, value in tags.items():
                if value is not None:
                    self._client.set_model_version_tag(name, str(version), key, str(value))

    def mark_candidate(self, version: ModelVersion, alias: str) -> None:
        """Tag a version as a candidate for an alias (`rankwise.candidate_for`).

        This fails early if the account may not write to the version, and so could not move its alias either.
        """
        with tracking_errors(f"marking {version.uri} as a candidate for the alias {alias!r}"):
            self._client.set_model_version_tag(version.name, str(version.version), CANDIDATE, alias)

    def describe_version(self, name: str, version: int, markdown: str) -> None:
        """Set the description of a version."""
        with tracking_errors(f"describing models:/{name}/{version}"):
            self._client.update_model_version(name, str(version), description=markdown)

    def set_alias(self, name: str, alias: str, version: int) -> None:
        """Point an alias to a version; an existing alias moves."""
        with tracking_errors(f"setting the alias {alias!r} of {name!r} to version {version}"):
            self._client.set_registered_model_alias(name, alias, str(version))

    def delete_alias(self, name: str, alias: str) -> None:
        """Delete an alias."""
        with tracking_errors(f"deleting the alias {alias!r} of {name!r}"):
            self._client.delete_registered_model_alias(name, alias)

    def get_alias(self, name: str, alias: str) -> ModelVersion | None:
        """Return the version that an alias points to; None if the alias or the model does not exist."""
        with tracking_errors(f"reading models:/{name}@{alias}"):
            try:
                return ModelVersion.of(self._client.get_model_version_by_alias(name, alias))
            except MlflowException as error:
                # SQL stores raise INVALID_PARAMETER_VALUE for a missing alias of an existing model.
                if error.error_code in {"RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"}:
                    return None
                raise

    def resolve(self, uri: str) -> ResolvedModel:
        """Return the model that a URI currently refers to.

        Raises:
            TrackingError: The URI is of no known form, or nothing of that name exists.
        """
        scheme, _, rest = uri.partition(":/")
        if scheme == "runs" and (match := re.fullmatch(r"/?([^/]+)/(.+)", rest)):
            return self._of_run(uri, match[1], match[2])
        if scheme == "models":
            rest = rest.lstrip("/")
            if _LOGGED_MODEL.fullmatch(rest):
                return self._of_logged_model(uri, rest)
            if match := re.fullmatch(r"([^@/]+)@([\w-]+)", rest):
                version = self.get_alias(match[1], match[2])
                if version is None:
                    raise TrackingError(f"{uri}: {self._alternatives(match[1])}")
                return _of_version(version)
            if match := re.fullmatch(r"([^@/]+)/([0-9]+)", rest):
                try:
                    return _of_version(self.get(match[1], int(match[2])))
                except TrackingError as error:
                    cause = error.__cause__
                    if isinstance(cause, MlflowException) and cause.error_code == "RESOURCE_DOES_NOT_EXIST":
                        raise TrackingError(f"{uri}: {self._alternatives(match[1])}") from error
                    raise
        raise TrackingError(f"{uri!r} is not a model URI; use {_FORMS}")

    def _of_run(self, uri: str, run_id: str, name: str) -> ResolvedModel:
        with tracking_errors(f"resolving {uri}"):
            run = self._client.get_run(run_id)
            models = self._client.search_logged_models(
                [run.info.experiment_id],
                filter_string=f"source_run_id = '{_quoted(run_id)}' AND name = '{_quoted(name)}'",
                order_by=[{"field_name": "creation_timestamp", "ascending": False}],
            )
        if not models:
            raise TrackingError(f"{uri}: run {run_id} has no logged model named {name!r}")
        # A model whose upload was interrupted stays FAILED or PENDING.
        newest = next((model for model in models if str(model.status) == "READY"), models[0])
        return ResolvedModel(
            uri=f"models:/{newest.model_id}",
            source=newest.artifact_location,
            run_id=run_id,
            model_id=newest.model_id,
            version=None,
        )

    def _of_logged_model(self, uri: str, model_id: str) -> ResolvedModel:
        with tracking_errors(f"resolving {uri}"):
            model = self._client.get_logged_model(model_id)
        return ResolvedModel(
            uri=f"models:/{model_id}",
            source=model.artifact_location,
            run_id=model.source_run_id,
            model_id=model_id,
            version=None,
        )

    def _alternatives(self, name: str) -> str:
        versions = self.versions(name)
        if not versions:
            return f"no registered model {name!r} has versions; check the name, or register a version first"
        known = ", ".join(str(version.version) for version in versions[-20:])
        with tracking_errors(f"reading the registered model {name!r}"):
            aliases = ", ".join(sorted(self._client.get_registered_model(name).aliases)) or "none"
        return f"no such version or alias; versions of {name!r}: {known}; aliases: {aliases}"

    def _search(self, filters: str) -> list[ModelVersion]:
        versions = paged(
            "searching the model registry",
            lambda token: self._client.search_model_versions(filters, max_results=_PAGE, page_token=token),
        )
        return sorted(map(ModelVersion.of, versions), key=lambda version: (version.name, version.version))


def _of_version(version: ModelVersion) -> ResolvedModel:
    return ResolvedModel(
        uri=version.uri, source=version.source, run_id=version.run_id, model_id=version.model_id, version=version
    )


def _quoted(value: str) -> str:
    # MLflow's filter language cannot escape a quote.
    if "'" in value:
        raise TrackingError(f"names and tags to search for must not contain a quote, got {value!r}")
    return value


def link_metrics(
    client: MlflowClient,
    run_id: str,
    model_id: str,
    keys: Collection[str],
    step: int,
    *,
    dataset: DatasetRecord | None = None,
) -> None:
    """Copy the points that a run has at `step` to a LoggedModel; keys without such a point are skipped.

    The run's buffered points must be delivered. Of several points of a key, the last one counts. Points keep their
    timestamps: with another timestamp, MLflow would add a second point to the curve.
    """
    with tracking_errors(f"linking results to {model_id}"):
        points = []
        for key in keys:
            at_step = [point for point in client.get_metric_history(run_id, key) if point.step == step]
            if not at_step:
                continue
            last = max(at_step, key=lambda point: point.timestamp)
            points.append(
                Metric(
                    key=key,
                    value=last.value,
                    timestamp=last.timestamp,
                    step=step,
                    run_id=run_id,
                    model_id=model_id,
                    dataset_name=None if dataset is None else dataset.name,
                    dataset_digest=None if dataset is None else dataset.short_digest,
                )
            )
        if points:
            client.log_batch(run_id, metrics=points)


def link_inputs(client: MlflowClient, run_id: str, model_ids: Collection[str]) -> None:
    """Record LoggedModels as inputs of a run. May be repeated."""
    if model_ids:
        with tracking_errors(f"linking models to run {run_id}"):
            client.log_inputs(run_id, models=[LoggedModelInput(model_id) for model_id in sorted(model_ids)])

"""What models are evaluated on and by: the definition that a stored adapter was made from, or another one.

- Definitions that MLflow remembers: what a run or a registered adapter was made from.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rankwise.exceptions import ConfigError, TrackingError
from rankwise.experiment.arm import ArmSpec
from rankwise.experiment.experiment import Experiment, load_experiment, parse_experiment
from rankwise.experiment.schema import ExperimentSpec, keys_of
from rankwise.jobs.job import JobKind
from rankwise.tasks.context import Context, Work
from rankwise.tracking.connection import tracking_errors

DEFINITION = "experiment.yaml"
_RUN_ID = re.compile(r"(?:runs:/)?([0-9a-f]{32})")


def recorded_definition(context: Context, uri: str) -> str:
    """The text of the definition that a run was started from, with every pin resolved.

    Args:
        context: The stores.
        uri: A run id, `runs:/RUN_ID`, `models:/NAME/VERSION` or `models:/NAME@ALIAS`.

    Raises:
        ConfigError: The run has no recorded definition.
        TrackingError: There is no such run or version.
    """
    match = _RUN_ID.fullmatch(uri)
    run_id = match[1] if match else context.store.registry.resolve(uri).run_id
    if run_id is None:
        raise ConfigError(f"{uri} was not made by a run, so no definition is recorded for it")
    content = read_artifact(context, run_id, DEFINITION)
    if content is None:
        raise ConfigError(f"run {run_id} has no artifact {DEFINITION}: it was not started by `rankwise run`")
    return content.decode()


def read_artifact(context: Context, run_id: str, name: str) -> bytes | None:
    """The content of a file at the root of a run's artifacts; None where there is no such file.

    Raises:
        TrackingError: There is no such run, or the store cannot be reached.
    """
    client = context.store.client
    with tracking_errors(f"reading {name} of run {run_id}"):
        if name not in {artifact.path for artifact in client.list_artifacts(run_id)}:
            return None
        with tempfile.TemporaryDirectory(prefix="rankwise-") as scratch:
            try:
                return Path(client.download_artifacts(run_id, name, scratch)).read_bytes()
            except OSError as error:
                raise TrackingError(f"reading {name} of run {run_id}: {error}") from error


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What models are evaluated on and by.

    Attributes:
        spec: The definition that it comes from.
        arm: Its base, rows and metrics; the adapter in it takes no part.
    """

    spec: ExperimentSpec
    arm: ArmSpec

    def changed(
        self,
        *,
        data: str | None = None,
        split: str | None = None,
        metrics: Sequence[str] = (),
        limit: int | None = None,
    ) -> Setting:
        """The same on other rows, by other metrics.

        Args:
            data: A source of rows with the same columns, in place of the definition's evaluation rows.
            metrics: Names of metrics.
            split: Of a hub data set that `data` names.
            limit: Evaluate no more rows than this.

        Raises:
            ConfigError: A metric is not known.
        """
        keys_of(metrics)  # Before minutes are spent.
        arm = self.arm
        dataset, evaluation = arm.dataset, arm.evaluation
        if data is not None:
            source = str(Path(data).absolute()) if Path(data).exists() else data
            dataset = dataset.model_copy(update={"eval": source, "eval_revision": None})
        if split is not None:
            dataset = dataset.model_copy(update={"eval_split": split})
        if limit is not None:
            dataset = dataset.model_copy(update={"limit": dataset.limit.model_copy(update={"eval": limit})})
        if metrics:
            evaluation = evaluation.model_copy(update={"metrics": tuple(metrics)})
        return Setting(spec=self.spec, arm=arm.model_copy(update={"dataset": dataset, "evaluation": evaluation}))


def recorded_setting(context: Context, uri: str, file: Path | None = None) -> Setting:
    """The rows and metrics that a stored adapter was evaluated by.

    Args:
        context: The stores.
        uri: `models:/NAME/VERSION` or `models:/NAME@ALIAS`; its run has recorded the definition.
        file: A definition to take in place of the recorded one.

    Raises:
        ConfigError: No definition is recorded, or the file is not valid.
        TrackingError: There is no such version.
    """
    experiment = load_experiment(file) if file is not None else _parsed(context, uri)
    return Setting(spec=experiment.spec, arm=_arm(context, experiment, uri, recorded=file is None))


def without_aliases(context: Context, uris: Sequence[str]) -> dict[str, str]:
    """The version that each alias points to now, so that it stays the same to the end; other names stay as they are.

    Raises:
        TrackingError: MLflow cannot be reached, or has no such alias.
    """
    found = {}
    for uri in uris:
        version = context.store.registry.resolve(uri).version if uri.startswith("models:") and "@" in uri else None
        found[uri] = uri if version is None else version.uri
    return found


def _parsed(context: Context, uri: str) -> Experiment:
    # A team mate has it from MLflow: neither the training data nor the base need lie where they lay.
    return parse_experiment(recorded_definition(context, uri), uri, elsewhere=True)


def _arm(context: Context, experiment: Experiment, uri: str, *, recorded: bool) -> ArmSpec:
    """The arm behind a version: as the queue has it, where the definition is the recorded one, else out of that."""
    version = context.store.registry.resolve(uri).version if uri.startswith("models:") else None
    spec_hash = "" if version is None else version.tags.get("rankwise.spec_hash", "")
    if recorded and (job := context.queue.find(JobKind.TRAIN, [spec_hash]).get(spec_hash)):
        return Work.of(job).arm
    arms = () if experiment.is_search else experiment.arms
    return next((arm for arm in arms if arm.spec_hash == spec_hash), ArmSpec.of(experiment.spec))

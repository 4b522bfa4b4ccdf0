"""`EvaluationSetup`: the rows and metrics that models are evaluated on, from a recorded definition or a file."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rankwise.exceptions import ConfigError, TrackingError
from rankwise.experiment.arm import ArmSpec
from rankwise.experiment.experiment import Experiment, load_experiment, parse_experiment
from rankwise.experiment.metric_names import keys_of
from rankwise.experiment.schema import ExperimentSpec
from rankwise.jobs.job import JobKind
from rankwise.tasks.context import ArmWork, Context
from rankwise.tracking.connection import tracking_errors

DEFINITION = "experiment.yaml"
_RUN_ID = re.compile(r"(?:runs:/)?([0-9a-f]{32})")


def recorded_definition(context: Context, uri: str) -> str:
    """Text of the definition, with every pin resolved, that a run or a model version was made from.

    `uri` is a run ID, `runs:/RUN_ID`, `models:/NAME/VERSION` or `models:/NAME@ALIAS`.

    Raises:
        ConfigError: The run has no recorded definition.
    """
    match = _RUN_ID.fullmatch(uri)
    run_id = match[1] if match else context.store.registry.resolve(uri).run_id
    if run_id is None:
        raise ConfigError(f"{uri} was not created by a run, so no definition is recorded for it")
    content = read_artifact(context, run_id, DEFINITION)
    if content is None:
        raise ConfigError(f"run {run_id} has no artifact {DEFINITION}: it was not started by `rankwise run`")
    return content.decode()


def read_artifact(context: Context, run_id: str, name: str) -> bytes | None:
    """Content of a file at the root of a run's artifacts; None if it does not exist."""
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
class EvaluationSetup:
    """What models are evaluated on: a definition, and the arm that gives base, rows and metrics."""

    spec: ExperimentSpec
    arm: ArmSpec

    def changed(
        self,
        *,
        data: str | None = None,
        split: str | None = None,
        metrics: Sequence[str] = (),
        limit: int | None = None,
    ) -> EvaluationSetup:
        """A copy with other rows (`data` has the same columns), or other metrics.

        Raises:
            ConfigError: A metric is not known.
        """
        keys_of(metrics)  # Reject unknown metrics before any work.
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
        return EvaluationSetup(
            spec=self.spec, arm=arm.model_copy(update={"dataset": dataset, "evaluation": evaluation})
        )


def recorded_setup(context: Context, uri: str, file: Path | None = None) -> EvaluationSetup:
    """Rows and metrics that a registered adapter was evaluated on, from its recorded definition or from `file`.

    Raises:
        ConfigError: No definition is recorded, or the file is not valid.
    """
    experiment = load_experiment(file) if file is not None else _recorded_experiment(context, uri)
    return EvaluationSetup(spec=experiment.spec, arm=_arm(context, experiment, uri, recorded=file is None))


def without_aliases(context: Context, uris: Sequence[str]) -> dict[str, str]:
    """Resolve aliases to versions, so that they do not change during a command; other names stay."""
    resolved = {}
    for uri in uris:
        version = context.store.registry.resolve(uri).version if uri.startswith("models:") and "@" in uri else None
        resolved[uri] = uri if version is None else version.uri
    return resolved


def _recorded_experiment(context: Context, uri: str) -> Experiment:
    # The definition may come from another machine, so local paths in it need not exist here.
    return parse_experiment(recorded_definition(context, uri), uri, elsewhere=True, recorded=True)


def _arm(context: Context, experiment: Experiment, uri: str, *, recorded: bool) -> ArmSpec:
    version = context.store.registry.resolve(uri).version if uri.startswith("models:") else None
    spec_hash = "" if version is None else version.tags.get("rankwise.spec_hash", "")
    if recorded and (job := context.queue.find(JobKind.TRAIN, [spec_hash]).get(spec_hash)):
        return ArmWork.of(job).arm
    arms = () if experiment.is_search else experiment.arms
    if arms and experiment.spec.dataset.rendering is None:
        # A file does not say which version an adapter was trained with; its hash does.
        arms = (*arms, *experiment.with_pins(rendering=1).arms)
    return next((arm for arm in arms if arm.spec_hash == spec_hash), ArmSpec.of(experiment.spec))

"""From a definition to what it is made from: pins resolved, base and tables on this machine."""

from __future__ import annotations

from dataclasses import dataclass

from rankwise.assets.base import ResolvedBase, resolve_base
from rankwise.assets.dataset import ResolvedData, resolve_data
from rankwise.assets.progress import Progress
from rankwise.experiment.arm import ArmSpec
from rankwise.experiment.schema import DatasetSpec, ExperimentSpec
from rankwise.settings import Settings
from rankwise.tracking.registry import Registry


@dataclass(frozen=True, kw_only=True)
class Sources:
    """Where an arm's base and rows are on this machine; `train` is None where its rows are not needed."""

    base: ResolvedBase
    train: ResolvedData | None
    eval: ResolvedData | None


def find_data(dataset: DatasetSpec, settings: Settings, progress: Progress) -> tuple[ResolvedData, ResolvedData | None]:
    """Resolve the training rows, and the evaluation rows where they are a source of their own.

    Raises:
        AssetError: A source cannot be had, or is not what its pin says.
    """
    train = resolve_data(dataset.train, dataset.train_revision, settings, dataset.train_split, dataset.name, progress)
    if not isinstance(dataset.eval, str):
        return train, None
    return train, _find_eval(dataset, dataset.eval, settings, progress)


def _find_eval(dataset: DatasetSpec, source: str, settings: Settings, progress: Progress) -> ResolvedData:
    return resolve_data(
        source, dataset.eval_revision, settings, dataset.eval_split, dataset.name, progress, key="eval_revision"
    )


def find_sources(
    arm: ArmSpec, settings: Settings, progress: Progress, *, base: ResolvedBase | None = None, training: bool = True
) -> Sources:
    """Resolve what an arm is made from.

    Args:
        arm: The arm.
        settings: Where the caches are.
        progress: Told of downloads and conversions.
        base: A base that has been found already.
        training: Whether its training rows are needed. Evaluation rows that are a split of them need them too.

    Raises:
        AssetError: A source cannot be had, or is not what its pin says.
    """
    base = base or resolve_base(arm.base_model, arm.base_model_revision, settings, progress)
    if not training and isinstance(arm.dataset.eval, str):
        return Sources(base=base, train=None, eval=_find_eval(arm.dataset, arm.dataset.eval, settings, progress))
    train, evaluation = find_data(arm.dataset, settings, progress)
    return Sources(base=base, train=train, eval=evaluation)


def pin(spec: ExperimentSpec, settings: Settings, progress: Progress, registry: Registry) -> ExperimentSpec:
    """Fetch base and rows, and fill in every pin that the definition leaves open.

    Args:
        spec: The definition.
        settings: Where the caches are.
        progress: Told of downloads and conversions.
        registry: Says which version the alias of `init_from` points to now.

    Raises:
        AssetError: A source cannot be had, or is not what its pin says.
        TrackingError: `init_from` names nothing that exists.
    """
    base = resolve_base(spec.base_model, spec.base_model_revision, settings, progress)
    train, evaluation = find_data(spec.dataset, settings, progress)
    return spec.with_pins(
        base_model_revision=base.revision,
        train_revision=train.revision,
        eval_revision=None if evaluation is None else evaluation.revision,
        init_from=None if spec.init_from is None else registry.resolve(spec.init_from).uri,
    )

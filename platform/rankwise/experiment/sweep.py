"""The arms of a definition."""

from __future__ import annotations

from rankwise.experiment.arm import ArmSpec
from rankwise.experiment.checker import check
from rankwise.experiment.document import Document
from rankwise.experiment.schema import ExperimentSpec


def expand(spec: ExperimentSpec) -> tuple[ArmSpec, ...]:
    """The arms of a definition, in the order of its grid or list.

    Raises:
        ConfigError: The definition was not made by the loader, or a file it names is gone or changed.
    """
    return tuple(arm for _, arm in labelled_arms(spec))


def labelled_arms(spec: ExperimentSpec) -> tuple[tuple[str, ArmSpec], ...]:
    """The arms, each with what sets it apart: `lora.r=8, seed=0`; empty for the only arm of a definition without sweep.

    Raises:
        ConfigError: As `expand`.
    """
    document = Document(filename=spec.name, data=spec.document())
    checked = check(document)
    if checked.problems:
        raise document.error(checked.problems)
    return tuple((point.label, arm) for point, arm in zip(checked.points, checked.arms, strict=True))

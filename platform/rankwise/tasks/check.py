"""Checks of base and rows before anything is trained, and a preview of what will be learnt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from rankwise.assets.dataset import ResolvedData, load_table
from rankwise.data.conversation import RowMapping
from rankwise.data.preflight import Report, preflight
from rankwise.data.preview import render_html, render_terminal
from rankwise.exceptions import ConfigError
from rankwise.experiment.arm import ArmSpec
from rankwise.experiment.schema import DatasetSpec
from rankwise.modeling.estimate import Estimator, match_targets
from rankwise.tasks.context import Context, Voice
from rankwise.tasks.prepare import Sources
from rankwise.tasks.rows import Rows

_PREVIEWED = 3


def check_names(context: Context, found: Sequence[tuple[ArmSpec, Sources]]) -> None:
    """Look up the modules and columns that arms name, before a base is loaded: that takes minutes for a large one.

    Args:
        context: Where the caches are.
        found: The arms, each with where its base and rows are.

    Raises:
        AssetError: A table cannot be read.
        ConfigError: With every name that the base or a table does not have.
    """
    bases = {path: Estimator(path).linear for path in {sources.base.path for _, sources in found}}
    lookups: dict[object, Callable[[], object]] = {}
    for arm, sources in found:
        path, targets = sources.base.path, arm.lora.target_modules
        lookups[path, targets] = partial(match_targets, bases[path], targets)
        for side, data in (("train", sources.train), ("eval", sources.eval)):
            lookups[arm.dataset, data, side] = partial(_check_columns, context, arm.dataset, data, side)
    problems: dict[str, None] = {}
    for lookup in lookups.values():
        try:
            lookup()
        except ConfigError as error:
            problems.update(dict.fromkeys(error.problems))
    if problems:
        raise ConfigError("\n".join(problems), tuple(problems))


def _check_columns(context: Context, dataset: DatasetSpec, data: ResolvedData | None, side: str) -> None:
    if data is not None:
        RowMapping.of(dataset, load_table(data, context.settings, context.voice).column_names, side)


def check_rows(voice: Voice, arm: ArmSpec, vocab_size: int, rows: Rows, *, show: bool) -> tuple[Report, str]:
    """Run the preflight, tell a person what it found, and make the preview.

    Args:
        voice: Whom to tell.
        arm: The arm whose rows they are.
        vocab_size: Tokens that its base has rows for.
        rows: Its rows.
        show: Whether to print the preview too.

    Returns:
        The report, and the preview as a page of HTML.

    Raises:
        DatasetError: With every error that was found.
    """
    report = preflight(
        rows.examples,
        rows.train,
        rows.eval if rows.examples.eval else None,
        rows.renderer,
        max_length=arm.training.max_length,
        vocab_size=vocab_size,
    )
    for finding in report.warnings:
        voice.warn(str(finding))
    report.raise_for_errors()
    first = [rows.train[index] for index in range(min(_PREVIEWED, len(rows.train)))]
    if show:
        counts = f"{len(rows.train):,} rows to train on, {len(rows.eval):,} to evaluate on"
        voice.say(f"rows: {counts}; the first ones, supervised tokens marked:")
        voice.show(render_terminal(first, rows.renderer.tokenizer))
    return report, render_html(first, rows.renderer.tokenizer)

"""Checks of base and rows before anything is trained, and a preview of what will be learnt."""

from __future__ import annotations

from rankwise.data.preflight import Report, preflight
from rankwise.data.preview import render_html, render_terminal
from rankwise.experiment.arm import ArmSpec
from rankwise.tasks.context import Voice
from rankwise.tasks.rows import Rows

_PREVIEWED = 3


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

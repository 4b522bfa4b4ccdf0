"""One evaluation as every task makes it: greedy answers, rows of all adapters in shared batches, weights kept."""

from __future__ import annotations

from collections.abc import Sequence

from rankwise.assets.progress import Progress
from rankwise.evaluation.evaluator import MAX_ROWS, Evaluation, evaluate
from rankwise.experiment.schema import EvaluationSpec
from rankwise.modeling.base import LoadedBase
from rankwise.modeling.dequantized import keep_dequantized
from rankwise.modeling.mixed_batch import greedy
from rankwise.tasks.rows import Rows


def measure(
    base: LoadedBase, rows: Rows, adapters: Sequence[str | None], spec: EvaluationSpec, progress: Progress
) -> dict[str | None, Evaluation]:
    """Evaluate adapters that are attached to the base, and the bare base (None), on the evaluation rows.

    Raises:
        ConfigError: A metric is not known, or a prompt does not fit.
    """
    examples, encoded = rows.evaluated
    batch = min(MAX_ROWS, spec.per_device_eval_batch_size * len(set(adapters)))
    answers = greedy(base, max_new_tokens=spec.max_new_tokens, batch_size=batch, progress=progress)
    with keep_dequantized(base.model):
        return evaluate(base, adapters, examples, encoded, spec, generate=answers, progress=progress)

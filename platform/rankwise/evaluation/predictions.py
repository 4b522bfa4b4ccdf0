"""The table of predictions: one row per example, for MLflow's artifact view and for reading."""

from __future__ import annotations

from collections.abc import Sequence

from rankwise.evaluation.evaluator import Evaluation
from rankwise.evaluation.metrics import find_metrics, scores


def prediction_rows(
    evaluation: Evaluation, metric_names: Sequence[str], *, log_examples: bool = True
) -> list[dict[str, object]]:
    """Rows of id, group, prompt, reference, prediction, finish reason and the example's own scores.

    Rows with one prompt are one group, which has the id of its first row.

    Args:
        evaluation: What one adapter did.
        metric_names: The metrics that it was evaluated with.
        log_examples: False leaves every text of the data and of the model out (`tracking.log_examples`).
    """
    metrics = find_metrics(metric_names)
    rows: list[dict[str, object]] = []
    groups: dict[str, str] = {}
    for observation in evaluation.observations:
        group = groups.setdefault(observation.prompt, observation.id)
        row: dict[str, object] = {"id": observation.id, "group": group}
        if log_examples:
            row |= {
                "prompt": observation.prompt,
                "reference": observation.reference,
                "prediction": observation.prediction,
            }
        row["finish_reason"] = observation.finish_reason
        row["supervised_tokens"] = observation.tokens
        row |= scores(metrics, observation)
        rows.append(row)
    return rows

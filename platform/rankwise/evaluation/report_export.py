"""A comparison for programs: the dictionary of `compare --json`, and one line for each arm as CSV."""

from __future__ import annotations

import csv
import io
from dataclasses import asdict

from rankwise.evaluation.compare import Comparison
from rankwise.evaluation.rank_finding import RankFinding
from rankwise.evaluation.report_costs import costs
from rankwise.evaluation.report_importance import importance


def comparison_json(comparison: Comparison, finding: RankFinding | None) -> dict[str, object]:
    """What `compare --json` prints and the sweep's run has as `comparison.json`.

    `smallest_rank` is null while no arm has a result; `importance` has a `reason` in place of `settings` where nothing
    can be said.
    """
    places = {id(each): place for place, each in enumerate(comparison.ranking, start=1)}
    found = costs(finding) if finding is not None else None
    on_front = {id(point.configuration) for point in found.points if point.on_front} if found is not None else set()
    remaining = finding.remaining if finding is not None else frozenset()
    configurations = []
    for each in comparison.configurations:
        mean = each.metric(comparison.primary_metric)
        configurations.append(
            {
                "params": dict(each.params),
                "spec_hashes": [arm.spec_hash for arm in each.arms],
                "place": places.get(id(each)),
                "seeds": mean.seeds if mean else 0,
                "mean": mean.value if mean else None,
                "stderr": mean.stderr if mean else None,
                "spread": mean.spread if mean else None,
                "not_worse": id(each) in remaining,
                "on_front": id(each) in on_front,
            }
        )
    return {
        **comparison.to_json(),
        "smallest_rank": finding.to_json() if finding is not None else None,
        "configurations": configurations,
        "importance": _importance(comparison, finding),
    }


def comparison_csv(comparison: Comparison) -> str:
    """One line for each arm, in the order of the comparison; a value that is not there is empty."""
    params = list(dict.fromkeys(key for arm in comparison.arms for key in arm.params))
    facts = ("spec_hash", "run_id", "status", "pruned", "reason", "model_uri")
    sizes = ("adapter_parameters", "adapter_bytes", "seconds", "peak_memory_bytes", "effective_rank", "rank_99")
    places = {arm.spec_hash: place for place, each in enumerate(comparison.ranking, start=1) for arm in each.arms}
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    results = [column for key in comparison.keys for column in (key, f"{key}.stderr", f"{key}.n")]
    writer.writerow(["place", *facts, *params, *results, *sizes])
    for arm in comparison.arms:
        values: list[object] = [places.get(arm.spec_hash), *(getattr(arm, name) for name in facts)]
        values += [arm.params.get(key) for key in params]
        for key in comparison.keys:
            metric = arm.metrics.get(key)
            values += [None] * 3 if metric is None else [metric.value, metric.stderr, metric.n]
        writer.writerow([*values, *(getattr(arm, name) for name in sizes)])
    return text.getvalue()


def _importance(comparison: Comparison, finding: RankFinding | None) -> dict[str, object] | None:
    if finding is None:
        return None
    found = importance(comparison, finding)
    if isinstance(found, str):
        return {"reason": found}
    return {"settings": [asdict(share) for share in found.shares], "seeds": found.noise}

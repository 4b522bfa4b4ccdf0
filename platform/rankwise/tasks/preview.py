"""What a definition's rows become: read, rendered, tokenized and masked, without a base's weights and without training.

Everything is made by the code that trains. The tokens go to the same cache, so a run after a preview finds them there.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from rankwise.assets.base import ResolvedBase, find_tokenizer
from rankwise.data.preflight import PreflightFinding, Report
from rankwise.data.rows import Example
from rankwise.data.tokens import Encoded
from rankwise.experiment.arm import ArmSpec
from rankwise.modeling.base import load_tokenizer
from rankwise.reporter import Reporter
from rankwise.settings import Settings
from rankwise.tasks.arm_rows import ArmRows, ArmSources, RowsCache, find_data, preflight_rows

_BARS = 8
_TOO_LONG = "longer than training.max_length"


@dataclass(frozen=True, kw_only=True)
class SourceRows:
    """The rows of one of several sources: how they are read, and how many are used, left out and truncated."""

    format: str
    used: int
    dropped: int
    truncated: int


@dataclass(frozen=True, kw_only=True)
class Side:
    """Training or evaluation rows.

    Attributes:
        used: Rows that are used.
        dropped: Rows that are left out, by reason; with several sources by `LABEL: reason`.
        truncated: Rows that lost tokens, and conversations that lost answers, to the length limit.
        lengths: (M,): tokens of each row before the length limit.
        sources: The rows of each source by its label; empty where there is only one.
    """

    used: int
    dropped: dict[str, int]
    truncated: int
    lengths: npt.NDArray[np.int32]
    sources: dict[str, SourceRows]


@dataclass(frozen=True, kw_only=True)
class Preview:
    """The rows of one arm.

    Attributes:
        format: How rows are read; see `dataset.format`. Several, if sources differ, are separated by commas.
        rows: The first training rows of each source, with their examples.
        sides: `train`, and `eval` where there are rows to evaluate on.
        report: The errors and warnings of the preflight.
        max_length: The length limit, in tokens.
        tokenizer: The base's, with the chat template in use.
    """

    format: str
    rows: tuple[tuple[Example, Encoded], ...]
    sides: dict[str, Side]
    report: Report
    max_length: int
    tokenizer: Any

    def to_json(self) -> dict[str, Any]:
        """The document of `preview --json`; counts are those of the training rows, `eval` has the others."""
        train = self.sides["train"]
        return {
            "format": self.format,
            "rows": [
                {
                    "id": example.id,
                    "prompt": example.prompt,
                    "completion": example.completion,
                    "tokens": len(encoded.input_ids),
                    "supervised": int(encoded.supervised.sum()),
                }
                for example, encoded in self.rows
            ],
            **_counts(train),
            "max_length": self.max_length,
            "eval": _counts(self.sides["eval"]) if "eval" in self.sides else None,
            "errors": [_finding(each) for each in self.report.errors],
            "warnings": [_finding(each) for each in self.report.warnings],
        }


def make_preview(arm: ArmSpec, settings: Settings, reporter: Reporter, *, rows: int) -> Preview:
    """Read, render, tokenize and mask the rows of an arm.

    Args:
        arm: The arm; only its base, `dataset` and `training.max_length` are used.
        settings: Where data and caches are.
        reporter: Reports progress.
        rows: How many training rows of each source are shown.

    Raises:
        AssetError: The base's tokenizer or the data cannot be fetched or read.
        DatasetError: The rows do not fit the definition.
    """
    directory = find_tokenizer(arm.base_model, arm.base_model_revision, settings, reporter)
    train, evaluation = find_data(arm.dataset, settings, reporter)
    base = ResolvedBase(source=arm.base_model, revision=arm.base_model_revision or "", path=directory, pinned=False)
    sources = ArmSources(base=base, train=train, eval=evaluation)
    read = RowsCache(settings, reporter).get(arm, sources, load_tokenizer(directory))
    report = preflight_rows(arm, read)
    sides = {"train": _side("train", read)}
    if read.examples.eval:
        sides["eval"] = _side("eval", read)
    return Preview(
        format=", ".join(read.examples.formats),
        rows=_shown(read, rows),
        sides=sides,
        report=report,
        max_length=arm.training.max_length,
        tokenizer=read.renderer.tokenizer,
    )


def _shown(read: ArmRows, count: int) -> tuple[tuple[Example, Encoded], ...]:
    first = read.first_rows(count)
    wanted = {row.id for row in first}
    # Only these: the examples of a long table are not held in memory.
    examples = {example.id: example for example in read.examples.train if example.id in wanted}
    return tuple((examples[row.id], row) for row in first)


def _side(side: Literal["train", "eval"], read: ArmRows) -> Side:
    encoded, examples = (read.train, read.examples.train) if side == "train" else (read.eval, read.examples.eval)
    prefix = f"{side}: "
    dropped = {
        reason.removeprefix(prefix): count
        for reason, count in read.examples.dropped.items()
        if reason.startswith(prefix)
    }
    source_of = {example.id: example.source for example in examples}
    for label, count in Counter(source_of[row] for row in encoded.dropped).items():
        dropped[f"{label}: {_TOO_LONG}" if label else _TOO_LONG] = count
    used = Counter(source_of[row] for row in set(encoded.ids))
    truncated = Counter(source_of[row] for row in (*encoded.truncated, *encoded.cut))
    return Side(
        used=used.total(),
        dropped=dropped,
        truncated=truncated.total(),
        lengths=encoded.whole_lengths,
        sources={
            label: SourceRows(
                format=mapping.format,
                used=used[label],
                dropped=sum(count for reason, count in dropped.items() if reason.startswith(f"{label}: ")),
                truncated=truncated[label],
            )
            for label, mapping in read.examples.sources(side).items()
        },
    )


def _counts(side: Side) -> dict[str, Any]:
    return {
        "used": side.used,
        "dropped": sum(side.dropped.values()),
        "dropped_by_reason": side.dropped,
        "truncated": side.truncated,
        "sources": {label: asdict(source) for label, source in side.sources.items()},
        "lengths": summary(side.lengths),
    }


def summary(lengths: npt.NDArray[np.int32]) -> dict[str, Any]:
    """Shortest, median, 99 %, longest and a histogram of row lengths in tokens; empty without rows."""
    if not len(lengths):
        return {}
    ordered = np.sort(lengths)
    return {
        "min": int(ordered[0]),
        "median": float(np.median(ordered)),
        "p99": int(ordered[math.ceil(0.99 * len(ordered)) - 1]),
        "max": int(ordered[-1]),
        "histogram": [{"from": low, "to": high, "rows": count} for low, high, count in histogram(ordered)],
    }


def histogram(lengths: npt.NDArray[np.int32]) -> Sequence[tuple[int, int, int]]:
    """Row lengths in at most eight ranges of equal width: first and last length of each, and its rows."""
    low, high = int(lengths.min()), int(lengths.max())
    width = max(1, math.ceil((high - low + 1) / _BARS))
    edges = range(low, high + 1, width)
    counts = np.bincount((lengths - low) // width, minlength=len(edges))
    return [(start, min(start + width - 1, high), int(count)) for start, count in zip(edges, counts, strict=True)]


def _finding(finding: PreflightFinding) -> dict[str, Any]:
    return {"code": finding.code, "message": finding.message, "count": finding.count, "rows": list(finding.rows)}

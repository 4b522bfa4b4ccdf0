"""Evaluate several adapters and the bare base over one loaded base, on the same examples, in mixed batches.

Two passes over the rows (one row: one example under one adapter). The teacher-forced pass gives loss and token
accuracy at the supervised positions, whose logits alone are computed where the base allows it
(`modeling/supervised.py`). The generating pass is done by a callable that the caller brings, and only if a metric
needs it.

A batch holds the same examples under every adapter: the base's products run once for all of them and no adapter's
rows are padded to another's length. What a row gets does not depend on its neighbours, beyond rounding.

Shapes: B rows of a batch, T tokens, S supervised tokens of all rows, V vocabulary.

Also compares the results under different quantizations, and builds the table of predictions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.nn import functional

from rankwise.data.batches import collate
from rankwise.data.masks import CLOSE
from rankwise.data.rows import Example
from rankwise.data.tokens import Encoded
from rankwise.evaluation.metrics import MetricValue, Observation, compute, find_metrics, metrics_of, scores
from rankwise.evaluation.paired import paired_difference
from rankwise.exceptions import ConfigError
from rankwise.experiment.schema import NAMED_QUANTIZATIONS, EvaluationSpec, QuantizationSpec
from rankwise.modeling.base import LoadedBase
from rankwise.modeling.lora.logits import SupervisedLogits
from rankwise.modeling.lora.packed import Routing, evaluating, install, segments_of
from rankwise.reporter import SILENT, Reporter

# Rows of one forward, over all adapters. Past this, larger products gain nothing on a CPU and cost memory on a GPU.
MAX_ROWS = 64
# Numbers in one batch's logits, S * V: 512 MiB in fp32. Long answers over a large vocabulary get smaller batches.
MAX_LOGITS = 2**27


class GeneratedAnswer(Protocol):
    """What the evaluator reads of a generation (`modeling.decoding.generation.Generation` is one)."""

    @property
    def text(self) -> str: ...  # noqa: D102

    @property
    def finish_reason(self) -> str: ...  # noqa: D102


Generator = Callable[[Sequence[Sequence[int]], Sequence[str | None]], Sequence[GeneratedAnswer]]
"""Greedy answers in the order asked: token ids of the prompts, and the adapter of each (None: the bare base)."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What one adapter (None: the bare base) did on the evaluation examples."""

    adapter: str | None
    metrics: Mapping[str, MetricValue]
    observations: tuple[Observation, ...]


@dataclass(frozen=True, kw_only=True)
class _EvaluatedRow:
    """One example under one adapter; `example` is its index."""

    example: int
    adapter: str | None


@dataclass(frozen=True, kw_only=True)
class _Tokens:
    """Teacher-forced sums of one row over its supervised tokens."""

    loss_sum: float
    tokens: int
    correct: int

    def __add__(self, other: _Tokens) -> _Tokens:
        return _Tokens(
            loss_sum=self.loss_sum + other.loss_sum,
            tokens=self.tokens + other.tokens,
            correct=self.correct + other.correct,
        )


NO_TOKENS = _Tokens(loss_sum=0.0, tokens=0, correct=0)


def evaluate(
    base: LoadedBase,
    adapters: Sequence[str | None],
    examples: Sequence[Example],
    encoded: Sequence[Encoded],
    spec: EvaluationSpec,
    *,
    generate: Generator | None = None,
    progress: Reporter | None = None,
) -> dict[str | None, Evaluation]:
    """Evaluate every adapter on every example.

    Args:
        base: The loaded base; the adapters are attached to its model.
        adapters: Names, and None for the bare base.
        examples: The evaluation examples.
        encoded: Their tokens, in any order. An example that has none (it did not fit into the length limit) counts for
            the generated metrics only, which the metrics' `n` shows. One that has several rows (a conversation whose
            answers generation sees in different ways) is one measurement over all of them.
        spec: Metrics and batch size. `per_device_eval_batch_size` examples are taken at a time under all adapters, as
            long as that is no more than `MAX_ROWS` rows.
        generate: Greedy decoding; needed when a metric asks for generations.
        progress: Told of rows of the teacher-forced pass as they are done.

    Raises:
        ConfigError: A metric is not known.
        ValueError: There are tokens of another example, an adapter is not attached to the base, or generations are
            needed and `generate` is None.
    """
    by_id: dict[str, list[Encoded]] = {}
    for each in encoded:
        by_id.setdefault(each.id, []).append(each)
    foreign = by_id.keys() - {example.id for example in examples}
    if foreign:
        raise ValueError(
            f"{len(foreign)} encoded rows belong to none of the {len(examples)} examples, {min(foreign)} first"
        )
    metrics = find_metrics(spec.metrics)
    needing = [each.name for each in metrics if each.needs_generation]
    if needing and generate is None:
        raise ValueError(f"metrics {', '.join(needing)} need generations: pass generate=")
    distinct = list(dict.fromkeys(adapters))
    rows = [_EvaluatedRow(example=index, adapter=adapter) for index in range(len(examples)) for adapter in distinct]
    sequences = [(index, row) for index, example in enumerate(examples) for row in by_id.get(example.id, ())]
    known = [_EvaluatedRow(example=place, adapter=adapter) for place in range(len(sequences)) for adapter in distinct]
    tokens_of = {place: row for place, (_, row) in enumerate(sequences)}
    of_sequences = _teacher_forced(base, known, tokens_of, spec.per_device_eval_batch_size * len(distinct), progress)
    tokens: dict[_EvaluatedRow, _Tokens] = {}
    for row in known:
        whole = _EvaluatedRow(example=sequences[row.example][0], adapter=row.adapter)
        tokens[whole] = tokens.get(whole, NO_TOKENS) + of_sequences[row]
    answers: dict[_EvaluatedRow, GeneratedAnswer] = {}
    if needing and generate is not None:
        texts = [example.prompt for example in examples]
        prompts = base.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []
        made = generate([prompts[row.example] for row in rows], [row.adapter for row in rows])
        answers = dict(zip(rows, made, strict=True))
    evaluations: dict[str | None, Evaluation] = {}
    for adapter in distinct:
        observations = tuple(
            _observation(example, tokens.get(row, NO_TOKENS), answers.get(row))
            for index, example in enumerate(examples)
            for row in [_EvaluatedRow(example=index, adapter=adapter)]
        )
        evaluations[adapter] = Evaluation(
            adapter=adapter,
            metrics=compute(metrics_of(spec.metrics, observations), observations),
            observations=observations,
        )
    return evaluations


def without_thought(text: str) -> str:
    """What follows a thought: metrics compare answers, not how a model came to them."""
    _, closed, answer = text.rpartition(CLOSE)
    return answer.strip() if closed else text


def _observation(example: Example, tokens: _Tokens, answer: GeneratedAnswer | None) -> Observation:
    return Observation(
        id=example.id,
        prompt=example.prompt,
        reference=without_thought(example.completion),
        columns=example.columns,
        source=example.source,
        loss_sum=tokens.loss_sum,
        tokens=tokens.tokens,
        correct_tokens=tokens.correct,
        prediction=None if answer is None else without_thought(answer.text),
        finish_reason=None if answer is None else answer.finish_reason,
    )


def _teacher_forced(
    base: LoadedBase,
    rows: Sequence[_EvaluatedRow],
    encoded: Mapping[int, Encoded],
    wanted_rows: int,
    progress: Reporter | None,
) -> dict[_EvaluatedRow, _Tokens]:
    routing = install(base.model)
    results: dict[_EvaluatedRow, _Tokens] = {}
    shown = (progress or SILENT).task("evaluate", len(rows), "rows")
    with evaluating(base.model), torch.no_grad(), shown as advance:
        logits_of = SupervisedLogits(base.model)
        for batch in _batches(rows, encoded, min(wanted_rows, MAX_ROWS), _logits_per_token(base), logits_of.direct):
            results.update(_forward(base, routing, logits_of, batch, encoded))
            advance(len(batch))
    return results


def _batches(
    rows: Sequence[_EvaluatedRow], encoded: Mapping[int, Encoded], max_rows: int, vocabulary: int, direct: bool
) -> Iterator[list[_EvaluatedRow]]:
    """Batches of similar length, longest first, within the limits on rows and logits, each sorted by adapter.

    `direct`: whether logits are computed for supervised tokens only, else for all tokens and padding too.
    """

    def length(row: _EvaluatedRow) -> int:
        return len(encoded[row.example].input_ids)

    batch: list[_EvaluatedRow] = []
    tokens = 0
    for row in sorted(
        rows, key=lambda row: (-length(row), row.example)
    ):  # stable: adapters of an example stay together
        own = int(encoded[row.example].supervised.sum()) if direct else length(batch[0] if batch else row)
        if batch and (len(batch) == max_rows or (tokens + own) * vocabulary > MAX_LOGITS):
            yield sorted(batch, key=lambda each: each.adapter or "")
            batch, tokens = [], 0
        batch.append(row)
        tokens += own
    if batch:
        yield sorted(batch, key=lambda each: each.adapter or "")


def _forward(
    base: LoadedBase,
    routing: Routing,
    logits_of: SupervisedLogits,
    rows: Sequence[_EvaluatedRow],
    encoded: Mapping[int, Encoded],
) -> dict[_EvaluatedRow, _Tokens]:
    batch = collate([encoded[row.example] for row in rows], pad_token_id=_padding(base))
    row_of, position = batch.supervised.nonzero(as_tuple=True)  # (S,) each
    if len(row_of) == 0:
        return dict.fromkeys(rows, NO_TOKENS)
    targets = batch.input_ids[row_of, position].to(base.device)
    row_of = row_of.to(base.device)
    with routing.segments(segments_of(base.model, [row.adapter for row in rows], batch.lengths)):
        logits = logits_of(
            batch.input_ids.to(base.device),
            batch.attention_mask.to(base.device),
            row_of,
            position.to(base.device) - 1,
        )
    losses = functional.cross_entropy(logits, targets, reduction="none").double()
    correct = logits.argmax(dim=-1) == targets
    zeros = torch.zeros(len(rows), dtype=torch.float64, device=base.device)
    loss_sums = zeros.index_add(0, row_of, losses).tolist()
    right = zeros.index_add(0, row_of, correct.double()).tolist()
    counts = batch.supervised.sum(dim=1).tolist()
    return {
        row: _Tokens(loss_sum=loss_sums[at], tokens=int(counts[at]), correct=int(right[at]))
        for at, row in enumerate(rows)
    }


def _logits_per_token(base: LoadedBase) -> int:
    return int(base.model.get_output_embeddings().weight.shape[0])


def _padding(base: LoadedBase) -> int:
    """Any id does: padding is masked and never supervised."""
    pad = base.tokenizer.pad_token_id
    return int(pad) if pad is not None else 0


QUANTIZATIONS: Mapping[str, QuantizationSpec] = {
    name: NAMED_QUANTIZATIONS[name] for name in ("nf4", "fp4", "int8", "none")
}


def quantization_of(name: str) -> QuantizationSpec:
    """The settings that a short name stands for.

    Raises:
        ConfigError: There is no such name.
    """
    if name not in QUANTIZATIONS:
        raise ConfigError(f"--quantization: unknown name {name!r}; use one of {', '.join(QUANTIZATIONS)}")
    return QUANTIZATIONS[name]


def compare_quantizations(
    results: Mapping[str, Mapping[str, Evaluation]], metrics: Sequence[str]
) -> list[dict[str, Any]]:
    """Every quantization against the first one.

    Args:
        results: Evaluations by quantization and model.
        metrics: Names of the metrics that were computed.

    Returns:
        For each other quantization, model and mean: `difference` with its interval, and `equal_generations`, the share
        of examples with the same text (None where nothing was generated); `text` says it in words.
    """
    reference, *others = results
    lines = []
    for other in others:
        for model, evaluation in results[other].items():
            before = results[reference][model].observations
            texts = [
                (a.prediction, b.prediction)
                for a, b in zip(before, evaluation.observations, strict=True)
                if a.prediction is not None
            ]
            equal = sum(a == b for a, b in texts) / len(texts) if texts else None
            for metric in metrics_of(metrics, before):
                for key in metric.keys:
                    found = paired_difference(
                        [metric(each)[key] for each in evaluation.observations],
                        [metric(each)[key] for each in before],
                        clusters=[each.cluster for each in before],
                    )
                    same = "" if equal is None else f"; {equal:.0%} of the generated texts are the same"
                    lines.append(
                        {
                            "model": model,
                            "from": reference,
                            "to": other,
                            "key": key,
                            "difference": found.value,
                            "low": found.low,
                            "high": found.high,
                            "n": found.n,
                            "equal_generations": equal,
                            "text": f"{model}: {key} from {reference} to {other}: {found.text}{same}",
                        }
                    )
    return lines


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
    metrics = metrics_of(metric_names, evaluation.observations)
    rows: list[dict[str, object]] = []
    groups: dict[str, str] = {}
    for observation in evaluation.observations:
        group = groups.setdefault(observation.cluster, observation.id)
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

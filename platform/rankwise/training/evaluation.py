"""Evaluation of arms during training: loss, perplexity and token accuracy on their evaluation rows."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

import torch
from torch.nn import functional

from rankwise.data.batches import collate
from rankwise.data.tokens import Encoded
from rankwise.exceptions import JobError, is_out_of_memory
from rankwise.experiment.metric_names import SOURCE_PREFIX
from rankwise.modeling.lora.logits import SupervisedLogits
from rankwise.modeling.lora.packed import Routing, Segment
from rankwise.modeling.rope import row_lengths
from rankwise.training.arm import TrainingArm
from rankwise.training.row_check import rows_are_independent

METRICS = ("eval.loss", "eval.perplexity", "eval.token_accuracy")
MAX_ROWS = 64
MAX_LOGITS = 1 << 28  # elements at supervised positions: 1 GiB in fp32, plus intermediate tensors

logger = logging.getLogger(__name__)


class TrainingEvaluator:
    """Computes `METRICS`, and the loss of each source, for the arms of a pack, in batches with rows of several arms."""

    def __init__(self, model: Any, routing: Routing, logits: SupervisedLogits, pad_token_id: int) -> None:
        self._model = model
        self._routing = routing
        self._logits = logits
        self._pad_token_id = pad_token_id
        self._device = next(model.parameters()).device
        self._vocabulary = int(model.get_input_embeddings().weight.shape[0])
        self._max_rows = self._rows = MAX_ROWS

    @torch.no_grad()
    def evaluate(self, arms: Sequence[TrainingArm]) -> dict[str, dict[str, float]]:
        """By spec hash: metrics over all supervised tokens of the evaluation rows, without dropout."""
        while True:
            try:
                return self._evaluate(arms)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                if self._rows == 1:
                    raise JobError(
                        f"out of memory with one evaluation row on {self._device}: lower training.max_length: {error}"
                    ) from error
            # Outside the handler, whose traceback keeps the tensors of the failed pass alive.
            torch.cuda.empty_cache()
            self._max_rows = self._rows // 2
            logger.warning("out of memory: at most %d rows are evaluated together from now on", self._max_rows)

    def _evaluate(self, arms: Sequence[TrainingArm]) -> dict[str, dict[str, float]]:
        work: list[tuple[int, Encoded]] = []
        for index, arm in enumerate(arms):
            work += [(index, row) for row in arm.task.evaluation or ()]
        # Rows of similar length go together, longest first.
        work.sort(key=lambda item: -len(item[1].input_ids))
        size = max(arm.task.spec.evaluation.per_device_eval_batch_size for arm in arms) * len(arms)
        longest = max(int(row.supervised.sum()) for _, row in work)
        size = max(1, min(size, self._max_rows, MAX_LOGITS // (self._vocabulary * max(1, longest))))
        self._rows = size
        # Loss, correct tokens and tokens of all rows (""), and of each source where there are several.
        sums: list[dict[str, list[float]]] = [{"": [0.0, 0.0, 0.0]} for _ in arms]
        for batch in self._batches(work, size):
            for index, label, *found in self._pass(arms, sorted(batch, key=lambda item: item[0])):
                for name in dict.fromkeys(("", label)):
                    own = sums[index].setdefault(name, [0.0, 0.0, 0.0])
                    for place, value in enumerate(found):
                        own[place] += value
        metrics = {}
        for arm, by_source in zip(arms, sums, strict=True):
            total, right, count = by_source.pop("")
            mean = total / max(1.0, count)
            metrics[arm.spec_hash] = {
                "eval.loss": mean,
                "eval.perplexity": math.exp(mean) if mean < 700 else math.inf,
                "eval.token_accuracy": right / max(1.0, count),
                **{SOURCE_PREFIX + label: own[0] / max(1.0, own[2]) for label, own in sorted(by_source.items())},
            }
        return metrics

    def _batches(self, work: Sequence[tuple[int, Encoded]], size: int) -> Iterator[Sequence[tuple[int, Encoded]]]:
        """Batches of up to `size` rows; of one length if rows depend on their neighbours."""
        independent = rows_are_independent(self._model, self._logits)
        for _, run in groupby(work, key=lambda item: None if independent else len(item[1].input_ids)):
            alike = list(run)
            for start in range(0, len(alike), size):
                yield alike[start : start + size]

    def _pass(
        self, arms: Sequence[TrainingArm], work: Sequence[tuple[int, Encoded]]
    ) -> list[tuple[int, str, float, int, int]]:
        """For each arm and source: loss, correct tokens and tokens."""
        batch = collate([row for _, row in work], self._pad_token_id)
        owners = torch.tensor([index for index, _ in work])
        segments = []
        for index in sorted(set(owners.tolist())):
            rows = (owners == index).nonzero().flatten().tolist()
            segments.append(Segment(adapter=arms[index].name, start=rows[0], stop=rows[-1] + 1))
        row_of, token = batch.supervised.nonzero(as_tuple=True)
        targets = batch.input_ids[row_of, token].to(self._device)
        lengths = [len(row.input_ids) for _, row in work]
        with self._routing.segments(segments), row_lengths(self._model, lengths):
            logits = self._logits(
                batch.input_ids.to(self._device),
                batch.attention_mask.to(self._device),
                row_of.to(self._device),
                (token - 1).to(self._device),
            )
        losses = functional.cross_entropy(logits, targets, reduction="none").double().cpu()
        correct = (logits.argmax(dim=-1) == targets).cpu()
        group_of_row = [(index, arms[index].task.sources.get(row.id, "")) for index, row in work]
        groups = sorted(set(group_of_row))
        group_of = torch.tensor([groups.index(group) for group in group_of_row])[row_of]
        return [
            (
                *group,
                float(losses[group_of == place].sum()),
                int(correct[group_of == place].sum()),
                int((group_of == place).sum()),
            )
            for place, group in enumerate(groups)
        ]

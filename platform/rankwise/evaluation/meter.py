"""How far do results move when the base is quantized otherwise? Paired, per model, on the same rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rankwise.evaluation.evaluator import Evaluation
from rankwise.evaluation.metrics import find_metrics
from rankwise.evaluation.paired import paired_difference
from rankwise.exceptions import ConfigError
from rankwise.experiment.schema import QuantizationSpec

QUANTIZATIONS: Mapping[str, QuantizationSpec] = {
    "nf4": QuantizationSpec(),
    "fp4": QuantizationSpec(bnb_4bit_quant_type="fp4"),
    "int8": QuantizationSpec(load_in_4bit=False, load_in_8bit=True),
    "none": QuantizationSpec(load_in_4bit=False),
}


def quantization_of(name: str) -> QuantizationSpec:
    """The settings that a short name stands for.

    Raises:
        ConfigError: There is no such name.
    """
    if name not in QUANTIZATIONS:
        raise ConfigError(f"--quantization: there is no {name!r}; there are {', '.join(QUANTIZATIONS)}")
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
            for metric in find_metrics(metrics):
                for key in metric.keys:
                    found = paired_difference(
                        [metric(each)[key] for each in evaluation.observations],
                        [metric(each)[key] for each in before],
                        clusters=[each.prompt for each in before],
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

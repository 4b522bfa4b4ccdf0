"""A metric for rankwise: a pure function of one observation that gives each of its means a share."""

from rankwise.evaluation.metrics import NOT_COUNTED, Sample, metric


@metric(
    "answer_length",
    keys=["eval.answer_length", "eval.digit_share"],
    greater_is_better=["eval.digit_share"],  # of the others less is better
    needs_generation=True,  # observation.prediction is there
)
def answer_length(observation):
    """Characters of the answer; share of digits in them, an empty answer left out."""
    text = observation.prediction
    digits = sum(character.isdigit() for character in text)
    share = Sample(total=digits, weight=len(text)) if text else NOT_COUNTED
    return {"eval.answer_length": Sample(total=len(text)), "eval.digit_share": share}

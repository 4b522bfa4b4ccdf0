"""A small valid definition to start from: tests change a line of it and look at what is said."""

from __future__ import annotations

from pathlib import Path

from rankwise.experiment.experiment import Experiment, parse_experiment

COMMIT = "0123456789abcdef0123456789abcdef01234567"
DIGEST = "sha256:" + "ab" * 32

# One key a line, so that a message's line number says something.
DEFINITION = """\
version: 1
name: small
base_model: org/base
base_model_revision: 0123456789abcdef0123456789abcdef01234567
lora:
  r: 8
  lora_alpha: 2*r
  lora_dropout: 0.05
  target_modules: [q_proj, v_proj]
dataset:
  train: org/rows
  train_revision: 0123456789abcdef0123456789abcdef01234567
  eval: {split_from: train, rows: 20}
  prompt: "How much is {carat}?"
  completion: "${price}"
training:
  max_steps: 20
  learning_rate: 2e-3
  warmup_steps: 5
sweep:
  parameters:
    lora.r: [4, 8]
evaluation:
  metrics: [loss, number]
  primary_metric: eval.loss
register:
  name: pricer
  alias: best
"""


def changed(*changes: tuple[str, str], text: str = DEFINITION) -> str:
    """The definition with texts replaced; each must be in it once, so that no test changes nothing."""
    for old, new in changes:
        assert text.count(old) == 1, (old, text.count(old))
        text = text.replace(old, new)
    return text


def parse(
    *changes: tuple[str, str], overrides: tuple[str, ...] = (), directory: Path | None = None, text: str = DEFINITION
) -> Experiment:
    """The experiment of the definition with texts replaced."""
    return parse_experiment(changed(*changes, text=text), "small.yaml", overrides, directory=directory)

from __future__ import annotations

import pytest

from rankwise.exceptions import ConfigError
from rankwise.experiment.experiment import parse_experiment

DEFINITION = """\
version: 1
name: x
base_model: org/base
lora: {r: 4, lora_alpha: 8, target_modules: [q_proj]}
dataset: {train: org/rows, prompt: "{a}", completion: "{b}", eval: {split_from: train, rows: 5}}
training: {max_steps: 1}
"""
TOKEN = "hf_" + "aBcD" * 8


@pytest.mark.parametrize(
    ("line", "key"),
    [
        (f"description: my token is {TOKEN}", "description"),
        ("base_model_config: https://ann:pa55word@host.example/config.json", "base_model_config"),
        (f"sweep: {{arms: [{{dataset.system: {TOKEN}}}]}}", r"sweep\.arms\[0\]\.dataset\.system"),
    ],
)
def test_a_definition_with_a_secret_is_refused_where_it_stands_without_repeating_it(line, key):
    with pytest.raises(ConfigError, match=rf"x\.yaml:7: {key}: looks like a secret") as caught:
        parse_experiment(DEFINITION + line + "\n", "x.yaml")
    said = [problem for problem in caught.value.problems if "secret" in problem]
    assert "pa55word" not in str(said)
    assert TOKEN not in str(said)


def test_an_override_with_a_secret_is_refused_too():
    with pytest.raises(ConfigError, match=r"--set: dataset\.system: looks like a secret"):
        parse_experiment(DEFINITION, "x.yaml", [f"dataset.system={TOKEN}"])


def test_prompts_about_passwords_and_tokens_are_no_secrets():
    parse_experiment(
        DEFINITION + 'description: "Which rank counts tokens? password: {password}, token = next(t)"\n', "x.yaml"
    )

"""Which adapters are evaluated together."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers.definitions import parse

from rankwise.data.prompting import Reading
from rankwise.exceptions import ConfigError
from rankwise.experiment.arm import ArmSpec
from rankwise.tasks import evaluate as base_groups
from rankwise.tasks.evaluate import group_by_base
from rankwise.tasks.evaluation_setup import EvaluationSetup

OWN, OTHER = "sha256:own", "sha256:other"


@pytest.fixture
def grouped(monkeypatch):
    spec = parse().spec
    arm = ArmSpec.of(spec)
    fingerprint = SimpleNamespace(digest="sha256:base")
    found = SimpleNamespace(path=Path("base"), source=arm.base_model, revision=arm.base_model_revision)
    facts = SimpleNamespace(
        fingerprint=fingerprint,
        quantization=arm.quantization,
        source=found.source,
        revision=found.revision,
        attn_implementation="auto",
        towers=False,
    )
    other = arm.model_copy(update={"dataset": arm.dataset.model_copy(update={"chat_template": "plain"})})
    monkeypatch.setattr(base_groups, "find_base", lambda facts, uri, settings: found)
    monkeypatch.setattr(base_groups, "fingerprint_base", lambda path, settings: fingerprint)
    monkeypatch.setattr(base_groups, "base_attention", lambda base, how, asked: SimpleNamespace(name=asked))
    monkeypatch.setattr(base_groups, "recorded_attention", lambda facts, base, how: facts.attn_implementation)
    monkeypatch.setattr(base_groups, "_template_of", lambda arm, base: OWN)

    def recorded_setup(context, uri):
        if uri.startswith("models:/m-"):
            raise ConfigError("it was not made by a run")
        return EvaluationSetup(spec=spec, arm=other)

    monkeypatch.setattr(base_groups, "recorded_setup", recorded_setup)
    context = SimpleNamespace(settings=SimpleNamespace(tracking_uri=""), reporter=None)

    def group(templates, attention=None):
        metadata = {}
        for uri, name in templates.items():
            template, _, switch = name.partition(" ")
            reading = Reading(chat_template_kwargs={switch: False} if switch else {})
            base = SimpleNamespace(**vars(facts))
            base.attn_implementation = (attention or {}).get(uri, facts.attn_implementation)
            metadata[uri] = SimpleNamespace(base=base, chat_template=template, reading=reading)
        return group_by_base(context, EvaluationSetup(spec=spec, arm=arm), list(templates), None, metadata)

    return group


def test_adapters_of_one_base_with_other_chat_templates_are_groups_of_their_own(grouped):
    first, second = grouped({"models:/m/1": OWN, "models:/m/2": OTHER, "models:/m/3": OWN, "models:/m/4": OTHER})
    assert (first.models, first.bare) == (["models:/m/1", "models:/m/3", "base"], "base")
    assert (second.models, second.bare) == (
        ["models:/m/2", "models:/m/4", "base of models:/m/2"],
        "base of models:/m/2",
    )
    assert (first.arm.dataset.chat_template, second.arm.dataset.chat_template) == (None, "plain")


@pytest.mark.parametrize("template", ["none", OTHER])
def test_an_adapter_without_a_definition_takes_the_rows_of_the_setting(grouped, template):
    (only,) = grouped({"models:/m-1": template})
    assert only.models == ["models:/m-1", "base"]


def test_an_adapter_trained_with_another_attention_is_evaluated_with_it(grouped):
    first, second = grouped({"models:/m/1": OWN, "models:/m/2": OWN}, attention={"models:/m/2": "eager"})
    assert (first.models, first.arm.attn_implementation) == (["models:/m/1", "base"], "auto")
    assert (second.models, second.arm.attn_implementation) == (["models:/m/2", "base of models:/m/2"], "eager")


def test_other_arguments_of_the_template_are_another_group(grouped):
    first, second = grouped({"models:/m/1": OWN, "models:/m/2": f"{OWN} enable_thinking"})
    assert (first.models, second.models) == (["models:/m/1", "base"], ["models:/m/2", "base of models:/m/2"])

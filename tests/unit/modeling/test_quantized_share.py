"""How much of a base is really in 4 bit, and that everything says so."""

import json
import logging

import pytest
import torch
from click.testing import CliRunner
from helpers.architectures import make_architecture
from helpers.bases import inject, resolved, settings_in
from helpers.tiny import make_base

import rankwise.flavor as flavor
from rankwise.cli.main import cli
from rankwise.experiment.schema import NAMED_QUANTIZATIONS, QuantizationSpec
from rankwise.flavor.fetch import fetch
from rankwise.flavor.store import _tags
from rankwise.modeling.base import load_base
from rankwise.modeling.estimate import Estimator
from rankwise.modeling.quantized_share import share_of_loaded

MIXTURES = ["gpt_oss", "qwen3_moe", "deepseek_v3", "mixtral", "llama4_text"]
DENSE = ["llama", "qwen3", "gemma2", "gpt2", "mpt"]


def load(name, tmp_path, **quantization):
    path = make_architecture(tmp_path / name, name)
    return path, load_base(resolved(path), QuantizationSpec(**quantization), settings_in(tmp_path), device="cpu")


@pytest.mark.parametrize("name", [*MIXTURES, *DENSE, "falcon", "mamba", "bloom", "opt"])
def test_what_is_planned_is_what_is_loaded(name, tmp_path):
    path, base = load(name, tmp_path)
    estimate = Estimator(path).base(QuantizationSpec())
    assert estimate.share_4bit == base.share_4bit
    counted = sum(parameter.numel() * 2 for parameter in base.model.parameters() if parameter.dtype == torch.uint8)
    assert share_of_loaded(base.model).quantized == counted


@pytest.mark.parametrize("name", MIXTURES)
def test_a_mixture_in_4_bit_gives_a_warning_that_names_its_experts(name, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="rankwise"):
        _, base = load(name, tmp_path)
    assert base.share_4bit < 0.75
    assert f"only {base.share_4bit:.1%} of the weights are in 4 bit, though load_in_4bit is true" in caplog.text
    assert "experts.gate_up_proj" in caplog.text


@pytest.mark.parametrize("name", DENSE)
def test_a_dense_model_in_4_bit_gives_none(name, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="rankwise"):
        _, base = load(name, tmp_path)
    assert base.share_4bit >= 0.99
    assert "in 4 bit" not in caplog.text


def test_other_quantizations_have_no_share_and_no_warning(tmp_path, caplog):
    path = make_architecture(tmp_path / "mixtral", "mixtral")
    for name in ("int8", "none"):
        base = load_base(resolved(path), NAMED_QUANTIZATIONS[name], settings_in(tmp_path), device="cpu")
        assert base.share_4bit == Estimator(path).base(NAMED_QUANTIZATIONS[name]).share_4bit == 0.0
    assert "in 4 bit" not in caplog.text


def test_adapters_do_not_count(tmp_path):
    _, base = load("mixtral", tmp_path)
    inject(base.model, "arm-1", r=32)
    assert share_of_loaded(base.model).share == base.share_4bit


def test_the_stored_adapter_and_its_version_record_it(tmp_path):
    _, base = load("qwen3_moe", tmp_path)
    inject(base.model, "arm-1")
    flavor.save_model(base.model, tmp_path / "saved", base.tokenizer, base=base, settings=settings_in(tmp_path))
    with fetch(tmp_path / "saved") as fetched:
        assert fetched.metadata.base.share_4bit == base.share_4bit
    card = (tmp_path / "saved" / "adapter" / "README.md").read_text()
    assert f"4 bit (nf4, double quantization), {base.share_4bit:.1%} of the weights" in card
    from types import SimpleNamespace

    package = SimpleNamespace(metadata=fetched.metadata, section="", signature=None)
    assert _tags(package, None)["base.share_4bit"] == repr(base.share_4bit)


def test_commands_state_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RANKWISE_COMPUTE_DTYPE", "float32")
    make_architecture(tmp_path / "mixture", "qwen3_moe")
    make_base(tmp_path / "dense")
    (tmp_path / "rows.csv").write_text("a,b\n1,2\n3,4\n")
    definition = (
        "version: 1\nname: share\nbase_model: ./{base}\nlora: {{r: 2, lora_alpha: 4, target_modules: [q_proj]}}\n"
        'dataset: {{train: rows.csv, prompt: "{{a}}", completion: "{{b}}"}}\ntraining: {{max_steps: 1}}\n'
    )
    shares = {}
    for base in ("mixture", "dense"):
        (tmp_path / "e.yaml").write_text(definition.format(base=base))
        planned = CliRunner().invoke(cli, ["plan", "e.yaml", "--json"])
        assert planned.exit_code == 0, planned.output
        (arm,) = json.loads(planned.stdout)["arms"]
        arguments = ["inspect", "--base", base, "--r", "2", "--target-modules", "q_proj", "--json"]
        inspected = CliRunner().invoke(cli, arguments)
        assert inspected.exit_code == 0, inspected.output
        shares[base] = json.loads(inspected.stdout)["base"]["share_4bit"]
        assert arm["estimates"]["base_share_4bit"] == shares[base]
        assert ("though load_in_4bit is true" in planned.stderr) == (base == "mixture")
    assert shares["mixture"] < 0.9
    assert shares["dense"] == 1.0

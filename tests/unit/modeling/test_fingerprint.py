import json
import shutil

import pytest
from helpers.bases import settings_in
from helpers.tiny import CHATML, make_base

from rankwise.exceptions import AssetError
from rankwise.modeling.fingerprint import NO_TEMPLATE, Fingerprint, differing_part, fingerprint_base


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("original") / "base")


@pytest.fixture
def base(original, tmp_path):
    return shutil.copytree(original, tmp_path / "base")


@pytest.fixture
def settings(tmp_path):
    return settings_in(tmp_path)


def edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def changed(before, after):
    return [line.split(":")[0] for line in before.differences(after)]


def test_a_copy_elsewhere_has_the_same_fingerprint(original, base, settings):
    assert fingerprint_base(base, settings) == fingerprint_base(original, settings)


def test_a_hub_snapshot_of_links_and_its_copy_agree(base, settings, tmp_path):
    before = fingerprint_base(base, settings)
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
    blobs.mkdir()
    snapshot.mkdir()
    for index, file in enumerate(sorted(base.iterdir())):
        blob = shutil.copy(file, blobs / f"{index:064x}")
        (snapshot / file.name).symlink_to(blob)
    assert fingerprint_base(snapshot, settings) == before


def test_one_flipped_byte_in_the_weights_changes_that_part_alone(base, settings):
    before = fingerprint_base(base, settings)
    path = base / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert changed(before, fingerprint_base(base, settings)) == ["weights"]


def test_the_names_of_shards_do_not_count_and_their_content_does(base, settings):
    from safetensors.torch import load_file, save_file

    tensors = load_file(base / "model.safetensors")
    names = sorted(tensors)
    (base / "model.safetensors").unlink()

    def shard(first, second):
        shards = {first: names[:5], second: names[5:]}
        for file, members in shards.items():
            save_file({name: tensors[name] for name in members}, base / file)
        index = {"weight_map": {name: file for file, members in shards.items() for name in members}}
        (base / "model.safetensors.index.json").write_text(json.dumps(index))

    shard("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    before = fingerprint_base(base, settings)
    for path in base.glob("model-*"):
        path.unlink()
    # In the other order too.
    shard("b.safetensors", "a.safetensors")
    assert fingerprint_base(base, settings) == before
    (base / "a.safetensors").unlink()
    with pytest.raises(AssetError, match=r"lacks a\.safetensors"):
        fingerprint_base(base, settings)


@pytest.mark.parametrize(
    "change",
    [{"transformers_version": "9.0"}, {"_name_or_path": "/elsewhere"}, {"dtype": "float32"}, {"use_cache": False}],
    ids=str,
)
def test_configuration_that_does_not_touch_a_logit_does_not_count(base, settings, change):
    before = fingerprint_base(base, settings)
    edit(base / "config.json", **change)
    assert fingerprint_base(base, settings) == before


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_the_order_of_settings_does_not_count(base, settings, name):
    before = fingerprint_base(base, settings)
    content = json.loads((base / name).read_text())
    turned = json.dumps(dict(reversed(content.items())))
    assert turned != json.dumps(content)
    (base / name).write_text(turned)
    assert fingerprint_base(base, settings) == before


def test_configurations_within_a_configuration_are_read_alike(base, settings):
    edit(base / "config.json", parts=[{"use_cache": True, "width": 8}, {"use_cache": True}])
    before = fingerprint_base(base, settings)
    edit(base / "config.json", parts=[{"use_cache": False, "width": 8}, {}])
    assert fingerprint_base(base, settings) == before
    edit(base / "config.json", parts=[{"use_cache": False, "width": 9}, {}])
    assert changed(before, fingerprint_base(base, settings)) == ["config"]


@pytest.mark.parametrize(
    "change", [{"rms_norm_eps": 1e-5}, {"num_attention_heads": 8}, {"hidden_act": "gelu"}], ids=str
)
def test_configuration_that_changes_logits_counts(base, settings, change):
    before = fingerprint_base(base, settings)
    edit(base / "config.json", **change)
    assert changed(before, fingerprint_base(base, settings)) == ["config"]


def test_other_tokens_that_end_a_generation_count(base, settings):
    before = fingerprint_base(base, settings)
    edit(base / "generation_config.json", eos_token_id=[1, 2])
    assert changed(before, fingerprint_base(base, settings)) == ["config"]


def test_another_tokenizer_counts(base, settings):
    before = fingerprint_base(base, settings)
    (base / "tokenizer.json").write_bytes((base / "tokenizer.json").read_bytes() + b" ")
    assert changed(before, fingerprint_base(base, settings)) == ["tokenizer"]


def test_another_special_token_counts(base, settings):
    before = fingerprint_base(base, settings)
    edit(base / "tokenizer_config.json", pad_token="<|endoftext|>")
    assert changed(before, fingerprint_base(base, settings)) == ["tokenizer"]


def test_another_template_counts(base, settings):
    before = fingerprint_base(base, settings)
    (base / "chat_template.jinja").write_text(CHATML + " ")
    assert changed(before, fingerprint_base(base, settings)) == ["chat_template"]


def test_the_same_template_in_the_tokenizers_configuration_agrees(base, settings):
    before = fingerprint_base(base, settings)
    (base / "chat_template.jinja").unlink()
    assert fingerprint_base(base, settings).chat_template == NO_TEMPLATE
    edit(base / "tokenizer_config.json", chat_template=CHATML)
    assert fingerprint_base(base, settings) == before


def test_an_additional_template_counts(base, settings):
    before = fingerprint_base(base, settings)
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "tools.jinja").write_text("x")
    several = fingerprint_base(base, settings)
    assert changed(before, several) == ["chat_template"]
    # As older releases of transformers keep several in one file.
    shutil.rmtree(base / "additional_chat_templates")
    (base / "chat_template.jinja").unlink()
    named = [{"name": "tools", "template": "x"}, {"name": "default", "template": CHATML}]
    edit(base / "tokenizer_config.json", chat_template=named)
    assert fingerprint_base(base, settings) == several


def test_a_base_saved_again_by_transformers_agrees(base, settings, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    before = fingerprint_base(base, settings)
    AutoModelForCausalLM.from_pretrained(base).save_pretrained(tmp_path / "again")
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "again")
    after = fingerprint_base(tmp_path / "again", settings)
    assert after.config == before.config
    assert after.chat_template == before.chat_template


def test_a_base_converted_from_a_gguf_goes_by_its_tensors(base, settings):
    from safetensors.torch import load_file, save_file

    record = {"gguf": "sha256:" + "0" * 64, "tensors": "sha256:" + "0" * 64, "libraries": {}}
    (base / "conversion.json").write_text(json.dumps(record))
    before = fingerprint_base(base, settings)
    # Another release may write other metadata, which moves every byte after the header.
    tensors = load_file(base / "model.safetensors")
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt", "more": "x" * 999})
    assert fingerprint_base(base, settings) == before
    name = next(iter(tensors))
    tensors[name] = tensors[name] + 1
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    assert changed(before, fingerprint_base(base, settings)) == ["weights"]


def test_a_base_that_differs_in_its_configuration_is_told_without_reading_weights(base, settings):
    expected = fingerprint_base(base, settings)
    assert differing_part(base, expected, settings) is None
    edit(base / "config.json", rms_norm_eps=1e-3)
    (base / "model.safetensors").write_bytes(b"of this not one byte counts")
    part, digest = differing_part(base, expected, settings).split()
    assert (part, digest.startswith("sha256:")) == ("config", True)


@pytest.mark.parametrize("part", ["config", "tokenizer", "chat_template", "weights"])
def test_the_part_that_differs_is_named_with_its_digest(base, settings, part):
    found = fingerprint_base(base, settings)
    expected = Fingerprint(**{**found.__dict__, part: "sha256:" + "0" * 64})
    assert differing_part(base, expected, settings) == f"{part} {getattr(found, part)}"


def test_the_digest_covers_every_part():
    parts = {"weights": "a", "config": "b", "tokenizer": "c", "chat_template": "d"}
    fingerprint = Fingerprint(**parts)
    others = {Fingerprint(**{**parts, part: "x"}).digest for part in parts}
    assert len(others | {fingerprint.digest}) == 5


def test_the_digest_of_known_parts_stays_what_stored_models_have():
    parts = {"weights": "a", "config": "b", "tokenizer": "c", "chat_template": "d"}
    assert Fingerprint(**parts).digest == "sha256:56ea3aacd1b829b3874ee5098eefe28cf4aa223261a102ac7fb6d1951e9783a8"


def test_a_fingerprint_survives_being_stored_and_refuses_altered_parts():
    fingerprint = Fingerprint(weights="a", config="b", tokenizer="c", chat_template="d")
    assert Fingerprint.from_dict(fingerprint.to_dict()) == fingerprint
    with pytest.raises(ValueError, match="the fingerprint's parts have the digest"):
        Fingerprint.from_dict({**fingerprint.to_dict(), "weights": "x"})
    with pytest.raises(ValueError, match=r"missing: \['config'\]"):
        Fingerprint.from_dict({k: v for k, v in fingerprint.to_dict().items() if k != "config"})


def test_differences_name_the_part_and_both_digests():
    one = Fingerprint(weights="a", config="b", tokenizer="c", chat_template="d")
    other = Fingerprint(weights="a", config="x", tokenizer="c", chat_template="d")
    assert one.differences(other) == ["config: b here, x there"]


def test_a_directory_without_a_configuration_is_refused(tmp_path, settings):
    with pytest.raises(AssetError, match=r"config\.json"):
        fingerprint_base(tmp_path, settings)


def test_a_base_without_safetensors_is_refused(base, settings):
    (base / "model.safetensors").rename(base / "pytorch_model.bin")
    with pytest.raises(AssetError, match="lacks safetensors weights"):
        fingerprint_base(base, settings)

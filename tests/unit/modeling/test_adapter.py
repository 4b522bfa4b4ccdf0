import json
import shutil

import pytest
import torch
from helpers.bases import inject, logits, resolved, settings_in
from helpers.tiny import make_base
from safetensors.torch import load_file, save_file

from rankwise.exceptions import AdapterIntegrityError, BaseMismatchError, ConfigError
from rankwise.experiment.schema import QuantizationSpec
from rankwise.modeling.adapter import (
    WEIGHTS_NAME,
    adapter_tensors,
    load_adapter,
    read_adapter,
    save_adapter,
)
from rankwise.modeling.base import linear_modules, load_base
from rankwise.modeling.fingerprint import write_manifest

SHAPES = {
    "llama": [
        {"target_modules": ["q_proj", "v_proj"]},
        {"target_modules": "all-linear", "r": 2, "use_rslora": True},
        {"target_modules": ["q_proj", "down_proj"], "rank_pattern": {"down_proj": 8}, "alpha_pattern": {"q_proj": 3}},
        {"target_modules": ["o_proj"], "use_dora": True},
    ],
    "qwen2": [{"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"], "r": 16}],
    "gpt_neox": [{"target_modules": ["query_key_value", "dense_4h_to_h"]}, {"target_modules": "all-linear"}],
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    root = tmp_path_factory.mktemp("bases")
    settings = settings_in(root)
    paths = {name: make_base(root / name, name) for name in SHAPES}

    def load(name="llama", **quantization):
        return load_base(resolved(paths[name]), QuantizationSpec(**quantization), settings, device="cpu")

    return load


@pytest.fixture(scope="module")
def saved(bases, tmp_path_factory):
    directory = tmp_path_factory.mktemp("saved") / "adapter"
    base = bases()
    save_adapter(inject(base.model), "arm-1", directory, base_source="org/tiny", base_revision="a" * 40)
    return directory


@pytest.fixture
def adapter(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "copy")


def edit(directory, **changes):
    path = directory / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def rewrite(directory, change):
    tensors = load_file(directory / WEIGHTS_NAME)
    change(tensors)
    save_file(tensors, directory / WEIGHTS_NAME, metadata={"format": "pt"})


def test_an_adapter_that_was_read_can_be_loaded_again_and_stays_what_was_stored(tmp_path):
    path = make_base(tmp_path / "base", layers=4)

    def load():
        return load_base(resolved(path), QuantizationSpec(), settings_in(tmp_path), device="cpu")

    base = load()
    targets = [name for name in linear_modules(base.model) if not name.endswith("down_proj")]
    inject(base.model, target_modules=targets)
    save_adapter(base.model, "arm-1", tmp_path / "adapter", base_source=None, base_revision=None)
    # As other programs list them. peft shortens a list of more than 20 names in the configuration that it is given.
    edit(tmp_path / "adapter", target_modules=targets)
    stored = read_adapter(tmp_path / "adapter")
    assert stored.parameters == sum(tensor.numel() for tensor in load_file(stored.weights).values())
    other = load()
    for name in ("one", "two"):
        load_adapter(other.model, stored, name)
        assert stored.config.target_modules == set(targets)
    assert torch.equal(logits(other.model), logits(base.model))


@pytest.mark.parametrize(("name", "lora"), [(name, lora) for name, many in SHAPES.items() for lora in many], ids=str)
def test_logits_after_loading_are_those_before_saving(bases, tmp_path, name, lora):
    base = bases(name)
    before = logits(base.model)
    inject(base.model, **lora)
    expected = logits(base.model)
    assert not torch.equal(before, expected)
    save_adapter(base.model, "arm-1", tmp_path / "a", base_source="x", base_revision="y", base_path=base.path)
    other = bases(name)
    load_adapter(other.model, tmp_path / "a", "another-name")
    assert torch.equal(logits(other.model), expected)


def test_peft_itself_reads_what_is_written(bases, adapter):
    from peft import PeftModel

    expected = bases()
    load_adapter(expected.model, adapter, "x")
    model = PeftModel.from_pretrained(bases().model, adapter)
    assert torch.equal(logits(model), logits(expected.model))


def test_a_peft_model_is_saved_and_loaded_like_an_injected_one(bases, tmp_path):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(bases().model, LoraConfig(r=2, target_modules=["q_proj"]))
    with torch.no_grad():
        for tensor in adapter_tensors(model, "default").values():
            tensor.normal_()
    save_adapter(model, "default", tmp_path / "a", base_source="x", base_revision=None)
    load_adapter(model, tmp_path / "a", "second")
    model.set_adapter("default")
    expected = logits(model)
    model.set_adapter("second")
    assert torch.equal(logits(model), expected)


def test_the_same_weights_give_the_same_bytes(bases, adapter, tmp_path):
    model = bases().model
    load_adapter(model, adapter, "x")
    save_adapter(model, "x", tmp_path / "again", base_source="org/tiny", base_revision="a" * 40)
    for name in (WEIGHTS_NAME, "adapter_config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (adapter / name).read_bytes()


def test_the_files_name_the_base_and_its_revision(adapter):
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("org/tiny", "a" * 40)
    assert config["task_type"] == "CAUSAL_LM"
    assert sorted(path.name for path in adapter.iterdir()) == ["adapter_config.json", WEIGHTS_NAME]


def test_saving_and_loading_ask_no_network(bases, tmp_path, monkeypatch):
    import socket

    def refuse(*_, **__):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    base = bases()
    # peft would look this name up on the hub to find out whether the vocabulary was changed.
    base.model.name_or_path = base.model.config._name_or_path = "org/tiny"
    save_adapter(inject(base.model), "arm-1", tmp_path / "a", base_source="org/tiny", base_revision=None)
    load_adapter(bases().model, tmp_path / "a", "x")


def test_each_adapter_of_a_model_is_saved_for_itself(bases, adapter, tmp_path):
    model = bases().model
    load_adapter(model, adapter, "one")
    load_adapter(model, adapter, "two")
    with torch.no_grad():
        for tensor in adapter_tensors(model, "two").values():
            tensor.mul_(2)
    for name in ("one", "two"):
        save_adapter(model, name, tmp_path / name, base_source=None, base_revision=None)
    one, two = (load_file(tmp_path / name / WEIGHTS_NAME) for name in ("one", "two"))
    assert one.keys() == two.keys()
    assert all(torch.equal(2 * one[name], two[name]) for name in one)


def test_loading_leaves_neighbours_trainable_and_the_random_numbers_alone(bases, adapter):
    model = inject(bases().model, "arm-1")
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert any(before.values())
    state = torch.get_rng_state()
    load_adapter(model, adapter, "second")
    assert torch.equal(torch.get_rng_state(), state)
    after = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert {name: after[name] for name in before} == before
    assert not any(value for name, value in after.items() if name not in before)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("base", ["float32", "bfloat16"])
def test_an_adapter_keeps_the_dtype_it_was_stored_in(bases, adapter, base, stored):
    rewrite(adapter, lambda tensors: tensors.update({k: v.to(stored) for k, v in tensors.items()}))
    model = bases(bnb_4bit_compute_dtype=base).model
    load_adapter(model, adapter, "x")
    tensors = load_file(adapter / WEIGHTS_NAME)
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in adapter_tensors(model, "x").items())
    assert {tensor.dtype for tensor in adapter_tensors(model, "x").values()} == {stored}
    assert torch.isfinite(logits(model)).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.pop("base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"),
            "missing: .*layers.1.*lora_B",
        ),
        (lambda t: t.update({"base_model.model.model.norm.weight": torch.zeros(2)}), "surplus: .*norm"),
        (
            lambda t: t.update({"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": torch.zeros(4, 63)}),
            r"shape \(4, 63\), the model needs \(4, 64\)",
        ),
        (
            lambda t: t.update({k: v.to(torch.int8) for k, v in t.items()}),
            "dtype torch.int8 is not floating point",
        ),
    ],
    ids=["missing", "surplus", "shape", "dtype"],
)
def test_other_tensors_than_the_configuration_asks_for_are_refused_before_the_model_is_touched(
    bases, adapter, change, message
):
    rewrite(adapter, change)
    model = bases().model
    modules = [name for name, _ in model.named_modules()]
    with pytest.raises(AdapterIntegrityError, match=message):
        load_adapter(model, adapter, "x")
    assert [name for name, _ in model.named_modules()] == modules
    assert not hasattr(model, "peft_config")


def test_another_rank_in_the_configuration_is_refused(bases, adapter):
    edit(adapter, r=8)
    with pytest.raises(AdapterIntegrityError, match=r"shape \(4, 64\), the model needs \(8, 64\)"):
        load_adapter(bases().model, adapter, "x")


def test_another_architecture_is_refused(bases, adapter):
    with pytest.raises(BaseMismatchError, match=r"does not fit GPTNeoXForCausalLM"):
        load_adapter(bases("gpt_neox").model, adapter, "x")


@pytest.mark.parametrize("name", ["adapter_model.bin", "training_args.bin", "optimizer.pt", "x.pkl"])
def test_a_pickled_file_is_refused(bases, adapter, name):
    (adapter / name).write_bytes(b"x")
    with pytest.raises(AdapterIntegrityError, match=r"pickled files"):
        load_adapter(bases().model, adapter, "x")


def test_a_pickled_file_in_place_of_safetensors_is_refused(adapter):
    (adapter / WEIGHTS_NAME).rename(adapter / "adapter_model.bin")
    with pytest.raises(AdapterIntegrityError, match=r"pickled files \(adapter_model\.bin\)"):
        read_adapter(adapter)


def test_missing_weights_are_refused(adapter):
    (adapter / WEIGHTS_NAME).unlink()
    with pytest.raises(AdapterIntegrityError, match=rf"but no {WEIGHTS_NAME}"):
        read_adapter(adapter)


@pytest.mark.parametrize("keep", [0, 7, 100, -1])
def test_truncated_weights_are_refused(adapter, keep):
    content = (adapter / WEIGHTS_NAME).read_bytes()
    (adapter / WEIGHTS_NAME).write_bytes(content[:keep])
    with pytest.raises(AdapterIntegrityError, match="is not a readable safetensors file"):
        read_adapter(adapter)


def test_a_flipped_byte_is_refused_where_there_is_a_manifest(adapter):
    write_manifest(adapter)
    read_adapter(adapter)
    for name in (WEIGHTS_NAME, "adapter_config.json"):
        content = (adapter / name).read_bytes()
        for position in (0, 9, len(content) // 2, len(content) - 1):
            broken = bytearray(content)
            broken[position] ^= 4
            (adapter / name).write_bytes(broken)
            with pytest.raises(AdapterIntegrityError, match=f"{name}: sha256"):
                read_adapter(adapter)
        (adapter / name).write_bytes(content)


@pytest.mark.parametrize("name", ["", "a.b"])
def test_a_name_that_peft_refuses_is_refused(bases, adapter, name):
    with pytest.raises(ConfigError, match="must not be empty or contain a dot"):
        load_adapter(bases().model, adapter, name)


def test_a_name_twice_is_refused(bases, adapter):
    model = bases().model
    load_adapter(model, adapter, "x")
    with pytest.raises(ConfigError, match="already has an adapter 'x'"):
        load_adapter(model, adapter, "x")


def test_an_adapter_that_the_model_does_not_have_cannot_be_saved(bases, tmp_path):
    with pytest.raises(ConfigError, match=r"has no adapter 'x'; it has \[\]"):
        save_adapter(bases().model, "x", tmp_path, base_source=None, base_revision=None)


def test_a_resized_embedding_is_refused_unless_its_rows_are_stored(bases, tmp_path):
    base = bases()
    base.model.resize_token_embeddings(325)
    inject(base.model)
    with pytest.raises(
        BaseMismatchError, match=r"has 325 rows, but its base .* has 320\. .* \(5 of them, starting at 320\)"
    ):
        save_adapter(base.model, "arm-1", tmp_path, base_source=None, base_revision=None, base_path=base.path)
    assert list(tmp_path.iterdir()) == []


def test_stored_rows_of_new_tokens_within_the_embedding_come_back(bases, tmp_path):
    base = bases()
    inject(base.model, trainable_token_indices=[310, 311])
    expected = logits(base.model)
    save_adapter(base.model, "arm-1", tmp_path, base_source=None, base_revision=None, base_path=base.path)
    assert any("trainable_tokens" in name for name in load_file(tmp_path / WEIGHTS_NAME))
    other = bases()
    load_adapter(other.model, tmp_path, "x")
    assert torch.equal(logits(other.model), expected)


def test_adapters_with_rows_for_tokens_and_without_do_not_lie_over_one_base(bases, saved, tmp_path):
    base = bases()
    inject(base.model, trainable_token_indices=[310, 311])
    save_adapter(base.model, "arm-1", tmp_path, base_source=None, base_revision=None, base_path=base.path)
    for first, second in ((saved, tmp_path), (tmp_path, saved)):
        model = bases().model
        load_adapter(model, first, "x")
        with pytest.raises(ConfigError, match=r"cannot be combined with this model.s other adapters"):
            load_adapter(model, second, "y")
        assert set(model.peft_config) == {"x"}


def test_stored_rows_beyond_the_embedding_are_refused(bases, tmp_path):
    base = bases()
    base.model.resize_token_embeddings(322)
    indices = {"embed_tokens": [320, 321], "lm_head": [320, 321]}
    inject(base.model, trainable_token_indices=indices)
    save_adapter(base.model, "arm-1", tmp_path, base_source=None, base_revision=None, base_path=base.path)
    with pytest.raises(BaseMismatchError, match=r"rows for tokens \[320, 321\], but the base's embedding has 320 rows"):
        load_adapter(bases().model, tmp_path, "x")


def test_attaching_an_adapter_begins_nothing_on_gpus(bases, saved, monkeypatch):
    """Each context takes hundreds of MB, on GPUs that others work on."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device=None: pytest.fail(f"a context begins on {device}"))
    state = torch.get_rng_state()
    load_adapter(bases().model, saved, "attached")
    assert torch.equal(torch.get_rng_state(), state)

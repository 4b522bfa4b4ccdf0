"""Multimodal wrappers: the text model is loaded and adapted, towers only where targets name them."""

import copy

import pytest
import torch
from helpers.architectures import COMMON, WRAPPERS, make_architecture
from helpers.bases import resolved, settings_in
from helpers.matrix import Subject, peft_loop, predict, register
from helpers.packs import ROWS, make_arm, read_weights
from peft import PeftModel
from transformers import AutoModelForImageTextToText

import rankwise.flavor as flavor
from rankwise.exceptions import ConfigError
from rankwise.experiment.module_names import in_tower
from rankwise.experiment.schema import QuantizationSpec
from rankwise.modeling.adapter import load_adapter
from rankwise.modeling.base import load_base, skeleton
from rankwise.modeling.estimate import Estimator, match_targets
from rankwise.modeling.lora.packed import adapter_parameters, create_adapter, uninstall
from rankwise.modeling.wrappers import has_towers
from rankwise.training.arm import ArmTask
from rankwise.training.loop import train_pack

PLAIN = QuantizationSpec(load_in_4bit=False, bnb_4bit_compute_dtype="float32")
TOWER = "vision_tower.encoder.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    root = tmp_path_factory.mktemp("wrappers")
    return {name: make_architecture(root / name, name) for name in WRAPPERS}


@pytest.mark.parametrize("name", WRAPPERS)
def test_the_text_model_is_loaded_without_its_towers(paths, tmp_path, name):
    base = load_base(resolved(paths[name]), PLAIN, settings_in(tmp_path), device="cpu")
    assert not has_towers(base.model)
    assert not base.towers
    assert torch.isfinite(logits_of(base.model)).all()
    if name not in {"gemma3n", "llama4"}:
        whole = AutoModelForImageTextToText.from_pretrained(paths[name], dtype=torch.float32).eval()
        assert has_towers(whole)
        assert torch.equal(logits_of(base.model), logits_of(whole))
        assert base.memory_bytes < sum(parameter.numel() * 4 for parameter in whole.parameters())


def logits_of(model):
    with torch.no_grad():
        return model(input_ids=torch.arange(4, 28).reshape(2, 12), use_cache=False).logits


@pytest.mark.parametrize("name", WRAPPERS)
@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], "all-linear"])
def test_names_mean_the_text_model(paths, tmp_path, name, targets):
    base = load_base(resolved(paths[name]), PLAIN, settings_in(tmp_path), device="cpu")
    arm = make_arm(lora={"target_modules": targets})
    create_adapter(base.model, arm)
    adapted = {
        key.removeprefix("base_model.model.").partition(".lora_")[0]
        for key in adapter_parameters(base.model, arm.adapter_name)
    }
    planned = match_targets(Estimator(paths[name]).linear, arm.lora.target_modules)
    assert adapted == set(planned)
    layers = int(base.model.config.get_text_config().num_hidden_layers)
    assert len(adapted) == 2 * layers if targets != "all-linear" else len(adapted) > 2 * layers
    assert not any(map(in_tower, adapted))


def test_an_adapter_fits_the_whole_wrapper_in_plain_peft(paths, tmp_path):
    settings = settings_in(tmp_path)
    arm = make_arm(quantization={"load_in_4bit": False}, training={"learning_rate": 3e-2})
    for name in ("gemma3", "mistral3", "qwen2_5_vl"):
        base = load_base(resolved(paths[name], "./base"), arm.quantization, settings, device="cpu")
        (outcome,) = train_pack(base, [ArmTask(spec=arm, train=ROWS)], directory=tmp_path / name).values()
        assert outcome.adapter is not None
        whole = AutoModelForImageTextToText.from_pretrained(paths[name], dtype=torch.float32).eval()
        bare = logits_of(whole)
        adapted = PeftModel.from_pretrained(whole, outcome.adapter).eval()
        assert not [key for key, _ in adapted.named_parameters() if "lora_" in key and in_tower(key)]
        uninstall(base.model)
        load_adapter(base.model, outcome.adapter, "trained")
        assert (logits_of(adapted) - logits_of(base.model)).abs().max() < 1e-4
        assert (logits_of(adapted) - bare).abs().max() > 1e-2


@pytest.fixture
def with_tower(tmp_path):
    """A Gemma 3 whose arms adapt one layer of the vision tower, too."""
    torch.set_num_threads(1)
    architecture = copy.copy(WRAPPERS["gemma3"])
    object.__setattr__(architecture, "targets", ("q_proj", TOWER))
    return Subject("gemma3", tmp_path, architecture)


def test_explicit_names_reach_the_towers(with_tower):
    arm = with_tower.arms[0]
    assert arm.towers
    assert arm.pack_key != make_arm(seed=arm.seed, lora=arm.lora.model_dump() | {"target_modules": ["q_proj"]}).pack_key
    base = load_base(resolved(with_tower.path), arm.quantization, with_tower.settings, device="cpu", towers=True)
    assert has_towers(base.model)
    create_adapter(base.model, arm)
    names = {key.partition(".lora_")[0] for key in adapter_parameters(base.model, arm.adapter_name)}
    assert [name for name in names if in_tower(name)] == [f"base_model.model.model.{TOWER}"]
    assert len(names) == 1 + COMMON["num_hidden_layers"]
    planned = match_targets(Estimator(with_tower.path, towers=True).linear, arm.lora.target_modules)
    assert {f"base_model.model.{name}" for name in planned} == names


def test_such_an_adapter_is_stored_and_loaded_with_its_towers(with_tower, tmp_path):
    arm = with_tower.arms[0]
    base = load_base(
        resolved(with_tower.path, "./base"), arm.quantization, with_tower.settings, device="cpu", towers=True
    )
    tasks = [ArmTask(spec=arm, train=with_tower.rows[0])]
    (outcome,) = train_pack(base, tasks, directory=tmp_path / "run").values()
    assert any(map(in_tower, read_weights(outcome.adapter)))
    uninstall(base.model)
    load_adapter(base.model, outcome.adapter, "trained")
    flavor.save_model(base.model, tmp_path / "saved", base.tokenizer, base=base, settings=with_tower.settings)
    loaded = flavor.load_model(
        tmp_path / "saved", base_model=with_tower.path, device="cpu", settings=with_tower.settings
    )
    assert loaded.metadata.base.towers
    assert has_towers(loaded.model)
    assert torch.equal(logits_of(loaded.model), logits_of(base.model))


def test_a_name_that_only_a_tower_has_is_refused_with_what_there_is(paths):
    with pytest.raises(ConfigError, match=r"no linear layer 'fc1'.*It has down_proj"):
        match_targets(Estimator(paths["gemma3"], towers=True).linear, ("fc1",))


def test_gemma_3n_can_be_planned_without_the_package_of_its_towers(paths):
    assert type(skeleton(Estimator(paths["gemma3n"])._config)).__name__ == "Gemma3nForCausalLM"
    with pytest.raises(ConfigError, match="timm"):
        Estimator(paths["gemma3n"], towers=True)


@pytest.mark.parametrize("name", ["gemma3", "qwen2_5_vl", "gemma3n"])
def test_wrappers_train_answer_and_reload(name, tmp_path):
    torch.set_num_threads(1)
    subject = Subject(name, tmp_path)
    peft_loop(subject)
    predict(subject)
    register(subject)

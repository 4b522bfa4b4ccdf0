"""Bases whose files are in 4 or 8 bit already, as published under names like `*-bnb-4bit`."""

import json
import shutil

import pytest
import torch
from helpers.bases import inject, logits, resolved, settings_in
from helpers.packs import ROWS, make_arm
from helpers.tiny import make_base
from helpers.weights import differing
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

import rankwise.flavor as flavor
from rankwise.exceptions import BaseMismatchError, ConfigError
from rankwise.experiment.schema import NAMED_QUANTIZATIONS, QuantizationSpec
from rankwise.flavor.export import export_merged
from rankwise.modeling.base import load_base
from rankwise.modeling.estimate import Estimator
from rankwise.modeling.fingerprint import fingerprint_base
from rankwise.training.arm import ArmTask
from rankwise.training.loop import train_pack

STORED = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "nf4-single": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": True},
    "int8": {"load_in_8bit": True},
}


def quantized(base, target, **settings):
    """Quantize a base as other tools do, and save it."""
    if settings.get("load_in_4bit"):
        settings.setdefault("bnb_4bit_compute_dtype", torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.bfloat16, quantization_config=BitsAndBytesConfig(**settings), device_map="cpu"
    )
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(base).save_pretrained(target)
    return target


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    root = tmp_path_factory.mktemp("checkpoints")
    full = make_base(root / "full")
    return {"full": full, **{name: quantized(full, root / name, **how) for name, how in STORED.items()}}


@pytest.mark.parametrize("name", STORED)
def test_a_quantized_checkpoint_is_loaded_as_it_is(paths, tmp_path, name):
    spec = NAMED_QUANTIZATIONS[name].model_copy(update={"bnb_4bit_compute_dtype": "bfloat16"})
    base = load_base(resolved(paths[name]), spec, settings_in(tmp_path), device="cpu")
    plain = AutoModelForCausalLM.from_pretrained(paths[name], device_map="cpu").eval()
    assert base.prequantized
    assert not base.from_cache
    assert not (tmp_path / "cache" / "quantized").exists()
    assert differing(base.model, plain) == []
    assert base.fingerprint == fingerprint_base(paths[name], settings_in(tmp_path))


def test_its_identity_is_a_hash_of_its_quantized_bytes(paths, tmp_path):
    settings = settings_in(tmp_path)
    weights = {name: fingerprint_base(path, settings).weights for name, path in paths.items()}
    assert len(set(weights.values())) == len(weights)
    changed = shutil.copytree(paths["nf4"], tmp_path / "changed")
    content = bytearray((changed / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (changed / "model.safetensors").write_bytes(content)
    assert fingerprint_base(changed, settings).weights != weights["nf4"]


@pytest.mark.parametrize(
    ("stored", "requested", "message"),
    [
        (
            "nf4",
            "none",
            "in 4 bit nf4 with double .* requests no quantization. Leave quantization out, or use the full",
        ),
        ("nf4-single", "nf4", r"Set quantization: {bnb_4bit_use_double_quant: false}, or use"),
        ("fp4", "nf4", r"Set quantization: {bnb_4bit_quant_type: fp4}, or use"),
        ("int8", "nf4", r"in 8 bit.*Set quantization: {load_in_4bit: false, load_in_8bit: true}, or use"),
    ],
)
def test_another_quantization_is_refused_with_the_settings_to_use(paths, tmp_path, stored, requested, message):
    with pytest.raises(ConfigError, match=message):
        load_base(resolved(paths[stored]), NAMED_QUANTIZATIONS[requested], settings_in(tmp_path), device="cpu")
    with pytest.raises(ConfigError, match=message):
        Estimator(paths[stored]).check_quantization(NAMED_QUANTIZATIONS[requested], "org/base")


def test_the_compute_dtype_is_that_of_this_machine(paths, tmp_path):
    for dtype in (torch.float32, torch.bfloat16):
        spec = QuantizationSpec(bnb_4bit_compute_dtype=str(dtype).removeprefix("torch."))
        base = load_base(resolved(paths["nf4"]), spec, settings_in(tmp_path), device="cpu")
        assert logits(base.model).dtype is dtype
        assert base.model.model.layers[0].self_attn.q_proj.compute_dtype is dtype


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_adapter_over_it_is_recorded_truthfully_and_reloads_with_difference_0(paths, tmp_path, dtype):
    settings = settings_in(tmp_path)
    spec = QuantizationSpec(bnb_4bit_compute_dtype=dtype)
    base = load_base(resolved(paths["nf4"], str(paths["nf4"])), spec, settings, device="cpu")
    inject(base.model, "arm-1")
    flavor.save_model(base.model, tmp_path / "saved", base.tokenizer, base=base, settings=settings)
    loaded = flavor.load_model(tmp_path / "saved", base_model=paths["nf4"], device="cpu", settings=settings)
    facts = loaded.metadata.base
    assert facts.quantization.effective() == NAMED_QUANTIZATIONS["nf4"].effective()
    assert facts.fingerprint == base.fingerprint
    assert torch.equal(logits(loaded.model), logits(base.model))
    assert loaded.overrides == ()
    with pytest.raises(BaseMismatchError, match="weights"):
        flavor.load_model(tmp_path / "saved", base_model=paths["full"], device="cpu", settings=settings)


def test_a_peft_model_over_it_is_logged_truthfully(paths, tmp_path):
    settings = settings_in(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(paths["nf4"], dtype=torch.float32, device_map="cpu")
    model = get_peft_model(plain, LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)).eval()
    tokenizer = AutoTokenizer.from_pretrained(paths["nf4"])
    flavor.save_model(model, tmp_path / "saved", tokenizer, settings=settings)
    loaded = flavor.load_model(tmp_path / "saved", device="cpu", settings=settings)
    facts = loaded.metadata.base
    assert facts.quantization.effective() == NAMED_QUANTIZATIONS["nf4"].effective()
    # transformers ignores the requested dtype and keeps that of the files.
    assert (facts.compute_dtype, facts.load_dtype, facts.module_dtype) == ("bfloat16", "bfloat16", "bfloat16")
    assert torch.equal(logits(loaded.model), logits(model))


def test_arms_are_trained_over_it(paths, tmp_path):
    arm = make_arm()
    base = load_base(resolved(paths["nf4"], "./base"), arm.quantization, settings_in(tmp_path), device="cpu")
    (outcome,) = train_pack(base, [ArmTask(spec=arm, train=ROWS)], directory=tmp_path / "run").values()
    assert outcome.status == "finished"


def test_an_adapter_over_it_is_merged_into_its_dequantized_weights_only(paths, tmp_path):
    settings = settings_in(tmp_path)
    base = load_base(resolved(paths["nf4"], str(paths["nf4"])), QuantizationSpec(), settings, device="cpu")
    inject(base.model, "arm-1")
    flavor.save_model(base.model, tmp_path / "saved", base.tokenizer, base=base, settings=settings)
    arguments = {"base_model": paths["nf4"], "device": "cpu", "settings": settings, "max_new_tokens": 4}
    export = export_merged(tmp_path / "saved", tmp_path / "merged", dtype="float32", **arguments)
    assert export.into == "nf4-dequantized"
    assert export.agreement.max_logit_difference < 1e-3
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    with pytest.raises(ConfigError, match="no 16-bit base to merge into; merge into nf4-dequantized"):
        export_merged(tmp_path / "saved", tmp_path / "other", into="16bit", **arguments)


def test_checkpoints_of_other_libraries_are_refused(paths, tmp_path):
    base = shutil.copytree(paths["full"], tmp_path / "gptq")
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (base / "config.json").write_text(json.dumps(config))
    for spec in (QuantizationSpec(), QuantizationSpec(load_in_4bit=False)):
        with pytest.raises(ConfigError, match=r"already quantized \(method gptq\); rankwise loads full precision"):
            load_base(resolved(base), spec, settings_in(tmp_path), device="cpu")

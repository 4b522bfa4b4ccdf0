"""The logits before logging and after loading by alias in another process: difference 0."""

from __future__ import annotations

import mlflow
import pytest
import torch
from helpers.bases import inject, logits
from helpers.local_store import prepared_home
from helpers.new_process import load_elsewhere, set_champion
from helpers.tiny import make_base

import rankwise.flavor as flavor
from rankwise.assets.base import resolve_base
from rankwise.experiment.schema import QuantizationSpec
from rankwise.modeling.base import load_base

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
CASES = {
    "llama-r4-attention": ("llama", {}, {"r": 4, "target_modules": ATTENTION}),
    "llama-r16-all-linear": ("llama", {}, {"r": 16, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}),
    "llama-r8-rslora": ("llama", {}, {"r": 8, "lora_alpha": 32, "use_rslora": True, "target_modules": ["q_proj"]}),
    "llama-r4-patterns": (
        "llama",
        {},
        {"r": 4, "target_modules": ATTENTION, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}},
    ),
    "llama-fp4-single": (
        "llama",
        {"bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": False},
        {"r": 2, "target_modules": ["down_proj"]},
    ),
    "llama-bfloat16": ("llama", {"bnb_4bit_compute_dtype": "bfloat16"}, {"r": 4, "target_modules": ATTENTION}),
    "llama-plain": ("llama", {"load_in_4bit": False}, {"r": 4, "target_modules": ATTENTION}),
    "llama-token-rows": (
        "llama",
        {},
        {"r": 4, "target_modules": ["q_proj"], "trainable_token_indices": [300, 301]},
    ),
    "llama-resized": (
        "llama",
        {},
        {
            "r": 4,
            "target_modules": ["q_proj"],
            "trainable_token_indices": {"embed_tokens": [7, 320, 321], "lm_head": [320, 321]},
        },
    ),
    "qwen2-r4": ("qwen2", {}, {"r": 4, "target_modules": ["q_proj", "v_proj", "gate_proj"]}),
    "gpt_neox-r4": ("gpt_neox", {}, {"r": 4, "target_modules": ["query_key_value", "dense_4h_to_h"]}),
}


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def settings(tmp_path):
    before = mlflow.get_tracking_uri()
    settings = prepared_home(tmp_path / "home")
    mlflow.set_tracking_uri(settings.tracking_uri)
    yield settings
    mlflow.set_tracking_uri(before)


def test_logits_are_the_same_to_the_bit_in_a_new_process(settings, tmp_path):
    wanted = {}
    for name, (architecture, quantization, lora) in CASES.items():
        path = tmp_path / "bases" / architecture
        if not path.exists():
            make_base(path, architecture)
        base = load_base(
            resolve_base(str(path), None, settings), QuantizationSpec(**quantization), settings, device="cpu"
        )
        if name == "llama-resized":
            base.model.resize_token_embeddings(322, mean_resizing=False)
        bare = logits(base.model)
        inject(base.model, "x", seed=len(wanted), **lora)
        base.tokenizer.chat_template = f"{name}: {{{{ messages[0]['content'] }}}}"
        base.tokenizer.add_special_tokens({"additional_special_tokens": ["<|price|>"]})
        set_champion(name, flavor.log_model(base.model, base.tokenizer, base=base, registered_model_name=name))
        wanted[name] = logits(base.model)
        assert not torch.equal(bare, wanted[name])
    found = load_elsewhere(settings, wanted, tmp_path)
    assert {name: entry["difference"] for name, entry in found.items()} == dict.fromkeys(CASES, 0.0)
    assert {name: entry["overrides"] for name, entry in found.items()} == {name: [] for name in CASES}
    assert all(entry["template"].startswith(f"{name}: ") for name, entry in found.items())
    assert len({tuple(entry["tokens"]) for entry in found.values()}) == 1
    assert found["llama-bfloat16"]["dtype"] == "torch.bfloat16"


def test_scripts_that_know_nothing_of_rankwise_s_loader_round_trip_too(settings, tmp_path):
    """Usual ways to prepare a QLoRA model: `prepare_model_for_kbit_training`, a resized embedding, and more."""
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    path = make_base(tmp_path / "bases" / "mine", seed=7)
    ways = {
        "kbit": (torch.bfloat16, torch.bfloat16, True),
        "kbit-compute-fp32": (torch.bfloat16, torch.float32, True),
        "default-compute": (torch.bfloat16, torch.float32, False),
        "resized": (torch.bfloat16, torch.float32, False),
        "all-bf16": (torch.bfloat16, torch.bfloat16, False),
    }
    wanted = {}
    for name, (dtype, compute, prepare) in ways.items():
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, quantization_config=config)
        if prepare:
            model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
        tokenizer, rows = AutoTokenizer.from_pretrained(path), None
        if name == "resized":
            model.resize_token_embeddings(322, mean_resizing=False)
            rows = {"embed_tokens": [320, 321], "lm_head": [320, 321]}
        lora = LoraConfig(r=4, target_modules=ATTENTION, task_type="CAUSAL_LM", trainable_token_indices=rows)
        model = get_peft_model(model, lora)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if "lora_B" in key or "tokens_delta" in key:
                    parameter.normal_(std=0.1)
        model.eval()
        with mlflow.start_run():
            info = flavor.log_model(model, tokenizer, registered_model_name=name)
        set_champion(name, info)
        wanted[name] = logits(model).contiguous()
    found = load_elsewhere(settings, wanted, tmp_path)
    assert {name: (entry["difference"], entry["overrides"]) for name, entry in found.items()} == {
        name: (0.0, []) for name in ways
    }


def test_a_base_out_of_a_hub_cache_is_recorded_and_found_by_its_commit(settings, tmp_path, monkeypatch):
    """The cache as huggingface_hub lays it out; `main` has moved on to another commit since."""
    from huggingface_hub import constants
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    commit, newer = "a1" * 20, "b2" * 20
    repository = tmp_path / "hub" / "models--org--tiny"
    for seed, name in enumerate((commit, newer)):
        make_base(repository / "snapshots" / name, seed=seed)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(newer)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    model = AutoModelForCausalLM.from_pretrained(
        "org/tiny",
        revision=commit,
        cache_dir=tmp_path / "hub",
        local_files_only=True,
        dtype=torch.float32,
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
        ),
    )
    model = get_peft_model(model, LoraConfig(r=4, target_modules=ATTENTION, init_lora_weights=False)).eval()
    tokenizer = AutoTokenizer.from_pretrained(
        "org/tiny", revision=commit, cache_dir=tmp_path / "hub", local_files_only=True
    )
    info = flavor.log_model(model, tokenizer, registered_model_name="of-the-hub", settings=settings)
    set_champion("of-the-hub", info)
    tags = mlflow.MlflowClient().get_model_version("of-the-hub", "1").tags
    assert (tags["base.model"], tags["base.revision"]) == ("org/tiny", commit)
    wanted = {"of-the-hub": logits(model).contiguous()}
    found = load_elsewhere(settings, wanted, tmp_path, HF_HUB_CACHE=str(tmp_path / "hub"))
    assert (found["of-the-hub"]["difference"], found["of-the-hub"]["overrides"]) == (0.0, [])

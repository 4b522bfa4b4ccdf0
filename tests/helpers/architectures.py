"""Tiny random models of many architectures: the configurations of the architecture matrix."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from helpers.tiny import make_tokenizer

COMMON = {
    "vocab_size": 320,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 128,
    "max_position_embeddings": 512,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
LOCAL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
ROUTED_EXPERTS = {**EXPERTS, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
LATENT = {
    "q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16,
    "num_key_value_heads": 4,
}  # fmt: skip
LINEAR_ATTENTION = {
    "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
}  # fmt: skip
STATE_SPACE = {
    "mamba_n_heads": 4, "mamba_d_head": 32, "mamba_d_state": 16, "mamba_expand": 2, "mamba_n_groups": 1,
    "mamba_chunk_size": 16,
}  # fmt: skip
ATTENTION_ONLY = ("q_proj", "v_proj")
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 16, "factor": 32.0,
    "short_factor": [1.0 + 0.1 * index for index in range(8)], "long_factor": [2.0 + index for index in range(8)],
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A tiny configuration, and the modules that its arms adapt."""

    model_type: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    drop: tuple[str, ...] = ()
    """Common settings that this configuration does not take."""
    targets: tuple[str, ...] | str = ATTENTION_ONLY

    def config(self) -> Any:
        """The configuration."""
        from transformers import AutoConfig

        tokenizer = make_tokenizer()
        common = {key: value for key, value in COMMON.items() if key not in self.drop}
        ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        return AutoConfig.for_model(self.model_type, **{**common, **ids, **self.settings})


def _of(model_type: str, targets: Any = ATTENTION_ONLY, *, drop: tuple[str, ...] = (), **settings: Any) -> Architecture:
    return Architecture(model_type=model_type, targets=targets, drop=drop, settings=settings)


GPT = ("c_attn", "c_proj", "c_fc")
FULL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": _of("llama", FULL),
    "mistral": _of("mistral", sliding_window=8),
    "ministral": _of("ministral"),
    "ministral3": _of("ministral3"),
    "mixtral": _of("mixtral", **LOCAL_EXPERTS),
    "qwen2": _of("qwen2", FULL),
    "qwen2_moe": _of("qwen2_moe", FULL, **EXPERTS, shared_expert_intermediate_size=64),
    "qwen3": _of("qwen3", FULL),
    "qwen3_moe": _of("qwen3_moe", **EXPERTS),
    "qwen3_next": _of("qwen3_next", FULL, **EXPERTS, **LINEAR_ATTENTION, shared_expert_intermediate_size=64,
                      num_hidden_layers=4, layer_types=["linear_attention"] * 3 + ["full_attention"]),
    "qwen3_5_text": _of("qwen3_5_text", **LINEAR_ATTENTION, num_hidden_layers=4,
                        layer_types=["linear_attention"] * 3 + ["full_attention"]),
    "gemma": _of("gemma"),
    "gemma2": _of("gemma2", FULL, sliding_window=8),
    "gemma3_text": _of("gemma3_text", FULL, sliding_window=8),
    "vaultgemma": _of("vaultgemma", sliding_window=8),
    "phi": _of("phi", ("q_proj", "v_proj", "fc1", "fc2")),
    "phi3": _of("phi3", ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")),
    "phi3_longrope": _of("phi3", ("qkv_proj", "o_proj"), rope_parameters=LONGROPE,
                         original_max_position_embeddings=16),
    "phimoe": _of("phimoe", **LOCAL_EXPERTS),
    "phimoe_longrope": _of("phimoe", **LOCAL_EXPERTS, original_max_position_embeddings=16, rope_parameters={
        **LONGROPE, "short_mscale": 1.1, "long_mscale": 1.3}),
    "llama_dynamic": _of("llama", rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
                         max_position_embeddings=16),
    "llama_yarn": _of("llama", rope_parameters={"rope_type": "yarn", "rope_theta": 10000.0, "factor": 8.0,
                                                "original_max_position_embeddings": 16}),
    "llama_llama3": _of("llama", rope_parameters={
        "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16}),
    "minicpm3": _of("minicpm3", ("q_a_proj", "q_b_proj", "kv_b_proj", "o_proj"), **LATENT, drop=("head_dim",)),
    "minicpm3_longrope": _of("minicpm3", ("q_a_proj", "kv_b_proj"), **LATENT, drop=("head_dim",),
                             rope_parameters={**LONGROPE, "short_factor": [1.0, 1.1, 1.2, 1.3],
                                              "long_factor": [2.0, 3.0, 4.0, 5.0]}),
    "deepseek_v2": _of("deepseek_v2", ("q_a_proj", "q_b_proj", "kv_b_proj", "o_proj"), **ROUTED_EXPERTS, **LATENT,
                       topk_method="greedy", n_shared_experts=1, drop=("head_dim",)),
    "deepseek_v3": _of("deepseek_v3", "all-linear", **ROUTED_EXPERTS, **LATENT, n_shared_experts=1,
                       drop=("head_dim",)),
    "gpt2": _of("gpt2", GPT),
    "gpt_bigcode": _of("gpt_bigcode", GPT),
    "gpt_neo": _of("gpt_neo", ("q_proj", "v_proj", "c_fc"), attention_types=[[["global", "local"], 1]],
                   window_size=8),
    "gpt_neox": _of("gpt_neox", ("query_key_value", "dense_4h_to_h")),
    "gpt_oss": _of("gpt_oss", ("q_proj", "k_proj", "v_proj", "o_proj"), **LOCAL_EXPERTS, sliding_window=8),
    "gptj": _of("gptj", ("q_proj", "v_proj", "fc_in"), rotary_dim=8),
    "codegen": _of("codegen", ("qkv_proj", "fc_in"), rotary_dim=8),
    "opt": _of("opt", ("q_proj", "v_proj", "fc1", "fc2"), ffn_dim=128, word_embed_proj_dim=64),
    "bloom": _of("bloom", ("query_key_value", "dense_h_to_4h")),
    "mpt": _of("mpt", ("Wqkv", "out_proj", "up_proj", "down_proj")),
    "falcon": _of("falcon", ("query_key_value", "dense_4h_to_h"), drop=("head_dim", "num_key_value_heads")),
    "falcon_h1": _of("falcon_h1", **STATE_SPACE, mamba_d_ssm=128),
    "falcon_mamba": _of("falcon_mamba", ("in_proj", "x_proj"), state_size=16),
    "mamba": _of("mamba", ("in_proj", "x_proj"), state_size=16),
    "mamba2": _of("mamba2", ("in_proj",), num_heads=8, head_dim=16, expand=2, state_size=16, n_groups=1,
                  chunk_size=16),
    "bamba": _of("bamba", **STATE_SPACE, attn_layer_indices=[1]),
    "jamba": _of("jamba", **EXPERTS, attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2,
                 expert_layer_offset=1, mamba_d_state=16, use_mamba_kernels=False),
    "zamba2": _of("zamba2", ("in_proj", "out_proj"), mamba_d_state=16, n_mamba_heads=8, mamba_headdim=16,
                  mamba_ngroups=1, chunk_size=16, adapter_rank=4, hybrid_layer_ids=[1],
                  layers_block_type=["mamba", "hybrid"], num_mem_blocks=1, drop=("head_dim",)),
    "olmo": _of("olmo"),
    "olmo2": _of("olmo2"),
    "olmo3": _of("olmo3", sliding_window=8),
    "olmoe": _of("olmoe", **EXPERTS),
    "cohere": _of("cohere"),
    "cohere2": _of("cohere2", sliding_window=8),
    "granite": _of("granite", logits_scaling=2.0),
    "granitemoe": _of("granitemoe", **LOCAL_EXPERTS),
    "granitemoeshared": _of("granitemoeshared", ("q_proj", "v_proj", "input_linear"), **LOCAL_EXPERTS,
                            shared_intermediate_size=64),
    "granitemoehybrid": _of("granitemoehybrid", **LOCAL_EXPERTS, **STATE_SPACE, shared_intermediate_size=64,
                            layer_types=["mamba", "attention"]),
    "starcoder2": _of("starcoder2", ("q_proj", "v_proj", "c_fc")),
    "stablelm": _of("stablelm"),
    "glm": _of("glm", partial_rotary_factor=0.5),
    "glm4": _of("glm4", partial_rotary_factor=0.5),
    "glm4_moe": _of("glm4_moe", **ROUTED_EXPERTS),
    "ernie4_5": _of("ernie4_5"),
    "ernie4_5_moe": _of("ernie4_5_moe", moe_num_experts=4, moe_k=2, moe_intermediate_size=32,
                        moe_num_shared_experts=1),
    "exaone4": _of("exaone4", sliding_window=8),
    "hunyuan_v1_dense": _of("hunyuan_v1_dense"),
    "hunyuan_v1_moe": _of("hunyuan_v1_moe", num_experts=4, moe_topk=2),
    "smollm3": _of("smollm3"),
    "seed_oss": _of("seed_oss"),
    "arcee": _of("arcee"),
    "apertus": _of("apertus"),
    "helium": _of("helium"),
    "nemotron": _of("nemotron"),
    "persimmon": _of("persimmon", ("query_key_value", "dense_h_to_4h")),
    "diffllama": _of("diffllama"),
    "bitnet": _of("bitnet"),
    "lfm2": _of("lfm2", ("q_proj", "v_proj", "w1"), layer_types=["conv", "full_attention"]),
    "recurrent_gemma": _of("recurrent_gemma", ("q_proj", "linear_x"), lru_width=64, attention_window_size=8,
                           block_types=["recurrent", "attention"]),
    "minimax": _of("minimax", **LOCAL_EXPERTS, block_size=8),
    "dots1": _of("dots1", **ROUTED_EXPERTS, n_shared_experts=1),
    "llama4_text": _of("llama4_text", **LOCAL_EXPERTS, intermediate_size_mlp=128, attention_chunk_size=32),
    "biogpt": _of("biogpt", ("q_proj", "v_proj", "fc1", "fc2")),
    "xglm": _of("xglm", ("q_proj", "v_proj", "fc1", "fc2"), d_model=64, num_layers=2, attention_heads=4, ffn_dim=128),
}  # fmt: skip

_TEXT = {key: value for key, value in COMMON.items() if key != "head_dim"}
_VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
           "image_size": 28, "patch_size": 14}  # fmt: skip


def _wrapper(model_type: str, text: Mapping[str, Any], vision: Mapping[str, Any], **settings: Any) -> Architecture:
    return Architecture(
        model_type=model_type,
        drop=tuple(COMMON),
        settings={"text_config": dict(text), "vision_config": dict(vision), **settings},
    )


WRAPPERS: Mapping[str, Architecture] = {
    "gemma3": _wrapper("gemma3", {**COMMON, "sliding_window": 8}, _VISION, mm_tokens_per_image=4),
    "mistral3": _wrapper("mistral3", {**COMMON, "model_type": "mistral"}, {**_VISION, "model_type": "pixtral"}),
    "qwen2_5_vl": _wrapper(
        "qwen2_5_vl",
        {**_TEXT, "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}},
        {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 4, "out_hidden_size": 64,
         "patch_size": 14, "fullatt_block_indexes": [1]},
    ),
    "llama4": _wrapper(
        "llama4",
        {**COMMON, **LOCAL_EXPERTS, "intermediate_size_mlp": 128, "attention_chunk_size": 32},
        {**_VISION, "projector_input_dim": 32, "projector_output_dim": 32, "vision_output_dim": 32},
    ),
    "gemma3n": _wrapper(
        "gemma3n",
        {**COMMON, "sliding_window": 8, "num_hidden_layers": 4, "num_kv_shared_layers": 0, "laurel_rank": 4,
         "altup_num_inputs": 2, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 320,
         "layer_types": ["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"],
         "activation_sparsity_pattern": [0.0] * 4, "intermediate_size": [128] * 4},
        {"hidden_size": 32},
    ),
}  # fmt: skip
"""Multimodal wrappers."""


def make_architecture(path: Path, name: str, *, seed: int = 0, architecture: Architecture | None = None) -> Path:
    """Write a random base of an architecture (float32 safetensors and a tokenizer), and return its path."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    from rankwise.modeling.base import quiet_transformers

    wanted = architecture or ARCHITECTURES.get(name) or WRAPPERS[name]
    config = wanted.config()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if name not in WRAPPERS:
            model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
        elif name == "gemma3n":
            # The towers need timm.
            model = AutoModelForCausalLM.from_config(config.text_config, attn_implementation="eager")
        else:
            model = AutoModelForImageTextToText.from_config(config, attn_implementation="eager")
        _spread(model)
    path.mkdir(parents=True, exist_ok=True)
    if name == "gemma3n":
        _save_as_part(model, config, path)
        return path
    with quiet_transformers():
        model.save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return path


def _save_as_part(model: Any, config: Any, path: Path) -> None:
    """Save a text model under the names that it has in its wrapper."""
    from safetensors.torch import save_file

    tied = {"lm_head.weight"} if config.text_config.tie_word_embeddings else set()
    tensors = {
        name.replace("model.", "model.language_model.", 1): tensor.contiguous()
        for name, tensor in model.state_dict().items()
        if name not in tied
    }
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(path)
    make_tokenizer().save_pretrained(path)


def _spread(model: Any) -> None:
    """Draw matrices large enough that logits differ between inputs, as those of a trained model do."""
    import torch

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2 and parameter.is_floating_point() and "conv" not in name and "A_log" not in name:
                parameter.normal_(std=0.5 * parameter.shape[-1] ** -0.5 if parameter.shape[-1] > 1 else 0.2)

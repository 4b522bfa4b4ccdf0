from __future__ import annotations

import pytest

from rankwise.exceptions import ConfigError
from rankwise.experiment.schema import QuantizationSpec
from rankwise.modeling.adapter_config import AdapterConfig
from rankwise.serving.vllm_options import differences, max_rank_for, obstacles, served_dtype, served_quantization

PLAIN = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj"], "bias": "none", "use_dora": False}


@pytest.mark.parametrize(("rank", "bucket"), [(1, 8), (8, 8), (9, 16), (64, 64), (65, 128), (257, 320), (512, 512)])
def test_a_rank_goes_into_the_smallest_bucket_that_holds_it(rank, bucket):
    assert max_rank_for(rank) == bucket


def test_a_rank_above_all_buckets_is_refused():
    with pytest.raises(ConfigError, match="up to rank 512, this one has r = 513"):
        max_rank_for(513)
    assert obstacles(AdapterConfig(**{**PLAIN, "r": 513})) == ["r = 513: vLLM serves up to 512"]


@pytest.mark.parametrize(
    "setting",
    [
        {"use_dora": True}, {"modules_to_save": ["lm_head"]}, {"bias": "all"}, {"lora_bias": True},
        {"rank_pattern": {"q_proj": 4}}, {"alpha_pattern": {"q_proj": 4}}, {"trainable_token_indices": [1]},
        {"target_parameters": ["x"]}, {"fan_in_fan_out": True},
    ],
)  # fmt: skip
def test_what_the_loader_refuses_or_gets_wrong_is_named(setting):
    assert obstacles(AdapterConfig(**PLAIN)) == []
    (found,) = obstacles(AdapterConfig(**{**PLAIN, **setting}))
    assert found.startswith(next(iter(setting))) or found.startswith("a bias")


def test_the_sentence_says_what_is_computed_otherwise():
    nf4 = QuantizationSpec()
    assert differences(nf4, "bfloat16").startswith("vLLM loads the base as in training; ")
    assert "computes in bfloat16 instead of float32" in differences(nf4, "float32")
    assert "instead of fp4 with double quantization" in differences(
        QuantizationSpec(bnb_4bit_quant_type="fp4"), "bfloat16"
    )
    assert "instead of nf4 without double quantization" in differences(
        QuantizationSpec(bnb_4bit_use_double_quant=False), "float16"
    )
    int8 = QuantizationSpec(load_in_4bit=False, load_in_8bit=True)
    assert "loads the base in 16 bit instead of LLM.int8" in differences(int8, "float16")
    assert [served_quantization(spec) for spec in (nf4, int8, QuantizationSpec(load_in_4bit=False))] == [
        "bitsandbytes", "", ""
    ]  # fmt: skip
    assert [served_dtype(dtype) for dtype in ("float32", "bfloat16", "float16")] == ["bfloat16", "bfloat16", "float16"]

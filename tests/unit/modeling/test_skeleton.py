import json
import time

import torch
from helpers.bases import inject, resolved, settings_in
from helpers.tiny import make_base

from rankwise.experiment.schema import QuantizationSpec
from rankwise.modeling.base import linear_modules, load_base, skeleton

LARGE = {"model_type": "llama", "hidden_size": 8192, "num_hidden_layers": 80, "num_attention_heads": 64,
         "num_key_value_heads": 8, "intermediate_size": 28672, "vocab_size": 128256}  # fmt: skip


def test_a_large_model_is_built_without_memory_in_seconds():
    start = time.process_time()
    model = skeleton(LARGE)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert time.process_time() - start < 10


def test_a_quantized_bases_configuration_gives_the_shapes_of_the_unquantized_one(tmp_path):
    path = make_base(tmp_path / "base")
    loaded = load_base(resolved(path), QuantizationSpec(), settings_in(tmp_path), device="cpu")
    assert loaded.model.config.quantization_config is not None
    plain = skeleton(json.loads((path / "config.json").read_text()))
    assert linear_modules(skeleton(loaded.model.config)) == linear_modules(plain)
    assert loaded.model.config.quantization_config is not None


def test_linear_layers_are_the_same_before_and_after_adapters_came(tmp_path):
    path = make_base(tmp_path / "base")
    model = load_base(resolved(path), QuantizationSpec(), settings_in(tmp_path), device="cpu").model
    before = linear_modules(model)
    inject(model)
    assert linear_modules(model) == before == linear_modules(skeleton(model.config))


def test_tied_embeddings_are_counted_once():
    config = {"model_type": "llama", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
              "intermediate_size": 64, "vocab_size": 100}  # fmt: skip
    sizes = [
        sum(parameter.numel() for parameter in skeleton({**config, "tie_word_embeddings": tied}).parameters())
        for tied in (True, False)
    ]
    assert sizes[1] - sizes[0] == 32 * 100


def test_random_numbers_are_left_alone():
    state = torch.get_rng_state()
    skeleton({"model_type": "llama", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2})
    assert torch.equal(torch.get_rng_state(), state)

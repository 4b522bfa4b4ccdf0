"""The random base that the table is made with; a small one of its kind loads on any device."""

from __future__ import annotations

from helpers.bases import resolved, settings_in
from helpers.packs import make_arm
from helpers.random_base import EIGHT_BILLION, Shape, make_random_base

from rankwise.assets.layout import read_header
from rankwise.modeling.base import load_base

SMALL = Shape(hidden_size=64, intermediate_size=128, layers=3, heads=4, key_value_heads=2, vocab_size=320)


def test_the_shape_of_8b_has_as_many_parameters_as_llama_3_1_8b():
    assert EIGHT_BILLION.parameters == 8_030_261_248


def test_a_random_base_is_whole_and_loads_quantized(tmp_path):
    path = make_random_base(tmp_path / "base", SMALL)
    files = sorted(path.glob("*.safetensors"))
    assert len(files) == SMALL.layers + 2
    sizes = [entry.shape for file in files for entry in read_header(file)]
    assert sum(rows * (columns or [1])[0] for rows, *columns in sizes) == SMALL.parameters
    base = load_base(resolved(path), make_arm().quantization, settings_in(tmp_path), device="cpu")
    assert type(base.model.model.layers[0].mlp.up_proj).__name__ == "Linear4bit"
    # A second call keeps what is there.
    before = files[0].stat().st_mtime_ns
    make_random_base(path, SMALL)
    assert files[0].stat().st_mtime_ns == before

"""Draws are pure functions of what they are for."""

import math

import numpy as np
import pytest
import torch

from rankwise.modeling.lora.draws import (
    PATTERNS,
    DropoutKey,
    choose_patterns,
    gather_masks,
    keep_mask,
    keep_share,
    module_word,
    pattern_table,
    table_offset,
    token_words,
    uniform,
)

GOLDEN_UNIFORM = [-0.2338029146194458, 0.1320021152496338, -0.39023351669311523]
GOLDEN_MASK = [1, 0, 1, 1, 1, 1, 0, 1, 1, 1, 1, 0, 0, 0, 0, 0]
KEY = DropoutKey(seed=3, step=7, micro_step=1)


def test_equal_keys_draw_equal_masks():
    assert torch.equal(keep_mask((2, 5, 8), 0.3, KEY, "layer.q"), keep_mask((2, 5, 8), 0.3, KEY, "layer.q"))


@pytest.mark.parametrize(
    ("key", "module"),
    [
        (DropoutKey(seed=4, step=7, micro_step=1), "layer.q"),
        (DropoutKey(seed=3, step=8, micro_step=1), "layer.q"),
        (DropoutKey(seed=3, step=7, micro_step=0), "layer.q"),
        (KEY, "layer.k"),
    ],
)
def test_seed_step_micro_step_and_module_each_change_the_mask(key, module):
    assert not torch.equal(keep_mask((4, 8, 16), 0.5, KEY, "layer.q"), keep_mask((4, 8, 16), 0.5, key, module))


@pytest.mark.parametrize("p", [0.05, 0.1, 0.5, 0.9])
def test_a_mask_keeps_the_share_it_says(p):
    shape = (4, 50, 1000)
    kept = keep_mask(shape, p, KEY, "m").double().mean().item()
    assert keep_share(p) == pytest.approx(1 - p, abs=1 / 512)
    assert kept == pytest.approx(keep_share(p), abs=5 * math.sqrt(p * (1 - p) / math.prod(shape)))


@pytest.mark.parametrize("p", [1e-9, 1 - 1e-9])
def test_extreme_probabilities_neither_vanish_nor_drop_everything(p):
    assert 0.0 < keep_share(p) < 1.0


@pytest.mark.parametrize("p", [1.0, -0.1])
def test_a_probability_outside_of_zero_to_one_is_refused(p):
    with pytest.raises(ValueError, match=r"probability in \(0, 1\)"):
        keep_mask((1, 1, 2), p, KEY, "m")


def test_elements_tokens_and_modules_are_dropped_independently():
    """Correlations of 200 tokens with their neighbours, of features, and of the same tokens in another module."""
    first, second = (keep_mask((4, 50, 1024), 0.5, KEY, module).flatten(0, 1).double() - 0.5 for module in "ab")
    size = math.sqrt(200 * 1024) / 4
    for one, other in (
        (first, second),
        (first[1:], first[:-1]),
        (first[:, 1:], first[:, :-1]),
        (first[50:], first[:-50]),
    ):
        assert abs(float((one * other).sum())) < 5 * size


def test_a_token_has_any_pattern_and_few_share_one():
    words = torch.from_numpy(token_words(KEY, 8, 500))
    chosen = choose_patterns(words, torch.tensor([module_word("a"), module_word("b")]))
    assert chosen.shape == (2, 8, 500)
    assert 0 <= int(chosen.min()) < PATTERNS // 500
    assert PATTERNS - PATTERNS // 500 < int(chosen.max()) < PATTERNS
    # Of 4,000 words 30 pairs meet on average.
    assert len(chosen[0].unique()) > 3900
    assert not torch.equal(chosen[0], chosen[1])


def test_one_gather_serves_arms_of_different_probabilities():
    words = torch.from_numpy(token_words(KEY, 3, 4))
    own = choose_patterns(words, torch.tensor([module_word("m")]))[0]
    offsets = torch.tensor([[table_offset(2)], [table_offset(0)], [table_offset(1)]], dtype=torch.int32)
    mixed = gather_masks(pattern_table((0.5, 0.0, 0.1), torch.device("cpu")), own + offsets, 96)
    assert torch.equal(mixed[0], keep_mask((3, 4, 96), 0.1, KEY, "m")[0])
    assert torch.equal(mixed[1], keep_mask((3, 4, 96), 0.5, KEY, "m")[1])
    assert mixed[2].all()


def test_neither_numpys_nor_torchs_global_generator_is_touched():
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    keep_mask((3, 3, 3), 0.5, KEY, "m")
    uniform((3, 3), 1.0, 0, "m")
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert (np.random.get_state()[1] == numpy_state).all()


def test_uniform_fills_its_range_evenly():
    drawn = uniform((300, 300), 0.25, 0, "m")
    assert drawn.dtype == torch.float32
    assert drawn.abs().max() <= 0.25
    assert drawn.abs().max() > 0.249
    assert drawn.mean().item() == pytest.approx(0.0, abs=0.005)
    assert drawn.std().item() == pytest.approx(0.25 / math.sqrt(3), rel=0.01)


def test_a_lower_rank_starts_with_the_first_rows_of_a_higher_one():
    assert torch.equal(uniform((8, 16), 1.0, 5, "m")[:4], uniform((4, 16), 1.0, 5, "m"))


def test_the_stream_is_the_one_that_earlier_releases_drew():
    """A change of the stream would change every arm's result under the same spec hash."""
    assert uniform((3,), 1.0, 0, "m").tolist() == GOLDEN_UNIFORM
    assert keep_mask((1, 2, 8), 0.5, KEY, "m").flatten().tolist() == GOLDEN_MASK

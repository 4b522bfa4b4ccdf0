"""What may be drawn, against transformers' own warpers."""

from __future__ import annotations

import pytest
import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from rankwise.modeling.decoding.generation import add_gumbel_noise, row_generator


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (5, 1.0), (0, 0.6), (7, 0.8), (100, 0.9)])
def test_the_same_tokens_may_be_drawn_as_in_transformers(top_k, top_p):
    logits = torch.randn(4, 50, generator=row_generator(0)) * 3
    expected = TemperatureLogitsWarper(0.7)(None, logits)
    if top_k:
        expected = TopKLogitsWarper(top_k)(None, expected)
    if top_p < 1:
        expected = TopPLogitsWarper(top_p)(None, expected)
    ours = add_gumbel_noise(logits, [row_generator(row) for row in range(4)], temperature=0.7, top_k=top_k, top_p=top_p)
    assert torch.equal(ours.isinf(), expected.isinf())


def test_draws_follow_the_softmax():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]]).expand(4000, 4)
    rows = [row_generator(row) for row in range(4000)]
    drawn = add_gumbel_noise(logits, rows, temperature=1.0, top_k=3, top_p=1.0).argmax(-1)
    shares = torch.bincount(drawn, minlength=4) / 4000
    expected = torch.tensor([2.0, 1.0, 0.0, float("-inf")]).softmax(-1)
    assert (shares - expected).abs().max() < 0.025

"""The peak of memory."""

import torch

from rankwise.training.memory import PeakMemory


def test_a_peak_that_was_sampled_is_remembered():
    memory = PeakMemory(torch.device("cpu"))
    before = memory.bytes
    block = torch.ones(32 << 20, dtype=torch.uint8)
    memory.sample()
    del block
    memory.sample()
    assert memory.bytes >= before + (24 << 20)

"""The peak of memory."""

import psutil
import torch

from rankwise.training.step import PeakMemory, release_freed_memory


def test_a_peak_that_was_sampled_is_remembered():
    memory = PeakMemory(torch.device("cpu"))
    before = memory.bytes
    block = torch.ones(32 << 20, dtype=torch.uint8)
    memory.sample()
    del block
    memory.sample()
    assert memory.bytes >= before + (24 << 20)


def test_what_is_freed_goes_back_to_the_system():
    pieces = [torch.ones(16 << 10, dtype=torch.uint8) for _ in range(4000)]
    pin = torch.ones(16 << 10, dtype=torch.uint8)
    resident = psutil.Process().memory_info().rss
    del pieces
    release_freed_memory()
    assert psutil.Process().memory_info().rss < resident - (32 << 20)
    assert pin.sum() == 16 << 10

"""The peak of memory."""

import psutil
import torch

from rankwise.training.step import PeakMemory, release_freed_memory


def test_a_peak_that_was_sampled_is_remembered():
    release_freed_memory()  # what is free already would be used without a growth
    memory = PeakMemory(torch.device("cpu"))
    before = memory.bytes
    block = torch.ones(32 << 20, dtype=torch.uint8)
    memory.sample()
    del block
    memory.sample()
    assert memory.bytes >= before + (24 << 20)


def test_a_peak_between_two_samples_counts():
    memory = PeakMemory(torch.device("cpu"))
    before = memory.bytes
    torch.ones(64 << 20, dtype=torch.uint8)
    memory.sample()
    assert memory.bytes >= before + (48 << 20)
    assert PeakMemory(torch.device("cpu")).bytes < memory.bytes - (32 << 20)


def test_without_the_permission_to_reset_the_peak_it_is_sampled(monkeypatch, tmp_path):
    monkeypatch.setattr("rankwise.training.step._CLEAR_REFS", tmp_path / "no" / "file")
    memory = PeakMemory(torch.device("cpu"))
    block = torch.ones(64 << 20, dtype=torch.uint8)
    before = memory.bytes
    memory.sample()
    assert memory.bytes >= before + (48 << 20)
    del block


def test_what_is_freed_goes_back_to_the_system():
    pieces = [torch.ones(16 << 10, dtype=torch.uint8) for _ in range(4000)]
    pin = torch.ones(16 << 10, dtype=torch.uint8)
    resident = psutil.Process().memory_info().rss
    del pieces
    release_freed_memory()
    assert psutil.Process().memory_info().rss < resident - (32 << 20)
    assert pin.sum() == 16 << 10

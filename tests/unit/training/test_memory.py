"""The peak of memory."""

import numpy as np
import psutil
import pytest
import torch

from rankwise.modeling.base import is_out_of_memory
from rankwise.training.step import PeakMemory, give_back


def error_of(call):
    with pytest.raises((RuntimeError, MemoryError)) as caught:
        call()
    return caught.value


def test_running_out_of_memory_is_told_from_other_errors():
    assert is_out_of_memory(error_of(lambda: torch.empty(1 << 50)))
    assert is_out_of_memory(error_of(lambda: np.empty(1 << 50)))
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    text = "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"
    assert is_out_of_memory(RuntimeError(text))
    assert is_out_of_memory(RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"))
    assert is_out_of_memory(RuntimeError("CUDA driver error: out of memory"))
    assert not is_out_of_memory(RuntimeError(text.replace("ALLOC_FAILED", "EXECUTION_FAILED")))
    assert not is_out_of_memory(error_of(lambda: torch.ones(2) @ torch.ones(3)))


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
    give_back()
    assert psutil.Process().memory_info().rss < resident - (32 << 20)
    assert pin.sum() == 16 << 10

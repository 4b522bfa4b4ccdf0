import subprocess
import sys

import numpy as np
import pytest
import torch

from rankwise.exceptions import JobError, is_out_of_memory
from rankwise.tasks.context import failure_of
from rankwise.worker.child import LESS_MEMORY


def raised(call):
    with pytest.raises((RuntimeError, MemoryError)) as caught:
        call()
    return caught.value


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("Allocation on device"),
        RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee documentation"),
        RuntimeError("HIP out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("XPU out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("MPS backend out of memory (MPS allocated: 1.00 GB)"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA driver error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("std::bad_alloc"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes. Error code 12"),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes"),
        RuntimeError("unable to mmap 8 bytes from file <weights>: Cannot allocate memory (12)"),
    ],
    ids=lambda error: f"{type(error).__name__}-{str(error)[:40]}",
)
def test_every_spelling_of_out_of_memory_is_recognized_and_comes_with_advice(error):
    assert is_out_of_memory(error)
    failure = failure_of(error)
    assert failure.text == f"out of memory: {str(error).partition(chr(10))[0]}; {LESS_MEMORY}"
    assert failure.trace is None


def test_what_torch_and_numpy_really_raise_is_recognized():
    assert is_out_of_memory(raised(lambda: torch.empty(1 << 50)))
    assert is_out_of_memory(raised(lambda: np.empty(1 << 50)))


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("shapes differ"),
        RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasCreate(handle)`"),
        ValueError("out of memory"),
        JobError("out of memory with a single row; lower max_new_tokens"),
        raised(lambda: torch.ones(2) @ torch.ones(3)),
    ],
    ids=lambda error: f"{type(error).__name__}-{str(error)[:40]}",
)
def test_other_errors_are_not_out_of_memory(error):
    assert not is_out_of_memory(error)


def test_the_detector_needs_no_torch():
    program = (
        "import sys\n"
        "from rankwise.exceptions import is_out_of_memory\n"
        "assert is_out_of_memory(RuntimeError('HIP out of memory'))\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)

"""The largest memory seen, the end of it, and giving it back."""

from __future__ import annotations

import ctypes

import psutil
import torch

from rankwise.modeling.out_of_memory import is_out_of_memory

__all__ = ["PeakMemory", "give_back", "is_out_of_memory"]


def give_back() -> None:
    """Let the system have what this process has freed on a CPU: glibc keeps it otherwise (750 MiB after a pack)."""
    if (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)


class PeakMemory:
    """Largest memory of this process since the start of the watch.

    On CUDA the allocator knows its peak. On a CPU the kernel's own high-water mark covers the whole life of the
    process, which trains one arm after another; so the resident set is read after each forward and backward pass, where
    it is largest.
    """

    def __init__(self, device: torch.device) -> None:
        """Begin to watch."""
        self._device = device
        self._process = psutil.Process()
        self._peak = 0
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        self.sample()

    def sample(self) -> None:
        """Look at the memory of now."""
        if self._device.type != "cuda":
            self._peak = max(self._peak, self._process.memory_info().rss)

    @property
    def bytes(self) -> int:
        """The largest so far."""
        return torch.cuda.max_memory_allocated(self._device) if self._device.type == "cuda" else self._peak

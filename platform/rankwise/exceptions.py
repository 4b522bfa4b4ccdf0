"""All exceptions of rankwise with their exit codes, and the detection of out-of-memory errors.

A user-fixable error is a `RankwiseError`: the command line prints its message without a traceback and exits with its
`exit_code`. Anything else is a bug. A message says what is wrong, which value, what is allowed and what to do next.
"""

from __future__ import annotations

from typing import ClassVar


class RankwiseError(Exception):
    """Root of the user-fixable errors."""

    exit_code: ClassVar[int] = 1


class ConfigError(RankwiseError, ValueError):
    """Raised when an experiment file, an override or an argument is invalid.

    Args:
        message: All problems, one per line.
        problems: The same problems one by one (`FILE:LINE: key.path: ...` for those of a file).
    """

    exit_code = 2

    def __init__(self, message: str, problems: tuple[str, ...] = ()) -> None:
        super().__init__(message, problems)
        self.message = message
        self.problems = problems or (message,)

    def __str__(self) -> str:
        return self.message


class DatasetError(ConfigError):
    """Raised when rows, columns, the chat template or the loss mask do not match the definition."""


class AssetError(RankwiseError, OSError):
    """Raised when a base or data set cannot be fetched or read, or does not match its pin."""

    exit_code = 3


class StorageError(RankwiseError, OSError):
    """Raised when a file cannot be written: disk full, read-only directory, no permission."""

    exit_code = 3


class BaseMismatchError(RankwiseError, ValueError):
    """Raised when a base is not the one that an adapter was trained on."""


class QuantizationMismatchError(RankwiseError, ValueError):
    """Raised when a base is quantized differently from the one that an adapter was trained on."""


class AdapterIntegrityError(RankwiseError, ValueError):
    """Raised when a file of an adapter has changed since it was stored."""


class AdapterConfigError(ConfigError, AdapterIntegrityError):
    """Raised when an adapter's configuration is invalid, not supported, or does not match its weights."""


class AdapterTargetError(ConfigError, BaseMismatchError):
    """Raised when an adapter's configuration names modules or tokens that the base does not have."""


class TrackingError(RankwiseError, ConnectionError):
    """Raised when the MLflow store is unreachable or refuses."""

    exit_code = 3


class JobError(RankwiseError, RuntimeError):
    """Raised when a job failed, or the queue refuses a request."""


class JobStoreError(JobError):
    """Raised when the queue's database is unreachable, not writable, or has another schema."""

    exit_code = 3


class ClusterError(RankwiseError, RuntimeError):
    """Raised when workers cannot be placed on a Ray cluster, or the cluster cannot be used."""

    exit_code = 3


class GateError(RankwiseError, RuntimeError):
    """Raised when a promotion is refused."""


_OUT_OF_MEMORY_TEXTS = (
    "out of memory",  # CUDA, HIP, XPU and MPS, from torch's allocators and from the drivers.
    "can't allocate memory",  # torch's CPU allocator.
    "cannot allocate memory",  # The text of ENOMEM, for example when torch maps a file.
    "defaultcpuallocator: not enough memory",  # The same allocator without posix_memalign.
    "std::bad_alloc",
    "cublas_status_alloc_failed",  # CUDA's libraries allocate without torch's allocator.
    "cudnn_status_alloc_failed",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of Python or torch says that memory ran out, on a device or on the host.

    Works without torch: its class is recognized by name, a plain `RuntimeError` by its text. Never a `RankwiseError`.
    """
    if isinstance(error, RankwiseError):
        return False
    if isinstance(error, MemoryError):
        return True
    if not isinstance(error, RuntimeError):
        return False
    text = str(error).lower()
    return any(kind.__name__ == "OutOfMemoryError" for kind in type(error).__mro__) or any(
        part in text for part in _OUT_OF_MEMORY_TEXTS
    )

"""The tree of errors.

Every error that a person can mend is a `RankwiseError`; the command line prints its message without a traceback and
exits with its `exit_code`. Anything else is a bug and keeps its traceback. A message says what is wrong, which value,
what is allowed and what to do next.
"""

from __future__ import annotations

from typing import ClassVar


class RankwiseError(Exception):
    """Root of the errors that a person can mend."""

    exit_code: ClassVar[int] = 1


class ConfigError(RankwiseError, ValueError):
    """Raised when an experiment file, an override or an argument is not valid.

    Args:
        message: All problems, one a line.
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
    """Raised when rows, columns, the chat template or the loss mask do not fit the definition."""


class AssetError(RankwiseError, OSError):
    """Raised when a base or a data set cannot be fetched, read, or is not what its pin says."""

    exit_code = 3


class StorageError(RankwiseError, OSError):
    """Raised when a file cannot be written: disk full, read-only directory, no permission."""

    exit_code = 3


class BaseMismatchError(RankwiseError, ValueError):
    """Raised when a base is not the one that an adapter was trained on."""


class QuantizationMismatchError(RankwiseError, ValueError):
    """Raised when a base is quantized in another way than the one that an adapter was trained on."""


class AdapterIntegrityError(RankwiseError, ValueError):
    """Raised when a stored file of an adapter is not what was stored."""


class TrackingError(RankwiseError, ConnectionError):
    """Raised when the MLflow store cannot be reached or refuses."""

    exit_code = 3


class JobError(RankwiseError, RuntimeError):
    """Raised when a job failed, or when the queue refuses a request."""


class JobStoreError(JobError):
    """Raised when the queue's database cannot be reached or written, or has another schema."""

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

    It works without torch: torch's own class is recognized by its name. Most other cases are a plain `RuntimeError`,
    recognized by its text. A `RankwiseError` is never one: it reports what was done about it.
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

"""Third-party noise kept off the terminal: what concerns a user is said by rankwise, once, in its own words."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from transformers.utils import logging as transformers_logging

# peft says this for every adapter after the first; several adapters over one base are what rankwise is for.
SEVERAL_ADAPTERS = (
    "Already found a `peft_config` attribute in the model. This will lead to having multiple adapters in the model. "
    "Make sure to know what you are doing!"
)
# bitsandbytes says this at every forward of every 8-bit layer whose input is not float16.
_CAST_LOGGER = "bitsandbytes.autograd._functions"
_CAST = "MatMul8bitLt: inputs will be cast from %s to float16 during quantization"


class _Once(logging.Filter):
    """Lets a message through once in a process."""

    def __init__(self, message: str) -> None:
        """Watch for one message, as it is before its arguments are filled in."""
        super().__init__()
        self._message, self._said = message, False

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether to say it."""
        if record.msg != self._message:
            return True
        said, self._said = self._said, True
        return not said


_once = _Once(_CAST)


def say_casts_once() -> None:
    """Let bitsandbytes say once, not thousands of times, that 8-bit layers cast their input."""
    # Adding the same filter again has no effect.
    logging.getLogger(_CAST_LOGGER).addFilter(_once)


@contextmanager
def quiet_transformers(*, progress: bool = False) -> Iterator[None]:
    """Let transformers say errors only, and no progress bars unless `progress`; the former state comes back."""
    verbosity = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    if not progress:
        transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars and not progress:
            transformers_logging.enable_progress_bar()


@contextmanager
def expected_warning(message: str) -> Iterator[None]:
    """Ignore one third-party warning, by its exact message."""
    with warnings.catch_warnings():
        # `filterwarnings` takes a regular expression that must match from the start.
        warnings.filterwarnings("ignore", message=re.escape(message) + r"\Z")
        yield

"""One lock for each model, held through a pass by whatever runs it: engines, `generate_batch`, MLflow's function.

A pass says to the layers themselves which rows go through which adapter, and `generate` swaps the model's generation
configuration: two passes of different threads would see each other's. The lock is not part of any object that is
copied or pickled.
"""

from __future__ import annotations

import weakref
from threading import Lock
from typing import Any

_LOCKS: weakref.WeakKeyDictionary[Any, Lock] = weakref.WeakKeyDictionary()
_FINDING = Lock()


def pass_lock(model: Any) -> Lock:
    """The lock of a model; the same one whoever asks."""
    with _FINDING:
        return _LOCKS.setdefault(model, Lock())

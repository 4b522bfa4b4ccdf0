"""The base that this process has loaded. One at a time: consecutive packs over it find it warm."""

from __future__ import annotations

import gc
import logging

from rankwise.assets.base import ResolvedBase
from rankwise.experiment.schema import QuantizationSpec
from rankwise.modeling.base import LoadedBase, load_base
from rankwise.settings import Settings
from rankwise.tasks.context import Voice

logger = logging.getLogger(__name__)


class BaseHolder:
    """Holds the loaded base until another one is asked for."""

    def __init__(self, settings: Settings, voice: Voice) -> None:
        """Nothing is loaded yet."""
        self._settings = settings
        self._voice = voice
        self._held: tuple[tuple[str, str, QuantizationSpec], LoadedBase] | None = None

    def get(self, resolved: ResolvedBase, quantization: QuantizationSpec) -> LoadedBase:
        """The base in memory; what was there before is let go first, so that two never lie side by side."""
        key = (str(resolved.path), resolved.revision, quantization)
        if self._held is not None and self._held[0] == key:
            return self._held[1]
        self.release()
        with self._voice.task(f"loading the base {resolved.source}", None, "steps"):
            base = load_base(resolved, quantization, self._settings)
        origin = "from the cache of quantized bases" if base.from_cache else "quantized now"
        self._voice.say(f"base: {origin}, computes in {base.dtype_reason}, {base.memory_bytes / 1e6:,.0f} MB")
        self._held = (key, base)
        return base

    def release(self) -> None:
        """Let the base go."""
        self._held = None
        gc.collect()

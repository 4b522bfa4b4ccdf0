"""The base that this process has loaded. One at a time: consecutive packs over it find it warm.

- Whether a base is as it was loaded, checked between two packs: a warm one carries over what a pack left in it.
"""

from __future__ import annotations

import gc
import logging
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from rankwise.assets.base import ResolvedBase
from rankwise.experiment.schema import QuantizationSpec
from rankwise.files import format_size
from rankwise.flavor.fetch import Fetched
from rankwise.flavor.load import find_base, load_recorded_base, loads_plainly, rows_of
from rankwise.flavor.package import LoadOptions
from rankwise.modeling.base import LoadedBase, load_base
from rankwise.reporter import Reporter
from rankwise.settings import Settings

_SAMPLED = 256
"""Bytes of each tensor that the digest looks at."""


def leftovers(model: Any) -> list[str]:
    """What a pack has left behind, in words; empty for a base in evaluation mode without adapters or gradients."""
    found = []
    adapters = sorted({name for module in model.modules() for name in getattr(module, "lora_A", ())})
    if adapters:
        found.append(f"adapters {', '.join(adapters)}")
    asking = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    if asking:
        found.append(f"{len(asking)} parameters that ask for a gradient, the first is {asking[0]}")
    holding = [name for name, parameter in model.named_parameters() if parameter.grad is not None]
    if holding:
        found.append(f"{len(holding)} gradients, the first is that of {holding[0]}")
    if model.training:
        found.append("training mode")
    return found


@torch.no_grad()
def sample_digest(model: Any) -> int:
    """A checksum over a few bytes of every parameter that is not quantized.

    Quantized weights are left out: bitsandbytes packs them anew, in place, for some CPUs.
    """
    digest = 0
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point() or "lora_" in name:
            continue
        flat = parameter.detach().flatten()
        some = flat[:: max(1, flat.numel() // (_SAMPLED // flat.element_size()))].contiguous()
        digest = zlib.crc32(some.cpu().view(torch.uint8).numpy().tobytes(), digest)
    return digest


logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class _Held:
    key: tuple[object, ...]
    base: LoadedBase
    digest: int


class BaseHolder:
    """Holds the loaded base until another one is asked for."""

    def __init__(self, settings: Settings, voice: Reporter) -> None:
        """Nothing is loaded yet."""
        self._settings = settings
        self._voice = voice
        self._held: _Held | None = None

    def get(self, resolved: ResolvedBase, quantization: QuantizationSpec) -> LoadedBase:
        """The base in memory, checked to be as it was loaded.

        What was there before is let go first, so that two never lie side by side.

        Raises:
            AssetError: The base cannot be loaded.
            ConfigError: It cannot be quantized so.
            StorageError: The cache cannot be written.
        """
        key = (str(resolved.path), resolved.revision, quantization)
        return self._hold(key, resolved.source, lambda: load_base(resolved, quantization, self._settings))

    def recorded(self, first: Fetched, options: LoadOptions) -> LoadedBase:
        """The base that a stored adapter asks for, as recorded; `find` of `rankwise.flavor.load_models`.

        Raises:
            BaseMismatchError: What was found is another base.
            AssetError: Nothing was found.
        """
        facts = first.metadata.base
        resolved = find_base(
            facts,
            first.origin.uri,
            self._settings,
            base_model=options.base_model,
            allow_base_mismatch=options.allow_base_mismatch,
        )
        if loads_plainly(first, resolved):
            return self.get(resolved, facts.quantization)
        key = (str(resolved.path), resolved.revision, facts, rows_of(first, resolved))
        return self._hold(key, resolved.source, lambda: load_recorded_base(first, options))

    def _hold(self, key: tuple[object, ...], source: str, load: Callable[[], LoadedBase]) -> LoadedBase:
        if self._held is not None and self._held.key == key and self._is_clean(self._held):
            return self._held.base
        self.release()
        with self._voice.task(f"loading the base {source}", None, "steps"):
            base = load()
        origin = "from the cache of quantized bases" if base.from_cache else "quantized now"
        self._voice.say(
            f"base: {origin}, computes in {base.dtype_reason}, {format_size(base.memory_bytes, ',.0f', unit='MB')}"
        )
        self._held = _Held(key=key, base=base, digest=sample_digest(base.model))
        return base

    def release(self) -> None:
        """Let the base go."""
        self._held = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _is_clean(self, held: _Held) -> bool:
        found = leftovers(held.base.model)
        if sample_digest(held.base.model) != held.digest:
            found.append("other weights than those loaded")
        if found:
            self._voice.warn(f"the base was not left as it was loaded ({'; '.join(found)}): it is loaded again")
        return not found

"""`BaseHolder`: keeps one loaded base for consecutive packs, and reloads it if a pack has left it changed."""

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
from rankwise.flavor.base import find_base, load_recorded_base, loads_plainly, recorded_attention, rows_of
from rankwise.flavor.fetch import Fetched
from rankwise.flavor.package import LoadOptions
from rankwise.modeling.base import LoadedBase, base_attention, load_base
from rankwise.reporter import Reporter
from rankwise.settings import Settings

_SAMPLED = 256  # bytes of each tensor


def pack_residue(model: Any) -> list[str]:
    """What a pack left in a base, one phrase each; empty if it has no adapters or gradients and is in eval mode."""
    problems = []
    adapters = sorted({name for module in model.modules() for name in getattr(module, "lora_A", ())})
    if adapters:
        problems.append(f"adapters {', '.join(adapters)}")
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    if trainable:
        problems.append(f"{len(trainable)} parameters that require gradients, the first is {trainable[0]}")
    with_gradient = [name for name, parameter in model.named_parameters() if parameter.grad is not None]
    if with_gradient:
        problems.append(f"{len(with_gradient)} gradients, the first is of {with_gradient[0]}")
    if model.training:
        problems.append("training mode")
    return problems


@torch.no_grad()
def sample_digest(model: Any) -> int:
    """CRC-32 over a sample of bytes of every parameter that is not quantized.

    Quantized weights are skipped: bitsandbytes repacks them in place for some CPUs.
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
    """Holds one loaded base. It frees the previous base before it loads the next."""

    def __init__(self, settings: Settings, reporter: Reporter) -> None:
        """Start without a base."""
        self._settings = settings
        self._reporter = reporter
        self._held: _Held | None = None

    def get(
        self,
        resolved: ResolvedBase,
        quantization: QuantizationSpec,
        attn_implementation: str,
        towers: bool = False,
    ) -> LoadedBase:
        """The loaded base, loaded again if it is another one or was changed; the arguments are those of `load_base`.

        Raises:
            ConfigError: The base cannot be quantized this way, or does not support the attention implementation.
        """
        attention = base_attention(resolved, quantization, attn_implementation)
        key = (str(resolved.path), resolved.revision, quantization, attention.name, towers)

        def load() -> LoadedBase:
            return load_base(
                resolved, quantization, self._settings, attn_implementation=attn_implementation, towers=towers
            )

        return self._hold(key, resolved.source, load)

    def recorded(self, first: Fetched, options: LoadOptions) -> LoadedBase:
        """The base that a stored adapter records; the `find` argument of `rankwise.flavor.load_models`.

        Raises:
            BaseMismatchError: The base at hand is not the recorded one.
        """
        facts = first.metadata.base
        resolved = find_base(
            facts,
            first.origin.uri,
            self._settings,
            base_model=options.base_model,
            allow_base_mismatch=options.allow_base_mismatch,
        )
        if loads_plainly(first, resolved) and options.kernels == "exact":
            attention = options.attn_implementation or recorded_attention(facts, resolved, facts.quantization)
            return self.get(resolved, facts.quantization, attention, facts.towers)
        asked = (options.attn_implementation, options.kernels)
        key = (str(resolved.path), resolved.revision, facts, rows_of(first, resolved), asked)
        return self._hold(key, resolved.source, lambda: load_recorded_base(first, options))

    def _hold(self, key: tuple[object, ...], source: str, load: Callable[[], LoadedBase]) -> LoadedBase:
        if self._held is not None and self._held.key == key and self._is_clean(self._held):
            return self._held.base
        self.release()
        with self._reporter.task(f"loading the base {source}", None, "steps"):
            base = load()
        origin = "from the cache of quantized bases" if base.from_cache else "quantized now"
        self._reporter.say(
            f"base: {origin}, computes in {base.dtype_reason}, attention {base.attention.reason}, "
            f"{format_size(base.memory_bytes, ',.0f', unit='MB')}"
        )
        self._held = _Held(key=key, base=base, digest=sample_digest(base.model))
        return base

    def release(self) -> None:
        """Free the base and its memory."""
        self._held = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _is_clean(self, held: _Held) -> bool:
        problems = pack_residue(held.base.model)
        if sample_digest(held.base.model) != held.digest:
            problems.append("weights that differ from the loaded ones")
        if problems:
            self._reporter.warn(f"the last pack changed the base ({'; '.join(problems)}): loading it again")
        return not problems

"""The anatomy of an adapter that was just trained, for its run."""

from __future__ import annotations

import math
from pathlib import Path

from rankwise.modeling.adapter import adapter_tensors
from rankwise.modeling.anatomy import Anatomy
from rankwise.modeling.anatomy_page import make_page
from rankwise.modeling.anatomy_reader import adapter_anatomy
from rankwise.modeling.base import LoadedBase

PAGE_NAME = "anatomy.html"
"""The name of the page among a run's artifacts."""

TABLE_NAME = "anatomy.json"
"""The name of the numbers behind the page, in the form of `inspect --json`; the report of a sweep reads them."""


def trained_page(anatomy: Anatomy, base: LoadedBase, title: str) -> str:
    """The HTML page of an adapter over the base that it was trained on, for the artifact `PAGE_NAME`.

    Args:
        anatomy: The adapter's.
        base: What it was trained on.
        title: What to call it.
    """
    return make_page(anatomy, title, f"over {base.source} at {base.revision}")


def rank_metrics(anatomy: Anatomy) -> dict[str, float]:
    """How much of its rank an adapter uses, for the run's metrics; empty where nothing was learned.

    `adapter.effective_rank` is the mean over the modules (see `delta`), `adapter.rank_99` the smallest rank that keeps
    99 % of the energy of all deltas.
    """
    ranks = [target.effective_rank for target in anatomy.targets if target.effective_rank is not None]
    finite = [rank for rank in ranks if math.isfinite(rank)]
    if not finite or (use := anatomy.rank_use) is None:
        return {}
    return {"adapter.effective_rank": math.fsum(finite) / len(finite), "adapter.rank_99": float(use.rank_99)}


def trained_anatomy(adapter: Path, base: LoadedBase) -> Anatomy:
    """Take apart an adapter over a base in memory, with the memory that this base takes.

    Raises:
        AdapterIntegrityError: The directory is no whole adapter.
    """
    names = getattr(base.model, "peft_config", None) or {}
    attached = {
        tensor.data_ptr(): tensor.numel() * tensor.element_size()
        for name in names
        for tensor in adapter_tensors(base.model, name).values()
    }
    alone = base.memory_bytes - sum(attached.values())
    anatomy = adapter_anatomy(
        adapter,
        base_config=base.path / "config.json",
        quantization=base.quantization,
        module_dtype=str(base.module_dtype).removeprefix("torch."),
    )
    # An adapter is loaded in the dtype that it is stored in.
    return anatomy.with_memory(alone, alone + anatomy.bytes)

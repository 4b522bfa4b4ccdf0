"""The anatomy of an adapter that was just trained, for its run."""

from __future__ import annotations

from pathlib import Path

from rankwise.modeling.adapter import adapter_tensors
from rankwise.modeling.anatomy import Anatomy
from rankwise.modeling.anatomy_page import make_page
from rankwise.modeling.anatomy_reader import adapter_anatomy
from rankwise.modeling.base import LoadedBase

PAGE_NAME = "anatomy.html"
"""The name of the page among a run's artifacts."""


def trained_page(adapter: Path, base: LoadedBase, title: str, over: str = "") -> str:
    """The HTML page of an adapter over the base that it was trained on, for the artifact `PAGE_NAME`.

    Args:
        adapter: Its PEFT directory.
        base: The base in memory; adapters of other arms in it do not count.
        title: What to call it.
        over: Its base and quantization, in words; the base's source and revision when left out.

    Raises:
        AdapterIntegrityError: The directory is no whole adapter.
    """
    return make_page(trained_anatomy(adapter, base), title, over or f"over {base.source} at {base.revision}")


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

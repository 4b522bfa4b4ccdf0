"""Counts operations of a decoder layer and synchronizations of a training step, on a pretended GPU.

    PYTHONPATH=tests python -m benchmarks.launches --json

A GPU that runs short kernels is limited by how fast a CPU launches them, so their number must not grow with the number
of arms. Here a pack trains on `helpers.pretend_gpu`, which takes the engine's branches for CUDA and dispatches the same
operations: a Llama of tiny sizes in NF4, computing in bf16, every linear layer with an adapter of rank 8.

An operation is a dispatched aten operator that launches a kernel: no view and no allocation. `OPERATORS` says how many
kernels an operator of another library or of rankwise launches. The figures are of the forward and backward pass and the
optimizer of one step, of a base with three layers minus one with two.

A synchronization makes the CPU wait for the GPU: a value that is read, a copy between them that is not from pinned
memory, an operator whose result's shape depends on numbers.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

from helpers import pretend_gpu as pretended
from helpers.packs import load_tiny, make_arm, make_rows

from rankwise.modeling.base import LoadedBase
from rankwise.training.arm import ArmTask, PackObserver
from rankwise.training.loop import train_pack

ARMS = (1, 2, 8, 16)
STEPS = 3
OPERATORS = {"bitsandbytes::gemm_4bit": 1, "bitsandbytes::dequantize_4bit": 1, "bitsandbytes::dequantize_blockwise": 1}
"""Kernels of an operator that is not one of aten's."""

_QUANTIZATION = {"bnb_4bit_compute_dtype": "bfloat16"}
# Operators that launch nothing although their schema does not call them views.
_NO_KERNEL = {"_unsafe_view", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "lift_fresh"}
_WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "unique_dim", "_unique2", "equal", "is_nonzero"}


@dataclass(kw_only=True)
class Count:
    """What one step dispatched: operators by name, and synchronizations by name and the engine's line."""

    operations: Counter[str] = field(default_factory=Counter)
    synchronizations: Counter[tuple[str, str]] = field(default_factory=Counter)


def _is_view(func: Any) -> bool:
    returns = [each.alias_info for each in func._schema.returns]
    return any(info is not None and not info.is_write for info in returns)


def _place() -> str:
    """The innermost line of rankwise that is being executed."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        _, found, path = frame.f_code.co_filename.rpartition("/rankwise/")
        if found:
            return f"{path}:{frame.f_lineno}"
        frame = frame.f_back
    return "torch"


@contextmanager
def counting(count: Count) -> Iterator[None]:
    """Count what is dispatched to the pretended GPU inside the block."""

    def operation(func: Any, args: Any) -> None:
        name = func._schema.name
        short = name.rpartition("::")[2]
        if short in _WAITING:
            count.synchronizations[short, _place()] += 1
        elif not _is_view(func) and short not in _NO_KERNEL:
            count.operations[name] += 1 if name.startswith("aten::") else OPERATORS[name]

    def transfer(direction: str) -> None:
        count.synchronizations[direction, _place()] += 1

    with pretended.watched(operation, transfer):
        yield


class _SecondStep(PackObserver):
    """Counts from the end of the first step to the end of the second."""

    def __init__(self, count: Count) -> None:
        self._counting = counting(count)
        self._running = False

    def on_step(self, spec_hash: str, record: Any) -> None:
        if record.step == 1 and not self._running:
            self._running = True
            self._counting.__enter__()
        elif record.step == 2 and self._running:
            self._running = False
            self._counting.__exit__(None, None, None)


def count_step(
    arms: int, layers: int, *, dropout: bool, checkpointing: bool, rows: int = 1, shortest: int = 12
) -> Count:
    """What the second step of a pack dispatches; every arm has `rows` rows of `shortest` to 12 tokens."""
    count = Count()
    specs = [
        make_arm(
            seed=seed,
            quantization=_QUANTIZATION,
            lora={"r": 8, "lora_dropout": 0.1 if dropout else 0.0, "target_modules": "all-linear"},
            training={
                "max_steps": STEPS,
                "per_device_train_batch_size": rows,
                "gradient_checkpointing": checkpointing,
            },
        )
        for seed in range(arms)
    ]
    tasks = [ArmTask(spec=spec, train=make_rows(40, shortest=shortest, longest=12)) for spec in specs]
    base = _base(layers)
    with tempfile.TemporaryDirectory() as directory, pretended.pretend_gpu():
        train_pack(base, tasks, directory=Path(directory), observer=_SecondStep(count))
    return count


@cache
def _base(layers: int) -> LoadedBase:
    with tempfile.TemporaryDirectory() as directory:
        base = load_tiny(Path(directory), "llama", _QUANTIZATION, layers=layers)
    with pretended.pretend_gpu():
        return replace(base, model=pretended.to_gpu(base.model), device=pretended.GPU)


def figures(arms: int, *, dropout: bool, checkpointing: bool) -> dict[str, Any]:
    """Operations of a layer and synchronizations of a step of a pack."""
    two, three = (count_step(arms, layers, dropout=dropout, checkpointing=checkpointing) for layers in (2, 3))
    return {
        "arms": arms,
        "dropout": dropout,
        "checkpointing": checkpointing,
        "operations_per_layer": three.operations.total() - two.operations.total(),
        "synchronizations_per_step": three.synchronizations.total(),
    }


def main(arguments: list[str] | None = None) -> None:
    """Print the figures of all packs."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.launches", description=__doc__.partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="print JSON on stdout")
    parser.add_argument("--arms", type=int, nargs="+", default=list(ARMS), help="sizes of packs")
    parser.add_argument(
        "--by", action="store_true", help="also print the operators of a layer and the synchronizations"
    )
    options = parser.parse_args(arguments)
    results = []
    for dropout in (False, True):
        for checkpointing in (False, True):
            for arms in options.arms:
                results.append(figures(arms, dropout=dropout, checkpointing=checkpointing))
                if not options.json:
                    print(
                        "{arms:2} arms, dropout {dropout}, checkpointing {checkpointing}: {operations_per_layer} "
                        "operations a layer, {synchronizations_per_step} synchronizations".format(**results[-1])
                    )
            if options.by:
                two, three = (
                    count_step(options.arms[-1], layers, dropout=dropout, checkpointing=checkpointing)
                    for layers in (2, 3)
                )
                print(dict((three.operations - two.operations).most_common()), file=sys.stderr)
                print(dict(three.synchronizations.most_common()), file=sys.stderr)
    if options.json:
        print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()

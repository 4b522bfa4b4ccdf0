"""Formula = header = file: what an adapter's configuration, its tensors and its bytes must agree on."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from rankwise.assets.weights import TensorEntry
from rankwise.modeling.anatomy import Check, Target

_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1}


def make_checks(
    path: Path,
    header: Sequence[TensorEntry],
    targets: Sequence[Target],
    *,
    ranks: Mapping[str, int],
    linear: Mapping[str, tuple[int, int]] | None,
) -> tuple[Check, ...]:
    """Compare.

    Args:
        path: The file of weights.
        header: The tensors that its header lists.
        targets: What they make up.
        ranks: The rank that the configuration gives each module.
        linear: (in_features, out_features) of the base's linear layers; None where the base is not known.
    """
    parameters = sum(elements(entry) for entry in header)
    formula = sum(ranks[target.module] * (target.lora_A[1] + target.lora_B[0]) for target in targets)
    # Rows of new tokens, magnitudes of DoRA: stored beside the factors, outside of the formula.
    formula += sum(elements(entry) for entry in header if not entry.name.endswith((".lora_A.weight", ".lora_B.weight")))
    checks = [
        Check(name="parameters: r * (in + out) = tensors in the header", expected=formula, actual=parameters),
        Check(
            name="bytes: elements * size of their dtype = tensors in the header",
            expected=sum(elements(entry) * _BYTES.get(entry.dtype, 0) for entry in header),
            actual=sum(entry.stop - entry.start for entry in header),
        ),
        Check(
            name="bytes: header and tensors = file",
            expected=max((entry.stop for entry in header), default=0),
            actual=path.stat().st_size,
        ),
        Check(
            name="ranks: rows of lora_A = columns of lora_B",
            expected=sum(target.lora_A[0] for target in targets),
            actual=sum(target.lora_B[1] for target in targets),
        ),
    ]
    if linear is not None:
        fitting = [target for target in targets if linear.get(target.module) == (target.lora_A[1], target.lora_B[0])]
        checks.append(
            Check(
                name="targets: linear layers of the base with these shapes", expected=len(targets), actual=len(fitting)
            )
        )
    return tuple(checks)


def elements(entry: TensorEntry) -> int:
    """Numbers in a tensor."""
    return math.prod(entry.shape)

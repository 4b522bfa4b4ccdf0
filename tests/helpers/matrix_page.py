"""Writes the documentation page of the architecture matrix from the results of `make proofs`.

RANKWISE_MATRIX=matrix.json pytest -m proof tests/integration/test_architectures.py
PYTHONPATH=tests python -m helpers.matrix_page matrix.json > platform/docs/reference/architectures.md
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

COLUMNS = {
    "load": "attention",
    "alone": "packed = alone",
    "peft": "packed = peft",
    "resume": "resume",
    "register": "reload",
    "predict": "predict",
    "export": "export",
}

HEAD = """\
# Architectures

Each architecture is a tiny model with random weights in 4 bit (NF4, float32 on a CPU), with two arms of different ranks
whose rows lie on both sides of every length limit in its configuration. `make proofs` runs the checks; this page is
generated from their results ({versions}).

| column | meaning |
|---|---|
| attention | the attention implementation that `auto` chooses on a CPU |
| packed = alone | largest difference of a step's loss from the same arm trained alone |
| packed = peft | the same from a plain peft loop over single rows, without padding |
| resume | stopped after a step and resumed, against uninterrupted: `equal` means every bit of the adapter |
| reload | largest difference of a logit after storing the adapter and loading it again |
| predict | greedy answers of a batch with two adapters and the base, against each prompt alone without a cache |
| export | largest difference of a logit after merging into the dequantized base |

A failed check has the reason in its cell.

"""


def page(results: Mapping[str, Mapping[str, str]]) -> str:
    """The page in Markdown."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("transformers", "peft", "bitsandbytes"))
    lines = [f"| architecture | {' | '.join(COLUMNS.values())} |", f"|---|{'---|' * len(COLUMNS)}"]
    for name, checks in sorted(results.items()):
        cells = [checks.get(column, "").replace("|", "\\|") for column in COLUMNS]
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    return HEAD.format(versions=versions) + "\n".join(lines) + f"\n\n{len(results)} architectures.\n"


if __name__ == "__main__":
    sys.stdout.write(page(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))))

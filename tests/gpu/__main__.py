"""The tables of `python -m benchmarks` and of batch inference on a GPU, over Llama-3.1-8B's shape: one command.

Takes the options of `python -m benchmarks`; those given here come first, so that they can be overridden. The first run
writes 16 GB of random weights layer by layer into the cache, and quantizes them once.
"""

from __future__ import annotations

import gc
import sys

import click
import torch
from benchmarks import inference_figures
from benchmarks.__main__ import main

DEFAULTS = ["--subject", "8b", "--device", "cuda", "--rounds", "5", "--steps", "6", "--sampled-arms", "2",
            "--out", "mlruns/benchmark-gpu"]  # fmt: skip

# What users of such a GPU compute in; near ties fall either way in it, which the benchmark counts.
INFERENCE = ["--subject", "8b", "--device", "cuda", "--dtype", "bfloat16", "--tokens", "32",
             "--out", "mlruns/benchmark-inference-gpu"]  # fmt: skip


def run(command: click.Command, arguments: list[str]) -> int:
    """The exit code of a benchmark; what it had on the GPU is given back."""
    try:
        command(arguments)
    except SystemExit as end:
        return int(end.code or 0)
    finally:
        gc.collect()
        torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    codes = [run(main, [*DEFAULTS, *sys.argv[1:]]), run(inference_figures.main, INFERENCE)]
    sys.exit(max(codes))

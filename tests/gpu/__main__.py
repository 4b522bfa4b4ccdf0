"""The table of `python -m benchmarks` on a GPU, over a random base with the shape of Llama-3.1-8B: one command.

Takes the options of `python -m benchmarks`; those given here come first, so that they can be overridden. The first run
writes 16 GB of weights layer by layer into the cache, and quantizes them once.
"""

from __future__ import annotations

import sys

from benchmarks.__main__ import main

DEFAULTS = ["--subject", "8b", "--device", "cuda", "--rounds", "5", "--steps", "6", "--sampled-arms", "2",
            "--out", "mlruns/benchmark-gpu"]  # fmt: skip

if __name__ == "__main__":
    main([*DEFAULTS, *sys.argv[1:]])

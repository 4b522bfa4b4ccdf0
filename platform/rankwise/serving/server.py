"""What a vLLM server was started with, as far as a resolver must know it: vLLM tells it the name of the model only."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

from rankwise.serving.limits import DEFAULT_MAX_RANK

DEFAULT_PORT = 8000
"""vLLM's own."""


@dataclass(frozen=True, kw_only=True)
class Server:
    """A server's options.

    Attributes:
        max_rank: `--max-lora-rank`; None where the server was not started by a command line that is known, and vLLM
            alone decides when it loads.
        revision: `--revision` of the base; None for the hub's `main`.
        quantization: `--quantization`; None for none.
        url: Where it answers, without a path; None where that is not known, or over TLS.
    """

    max_rank: int | None = None
    revision: str | None = None
    quantization: str | None = None
    url: str | None = None

    @classmethod
    def of(cls, argv: Sequence[str]) -> Server:
        """Read the command line of `vllm serve`; options that do not matter here are passed over."""
        if "--enable-lora" not in argv:
            return cls()
        parser = argparse.ArgumentParser(add_help=False, exit_on_error=False, allow_abbrev=False)
        parser.add_argument("--max-lora-rank", "--max_lora_rank", type=int, default=DEFAULT_MAX_RANK)
        parser.add_argument("--revision")
        parser.add_argument("--quantization", "-q")
        parser.add_argument("--port", type=int, default=DEFAULT_PORT)
        parser.add_argument("--host")
        parser.add_argument("--uds")
        parser.add_argument("--ssl-certfile", "--ssl_certfile")
        known, _ = parser.parse_known_args(list(argv[1:]))
        # Any address of its own does; `0.0.0.0` and none at all are all of them.
        host = "127.0.0.1" if known.host in {None, "", "0.0.0.0", "::", "localhost"} else known.host
        elsewhere = known.uds is not None or known.ssl_certfile is not None
        return cls(
            max_rank=known.max_lora_rank,
            revision=known.revision,
            quantization=known.quantization,
            url=None if elsewhere else f"http://{f'[{host}]' if ':' in host else host}:{known.port}",
        )

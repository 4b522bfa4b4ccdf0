"""What a vLLM server was started with, as far as a resolver must know it: vLLM tells it the name of the model only."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rankwise.assets.bounded_yaml import read_yaml
from rankwise.serving.limits import DEFAULT_MAX_RANK

logger = logging.getLogger(__name__)

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
        """Read the command line of `vllm serve`; options that do not matter here are passed over.

        Options may be spelled with underscores, and be in the file of `--config`, over which the line wins. Where that
        file cannot be read, nothing is known of the server.
        """
        given = [_dashed(argument) for argument in argv[1:]]
        try:
            line = [*_configured(given), *given]
        except (OSError, ValueError) as error:
            logger.warning("the file of --config cannot be read, so nothing is known of the server: %s", error)
            return cls()
        if "--enable-lora" not in line:
            return cls()
        parser = argparse.ArgumentParser(add_help=False, exit_on_error=False, allow_abbrev=False)
        parser.add_argument("--max-lora-rank", type=int, default=DEFAULT_MAX_RANK)
        parser.add_argument("--revision")
        parser.add_argument("--quantization", "-q")
        parser.add_argument("--port", type=int, default=DEFAULT_PORT)
        parser.add_argument("--host")
        parser.add_argument("--uds")
        parser.add_argument("--ssl-certfile")
        known, _ = parser.parse_known_args(line)
        # Any address of its own does; `0.0.0.0` and none at all are all of them.
        host = "127.0.0.1" if known.host in {None, "", "0.0.0.0", "::", "localhost"} else known.host
        elsewhere = known.uds is not None or known.ssl_certfile is not None
        return cls(
            max_rank=known.max_lora_rank,
            revision=known.revision,
            quantization=known.quantization,
            url=None if elsewhere else f"http://{f'[{host}]' if ':' in host else host}:{known.port}",
        )


def _dashed(argument: str) -> str:
    """An option by its name with dashes, as vLLM reads it; other arguments as they are."""
    if not argument.startswith("--"):
        return argument
    name, sign, value = argument.partition("=")
    return name.replace("_", "-") + sign + value


def _configured(line: Sequence[str]) -> Iterator[str]:
    """The options in the file of `--config`, where the line names one.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is no YAML mapping.
    """
    parser = argparse.ArgumentParser(add_help=False, exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--config")
    path = parser.parse_known_args(list(line))[0].config
    if path is None:
        return
    document = read_yaml(Path(path).read_text(encoding="utf-8"))
    if not isinstance(document, dict):
        raise ValueError(f"{path} is no mapping of options to values")
    for name, value in document.items():
        option = _dashed(f"--{name}")
        if value is True:
            yield option
        elif isinstance(value, str | int | float) and value is not False:
            yield f"{option}={value}"

"""The vLLM plugin: a LoRA resolver that serves registered adapters by name.

    VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 VLLM_PLUGINS=rankwise MLFLOW_TRACKING_URI=... \
        vllm serve ORG/BASE --revision COMMIT --enable-lora --max-lora-rank 64

A request whose `model` is `models:/NAME@ALIAS`, `models:/NAME/VERSION` or `NAME@ALIAS` is then answered by that
adapter, and the answer's `model` says which version it was.

vLLM asks a resolver once for each name and keeps what it got: an alias that has moved is seen after
`POST /v1/unload_lora_adapter {"lora_name": "models:/NAME@ALIAS"}`, and by servers that start later. What is returned
for an alias is called `models:/NAME@ALIAS (version 3)`: vLLM's prefix cache goes by that name, and must not take the
keys and values of one version for another's; and adapters of one batch are told apart by it, so that an alias and its
version, which vLLM loads under two numbers, must not have one name.

vLLM loads its plugins in all of its processes: importing this module costs nothing, and neither does registering.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from typing import Any

logger = logging.getLogger(__name__)

NAME = "rankwise"


def register() -> None:
    """Register the resolver with vLLM; the entry point `rankwise` of the group `vllm.general_plugins`.

    Never raises: a plugin must not keep a server from starting.
    """
    try:
        from vllm.lora.resolver import LoRAResolverRegistry

        if NAME not in LoRAResolverRegistry.get_supported_resolvers():
            LoRAResolverRegistry.register_resolver(NAME, make_resolver(sys.argv))
    except Exception as error:
        logger.warning("rankwise serves no adapters: %s: %s", type(error).__name__, error)


def make_resolver(argv: list[str]) -> Any:
    """A resolver for the server that a command line has started (`vllm.lora.resolver.LoRAResolver`).

    Raises:
        ImportError: vLLM is not installed.
        ConfigError: An environment variable has a value that it cannot have.
    """
    from vllm.lora.request import LoRARequest
    from vllm.lora.resolver import LoRAResolver

    from rankwise.serving.server import Server
    from rankwise.settings import Settings

    settings, server = Settings.load(), Server.of(argv)

    class RankwiseResolver(LoRAResolver):  # type: ignore[misc]
        """Finds an adapter in MLflow, checks it, and gives vLLM its directory."""

        def __init__(self) -> None:
            self._adapters: Any = None

        async def resolve_lora(self, base_model_name: str, lora_name: str) -> Any:
            """The adapter of a name; None, with a line in the log, where it cannot be served."""
            from rankwise.serving.names import model_uri

            uri = model_uri(lora_name)
            if uri is None:
                return None  # Another resolver's.
            try:
                # Downloads, hashes and imports: off the server's event loop.
                served = await asyncio.to_thread(self._find, base_model_name, uri)
            except Exception as error:
                logger.warning("%s is not served: %s: %s", lora_name, type(error).__name__, error)
                return None
            # The server gives the request an id of its own.
            shown = lora_name if lora_name == served.uri else f"{lora_name} (version {served.version})"
            return LoRARequest(lora_name=shown, lora_int_id=served.number, lora_path=str(served.directory))

        def _find(self, base_model_name: str, uri: str) -> Any:
            from rankwise.serving.adapters import Adapters
            from rankwise.tracking.connect import connect

            if self._adapters is None:
                connect(settings)
                self._adapters = Adapters(settings, server)
            return self._adapters.find(base_model_name, uri)

    return RankwiseResolver()

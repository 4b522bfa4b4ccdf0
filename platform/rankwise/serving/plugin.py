"""The vLLM plugin: a LoRA resolver that serves registered adapters by name.

    VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 VLLM_PLUGINS=rankwise MLFLOW_TRACKING_URI=... \
        vllm serve ORG/BASE --revision COMMIT --enable-lora --max-lora-rank 64

A request whose `model` is `models:/NAME@ALIAS`, `models:/NAME/VERSION` or `NAME@ALIAS` is then answered by that
adapter, and the answer's `model` says which version it was. An alias that moves is followed within a minute or two (see
`follow`).

What is returned for an alias is called `models:/NAME@ALIAS (version 3)`: vLLM's prefix cache goes by that name, and
must not take the keys and values of one version for another's; and adapters of one batch are told apart by it, so that
an alias and its version, which vLLM loads under two numbers, must not have one name.

vLLM loads its plugins in all of its processes: importing this module costs nothing, and neither does registering.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import threading
from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rankwise.serving.adapters import Served
    from rankwise.serving.server import Server
    from rankwise.settings import Settings

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

    from rankwise.serving.server import Server, model_uri
    from rankwise.settings import Settings

    finder = Finder(Settings.load(), Server.of(argv))

    class RankwiseResolver(LoRAResolver):  # type: ignore[misc]
        """Finds an adapter in MLflow, checks it, and gives vLLM its directory."""

        async def resolve_lora(self, base_model_name: str, lora_name: str) -> Any:
            """The adapter of a name; None, with a line in the log, where it cannot be served."""
            uri = model_uri(lora_name)
            if uri is None:
                return None  # Another resolver's.
            try:
                # Downloads, hashes and imports: off the server's event loop.
                served = await asyncio.to_thread(finder.find, base_model_name, lora_name, uri)
            except Exception as error:
                logger.warning("%s is not served: %s: %s", lora_name, type(error).__name__, error)
                return None
            shown = lora_name if lora_name == served.uri else f"{lora_name} (version {served.version})"
            # The server gives the request a number of its own.
            return LoRARequest(lora_name=shown, lora_int_id=served.number, lora_path=str(served.directory))

    return RankwiseResolver()


class Finder:
    """What finds adapters and follows aliases, made at the first request: it needs the heavy libraries."""

    def __init__(self, settings: Settings, server: Server) -> None:
        """Nothing is opened yet."""
        self._settings = settings
        self._server = server
        self._lock = threading.Lock()
        self._opened: tuple[Any, Any] | None = None

    def find(self, base_model_name: str, name: str, uri: str) -> Served:
        """The adapter of a URI that a request has called `name`.

        Raises:
            RankwiseError: It cannot be served.
        """
        from rankwise.serving.adapters import Watched

        with self._lock:
            self._opened = self._opened or self._open()
        adapters, follower = self._opened
        served: Served = adapters.find(base_model_name, uri)
        if follower is not None and served.uri != uri:
            follower.watch(Watched(name=name, base_model_name=base_model_name, uri=uri, served=served))
        return served

    def _open(self) -> tuple[Any, Any]:
        from rankwise.serving.adapters import Adapters, Follower, unload
        from rankwise.tracking.errors import connect

        connect(self._settings)
        adapters, server = Adapters(self._settings, self._server), self._server
        if server.url is None:
            logger.warning(
                "aliases that move are not followed: it is not known where the server answers over plain HTTP; a name "
                "that it has loaded stays the version that it was"
            )
            return adapters, None
        return adapters, Follower(adapters.find, partial(unload, server.url, self._settings.vllm_api_key))

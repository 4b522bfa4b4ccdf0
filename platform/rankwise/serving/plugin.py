"""The vLLM plugin: a LoRA resolver that serves registered adapters by name.

    VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 VLLM_PLUGINS=rankwise MLFLOW_TRACKING_URI=... \
        vllm serve ORG/BASE --revision COMMIT --enable-lora --max-lora-rank 64

In a request, `model` is `models:/NAME@ALIAS`, `models:/NAME/VERSION` or `NAME@ALIAS`; the response's `model` has the
version. The server follows an alias that moves within two minutes (`rankwise.serving.adapters.AliasFollower`).

An alias is loaded under the name `models:/NAME@ALIAS (version 3)`. vLLM keys its prefix cache by name, so two versions
must not share one; and it tells the adapters of a batch apart by name, so an alias and its version must not share one.

vLLM loads plugins in all its processes, so importing this module and registering are cheap.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import threading
from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rankwise.serving.adapters import ServedAdapter
    from rankwise.serving.vllm_options import VllmOptions
    from rankwise.settings import Settings

logger = logging.getLogger(__name__)

NAME = "rankwise"


def register() -> None:
    """Register the resolver with vLLM: the entry point `rankwise` of the group `vllm.general_plugins`.

    Never raises: a plugin must not prevent a server from starting.
    """
    try:
        from vllm.lora.resolver import LoRAResolverRegistry

        if NAME not in LoRAResolverRegistry.get_supported_resolvers():
            LoRAResolverRegistry.register_resolver(NAME, make_resolver(sys.argv))
    except Exception as error:
        logger.warning("the rankwise plugin is off: %s: %s", type(error).__name__, error)


def make_resolver(argv: list[str]) -> Any:
    """A `vllm.lora.resolver.LoRAResolver` for the server with this command line."""
    from vllm.lora.request import LoRARequest
    from vllm.lora.resolver import LoRAResolver

    from rankwise.serving.vllm_options import VllmOptions, model_uri
    from rankwise.settings import Settings

    resolver = LazyResolver(Settings.load(), VllmOptions.from_command_line(argv))

    class RankwiseResolver(LoRAResolver):  # type: ignore[misc]
        """Gives vLLM the directory of a verified adapter."""

        async def resolve_lora(self, base_model_name: str, lora_name: str) -> Any:
            """The adapter of a name; None, with a warning in the log, if it cannot be served."""
            uri = model_uri(lora_name)
            if uri is None:
                return None  # Left to other resolvers.
            try:
                # Downloading, hashing and importing must not block the server's event loop.
                served = await asyncio.to_thread(resolver.find, base_model_name, lora_name, uri)
            except Exception as error:
                logger.warning("%s is not served: %s: %s", lora_name, type(error).__name__, error)
                return None
            shown = lora_name if lora_name == served.uri else f"{lora_name} (version {served.version})"
            # vLLM replaces the number by its own.
            return LoRARequest(lora_name=shown, lora_int_id=served.number, lora_path=str(served.directory))

    return RankwiseResolver()


class LazyResolver:
    """An `AdapterResolver` and its `AliasFollower`, created at the first request: they import heavy libraries."""

    def __init__(self, settings: Settings, options: VllmOptions) -> None:
        self._settings = settings
        self._options = options
        self._lock = threading.Lock()
        self._opened: tuple[Any, Any] | None = None

    def find(self, base_model_name: str, name: str, uri: str) -> ServedAdapter:
        """Resolve a URI that a request named `name`, and follow it if it is an alias."""
        from rankwise.serving.adapters import WatchedAlias

        with self._lock:
            self._opened = self._opened or self._open()
        adapters, follower = self._opened
        served: ServedAdapter = adapters.find(base_model_name, uri)
        if follower is not None and served.uri != uri:
            follower.watch(WatchedAlias(name=name, base_model_name=base_model_name, uri=uri, served=served))
        return served

    def _open(self) -> tuple[Any, Any]:
        from rankwise.serving.adapters import AdapterResolver, AliasFollower, unload
        from rankwise.tracking.connection import connect

        connect(self._settings)
        adapters, options = AdapterResolver(self._settings, self._options), self._options
        if options.url is None:
            logger.warning(
                "aliases that move are not followed: the server's plain HTTP address is unknown; a loaded name keeps "
                "its version until the server restarts"
            )
            return adapters, None
        return adapters, AliasFollower(adapters.find, partial(unload, options.url, self._settings.vllm_api_key))

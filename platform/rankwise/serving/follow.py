"""Aliases that move while a server runs: vLLM asks for a name once, so it is told to forget one that has moved.

One daemon thread looks every `EVERY_S` seconds. The new version is fetched and checked first; one that cannot be served
leaves the old one in place. Then the server is told over its own interface (`POST /v1/unload_lora_adapter`, which needs
`VLLM_ALLOW_RUNTIME_LORA_UPDATING=1`, as resolvers do); requests under way end with the version they began with, and the
next request for the name brings the new one.
"""

from __future__ import annotations

import json
import logging
import threading
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, replace

from rankwise.serving.adapters import TTL_S, Served

logger = logging.getLogger(__name__)

EVERY_S = TTL_S
_ANSWER_S = 30.0
_NOT_FOUND = 404
# The server is on this machine: no proxy is asked for the way.
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@dataclass(frozen=True, kw_only=True)
class Watched:
    """A name that a server was given an adapter for.

    Attributes:
        name: As requests give it.
        base_model_name: The server's base.
        uri: The alias.
        served: What it was then.
    """

    name: str
    base_model_name: str
    uri: str
    served: Served


class Follower:
    """Tells a server of aliases that have moved."""

    def __init__(self, find: Callable[[str, str], Served], unload: Callable[[str], None]) -> None:
        """Nothing is watched yet.

        Args:
            find: The adapter of a URI for a base, checked: `Adapters.find`.
            unload: Makes the server forget a name.
        """
        self._find = find
        self._unload = unload
        self._lock = threading.Lock()
        self._watched: dict[str, Watched] = {}
        self._thread: threading.Thread | None = None
        self._end = threading.Event()

    def watch(self, watched: Watched) -> None:
        """From now on; the first one starts the thread."""
        with self._lock:
            self._watched[watched.name] = watched
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="rankwise-aliases", daemon=True)
                self._thread.start()

    def look(self) -> None:
        """Ask for every watched alias once; an error is a line in the log, and asked again next time."""
        with self._lock:
            names = list(self._watched.values())
        for each in names:
            try:
                self._look(each)
            except Exception as error:
                logger.warning("%s stays %s: %s: %s", each.name, each.served.uri, type(error).__name__, error)

    def _look(self, each: Watched) -> None:
        found = self._find(each.base_model_name, each.uri)
        if found == each.served:
            return
        self._unload(each.name)
        logger.info("%s was %s and is %s from its next request on", each.name, each.served.uri, found.uri)
        with self._lock:
            self._watched[each.name] = replace(each, served=found)

    def _run(self) -> None:
        while not self._end.wait(EVERY_S):
            self.look()

    def close(self) -> None:
        """End the thread."""
        self._end.set()
        if self._thread is not None:
            self._thread.join()


def unload(url: str, api_key: str | None, name: str) -> None:
    """Make the server at `url` forget an adapter; one that it does not know is no error.

    Raises:
        OSError: It does not answer, or refuses.
    """
    headers = {"Content-Type": "application/json"}
    if api_key is not None:
        headers["Authorization"] = f"Bearer {api_key}"
    body = json.dumps({"lora_name": name}).encode()
    request = urllib.request.Request(f"{url}/v1/unload_lora_adapter", data=body, headers=headers)
    try:
        with _DIRECT.open(request, timeout=_ANSWER_S):
            return
    except urllib.error.HTTPError as error:
        if error.code != _NOT_FOUND:
            raise

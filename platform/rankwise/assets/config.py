"""The configuration of a base, without its weights: enough to plan an adapter over it."""

from __future__ import annotations

from pathlib import Path

from rankwise.assets.base import resolve_base
from rankwise.assets.confine import confine
from rankwise.assets.hub import fetch_config, resolve_commit
from rankwise.assets.pin import read_source
from rankwise.experiment.source import HubSource
from rankwise.settings import Settings


def find_config(base_model: str, settings: Settings) -> Path:
    """The `config.json` of a base. Of a base on the hub this one file is fetched; a GGUF is converted as a whole.

    Args:
        base_model: A `config.json` or the directory it is in, or what names a base.
        settings: Where the cache is, and whether the network may be used.

    Raises:
        ConfigError: `base_model` cannot be understood.
        AssetError: It is not there, or cannot be fetched.
    """
    path = Path(base_model).expanduser()
    if path.suffix == ".json" or (path / "config.json").is_file():
        file = path if path.suffix == ".json" else path / "config.json"
        return confine(file.absolute(), settings, "base_model")
    source = read_source(base_model, None, key="base_model_revision")
    if isinstance(source, HubSource):
        return fetch_config(source.repo, resolve_commit(source.repo, None, settings), settings)
    return resolve_base(base_model, None, settings).path / "config.json"

"""Files that a definition names lie below `RANKWISE_DATA_ROOT`, where it is set.

For workers that run definitions of others: without it, a definition reads whatever the worker's user may read, and the
rows come out in MLflow. Links are followed first, and a directory is looked through: where the files are counts, not
how they are called. Directories of `RANKWISE_BASES` are the operator's own, and allowed as well.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rankwise.assets.bounded_yaml import read_yaml
from rankwise.exceptions import AssetError, ConfigError
from rankwise.settings import Settings

_CARD = "README.md"


def confine(path: Path, settings: Settings, key: str) -> Path:
    """Return the path, if the files it names may be read.

    Args:
        path: A file or directory, absolute.
        settings: With roots, or without.
        key: The key of the experiment file that names it, for messages.

    Raises:
        ConfigError: It lies outside of all roots, or holds a link that leads outside.
    """
    if not settings.data_roots:
        return path
    roots = [root.resolve() for root in (*settings.data_roots, *settings.bases)]
    allowed = os.pathsep.join(map(str, settings.data_roots))
    for each in [path, *(sorted(path.rglob("*")) if path.is_dir() else [])]:
        real = each.resolve()
        if not any(real.is_relative_to(root) for root in roots):
            leads = "" if each == real else f" (it is {real})"
            raise ConfigError(
                f"{key}: {each}{leads} is outside of RANKWISE_DATA_ROOT {allowed}, and this machine touches no other "
                "files for a definition or a prediction; put the data there, or ask whoever runs the workers"
            )
    return path


def refuse_files_elsewhere(directory: Path) -> None:
    """Refuse a directory of data whose card has `datasets` read files out of other directories or from other machines.

    With or without a root: the directory's digest, its pin, does not cover them.

    Raises:
        AssetError: The card names such files, or cannot be read.
    """
    card = directory / _CARD
    if not card.is_file():
        return
    text = card.read_text(encoding="utf-8", errors="replace")
    if not text.startswith("---"):
        return
    try:
        front = read_yaml(text[3:].partition("\n---")[0])
    except ValueError as error:
        raise AssetError(f"dataset: the head of {card} cannot be read: {error}") from error
    configs = front.get("configs") if isinstance(front, dict) else None
    for name in _texts([{key: each.get(key) for key in ("data_files", "data_dir")} for each in _dicts(configs)]):
        if "://" in name or name.startswith(("/", "~")) or ".." in name.split("/"):
            raise AssetError(
                f"dataset: {card} names data outside of its directory ({name!r}), which the directory's pin does not "
                "cover; put the files into the directory, or name them as the data set"
            )


def _dicts(value: Any) -> list[dict[str, Any]]:
    return [each for each in value if isinstance(each, dict)] if isinstance(value, list) else []


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _texts(each)

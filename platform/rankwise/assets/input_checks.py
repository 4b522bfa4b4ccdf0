"""Checks of untrusted input: sources and pins, YAML of others, and paths outside of `RANKWISE_DATA_ROOT`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from rankwise.exceptions import AssetError, ConfigError
from rankwise.experiment.source import HubSource, LocalSource, PypiSource, Source, check_revision, parse_source
from rankwise.settings import Settings


def read_source(text: str, revision: str | None, *, key: str) -> HubSource | LocalSource | PypiSource:
    """Parse a source and check the form of its revision. A `ConfigError` names `key`, which holds the revision."""
    try:
        source = parse_source(text)
    except ValueError as error:
        raise ConfigError(f"{key.removesuffix('_revision')}: {error}") from error
    if revision is not None:
        try:
            check_revision(source, revision)
        except ValueError as error:
            raise ConfigError(f"{key}: {error}") from error
    return source


def check_digest(source: Source, *, expected: str | None, actual: str, key: str, hint: str) -> None:
    """Compare a digest with the pin, if there is one. The `AssetError` gives both digests and both ways out."""
    if expected is None or expected == actual:
        return
    raise AssetError(
        f"wrong digest of {source}:\n  expected {expected}\n  found    {actual}\n"
        f"If the current content is what you want, write `{key}: {actual}`; otherwise {hint}."
    )


# Not the YAML 1.2 reader of experiment files: MLflow, `datasets` and vLLM read the same files with PyYAML, and what is
# checked here must be what they see.
MAX_BYTES = 2 << 20
MAX_NODES = 200_000


def read_yaml(text: str) -> Any:
    """Parse YAML with safe types only.

    Aliases are counted each time they are used, because writing the value again (as JSON, for a digest) expands them.

    Raises:
        ValueError: It is not YAML, too large, too deep, or expands to too many values.
    """
    if len(text) > MAX_BYTES:
        raise ValueError(f"it has {len(text):,} characters; allowed are {MAX_BYTES:,}")
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _size(node, {}, set())
        return loader.construct_document(node)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _size(node: yaml.Node, known: dict[int, int], above: set[int]) -> int:
    if id(node) in known:
        return known[id(node)]
    if id(node) in above:
        raise ValueError("a value contains itself")
    above.add(id(node))
    children = node.value if isinstance(node, yaml.SequenceNode) else []
    if isinstance(node, yaml.MappingNode):
        children = [part for pair in node.value for part in pair]
    size = 1 + sum(_size(child, known, above) for child in children)
    if size > MAX_NODES:
        raise ValueError(f"it expands to more than {MAX_NODES:,} values")
    above.discard(id(node))
    known[id(node)] = size
    return size


_CARD = "README.md"


def confine(path: Path, settings: Settings, key: str) -> Path:
    """Return an absolute path if all files it names may be read.

    A worker that runs definitions of others would otherwise put any file that its user can read into MLflow. Links are
    resolved and directories are searched. `RANKWISE_BASES` is allowed too: its content is the operator's choice.

    Raises:
        ConfigError: It is outside of all roots, or contains a link that leads outside.
    """
    if not settings.data_roots:
        return path
    roots = [root.resolve() for root in (*settings.data_roots, *settings.bases)]
    allowed = os.pathsep.join(map(str, settings.data_roots))
    for file in [path, *(sorted(path.rglob("*")) if path.is_dir() else [])]:
        target = file.resolve()
        if not any(target.is_relative_to(root) for root in roots):
            resolved = "" if file == target else f" (it is {target})"
            raise ConfigError(
                f"{key}: {file}{resolved} is outside of RANKWISE_DATA_ROOT {allowed}, and this machine reads no other "
                "files for a definition or a prediction; put the data there, or ask the operator of the workers"
            )
    return path


def refuse_external_files(directory: Path) -> None:
    """Raise an `AssetError` if the card of a data directory names files that the directory's digest does not cover."""
    card = directory / _CARD
    if not card.is_file():
        return
    text = card.read_text(encoding="utf-8", errors="replace")
    if not text.startswith("---"):
        return
    try:
        front = read_yaml(text[3:].partition("\n---")[0])
    except ValueError as error:
        raise AssetError(f"dataset: the front matter of {card} cannot be read: {error}") from error
    configs = front.get("configs") if isinstance(front, dict) else None
    for name in _texts([{key: config.get(key) for key in ("data_files", "data_dir")} for config in _dicts(configs)]):
        if "://" in name or name.startswith(("/", "~")) or ".." in name.split("/"):
            raise AssetError(
                f"dataset: {card} names data outside of its directory ({name!r}), which the directory's pin does not "
                "cover; move the files into the directory, or use them as the data set"
            )


def _dicts(value: Any) -> list[dict[str, Any]]:
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _texts(item)

"""Pins: what says that a base or a data set is still the one that was meant.

For workers that run definitions of others: without it, a definition reads whatever the worker's user may read, and the
rows come out in MLflow. Links are followed first, and a directory is looked through: where the files are counts, not
how they are called. Directories of `RANKWISE_BASES` are the operator's own, and allowed as well.

- YAML of strangers: plain values only, and no file of a few lines that unfolds to more than memory holds.
- Files that a definition names lie below `RANKWISE_DATA_ROOT`, where it is set.
"""

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
    """Read the text of a source and check the form of its revision.

    Args:
        text: `org/name`, a path, or `pypi:DIST==VERSION#MEMBER`.
        revision: The revision that was given with it, or None.
        key: The key of the experiment file that holds the revision, for messages.

    Raises:
        ConfigError: One of them has a wrong form.
    """
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
    """Compare what is there with what the pin says.

    Args:
        source: Where it comes from.
        expected: The pin, or None where there is none.
        actual: The digest of what is there.
        key: The key of the experiment file that holds the pin.
        hint: What to do if the pin is right.

    Raises:
        AssetError: They differ. The message has both digests and both ways out.
    """
    if expected is None or expected == actual:
        return
    raise AssetError(
        f"wrong digest of {source}:\n  expected {expected}\n  found    {actual}\n"
        f"If what is there now is what you want, write `{key}: {actual}`; otherwise {hint}."
    )


# A reader of its own, beside that of experiment files (`experiment.document`, YAML 1.2): these files are also read by
# MLflow, `datasets` and vLLM, all with PyYAML. What is checked here must be what they see, and the two languages differ
# in `yes`, `017`, `1:30`, `1e-5`, dates, merge keys, duplicate keys and keys that are not text.
MAX_BYTES = 2 << 20
MAX_NODES = 200_000


def read_yaml(text: str) -> Any:
    """The value of a YAML text, by YAML's safe types.

    Aliases are counted as often as they are used before any value is made: whoever writes the value down again (as JSON
    for a digest, say) unfolds them all.

    Raises:
        ValueError: It is not YAML, too large, too deep, or unfolds to too many values.
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
        raise ValueError("a value holds itself")
    above.add(id(node))
    children = node.value if isinstance(node, yaml.SequenceNode) else []
    if isinstance(node, yaml.MappingNode):
        children = [part for pair in node.value for part in pair]
    size = 1 + sum(_size(child, known, above) for child in children)
    if size > MAX_NODES:
        raise ValueError(f"it unfolds to more than {MAX_NODES:,} values")
    above.discard(id(node))
    known[id(node)] = size
    return size


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

"""YAML of strangers: plain values only, and no file of a few lines that unfolds to more than memory holds."""

from __future__ import annotations

from typing import Any

import yaml  # type: ignore[import-untyped]

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

"""The schema's fields by dotted path: what each allows, in words, and which may be swept.

Everything is derived from `schema`, so that messages, editor schema and checks agree.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Mapping
from functools import cache
from types import MappingProxyType
from typing import Any

from rankwise.experiment.paths import KeyPath, dotted, follow
from rankwise.experiment.schema import ExperimentSpec

Node = dict[str, Any]

# Descriptions in place of regular expressions.
_WORDS = {
    "name": "text of letters, digits, spaces, '.', '_' and '-' (at most 120)",
    "init_from": "models:/NAME/VERSION or models:/NAME@ALIAS",
    "register.name": "text without '/', ':' and quotes (at most 256)",
    "register.alias": "text of letters, digits, '_' and '-' (at most 255)",
    "dataset.chat_template_revision": "'sha256:' and 64 hex digits",
    "dataset.rendering": "1, 2 or null",
    "dataset.delimiter": "one character, or null",
    "dataset.chat_template_kwargs": "a mapping of names to texts, numbers, true, false or null",
    "lora.target_modules": "a list of module names, or all-linear",
    "dataset.train": "a source (a file, org/name, pypi:...), or a list of {source, weight or rows, ...}",
    "dataset.eval": (
        "a source (a file, org/name, pypi:...), a list of {source, rows, ...}, {split_from: train, rows: N, seed: S}, "
        "or null"
    ),
    "dataset.train[].label": "at most 60 letters, digits, '_' and '-'",
    "dataset.train[].delimiter": "one character, or null",
    "dataset.eval[].label": "at most 60 letters, digits, '_' and '-'",
    "dataset.eval[].delimiter": "one character, or null",
    "training.warmup_steps": "a whole number of steps, or a share of all steps of at least 0 and less than 1",
    "seed": "a whole number of at least 0 and less than 2**63",
    "dataset.eval.seed": "a whole number of at least 0 and less than 2**63",
}
# Names of other tools.
_SYNONYMS = {
    "alpha": "lora_alpha", "dropout": "lora_dropout", "rank": "r", "modules": "target_modules", "rslora": "use_rslora",
    "lr": "learning_rate", "batch_size": "per_device_train_batch_size", "epochs": "num_train_epochs",
    "steps": "max_steps", "scheduler": "lr_scheduler_type", "max_seq_length": "max_length", "model": "base_model",
    "base": "base_model", "revision": "base_model_revision", "data": "dataset", "template": "chat_template",
    "sep": "delimiter", "separator": "delimiter", "null_values": "na_values", "template_kwargs": "chat_template_kwargs",
}  # fmt: skip
_NOT_SWEPT = {"training.save_steps", "training.logging_steps", "training.eval_steps"}
SOURCE_AXES: Mapping[str, str] = MappingProxyType({"source": "", "weight": "number", "rows": "integer"})
"""Fields of a source in `dataset.train` that may be swept, and what kind of number they are."""


def source_axis(name: str) -> str:
    """A regular expression for the paths of a field of a source, in the syntax of JSON Schema too."""
    return rf"^dataset\.train\[\d{{1,4}}\]\.({name})$"


_SOURCE_AXIS = re.compile(source_axis("|".join(SOURCE_AXES)))


def inlined(node: Any, definitions: Mapping[str, Node]) -> Any:
    """A JSON Schema with its references replaced by what they refer to."""
    if isinstance(node, list):
        return [inlined(item, definitions) for item in node]
    if not isinstance(node, dict):
        return node
    rest = {key: inlined(value, definitions) for key, value in node.items() if key not in {"$ref", "$defs", "title"}}
    # No property is called "title", and pydantic's titles only repeat the names.
    if "$ref" not in node:
        return rest
    return {**inlined(definitions[node["$ref"].removeprefix("#/$defs/")], definitions), **rest}


@cache
def schema() -> Node:
    """The JSON Schema of an experiment file with expressions evaluated."""
    raw = ExperimentSpec.model_json_schema()
    node: Node = inlined(raw, raw["$defs"])
    return node


def options(node: Node) -> list[Node]:
    """The alternatives of a node, or the node itself."""
    parts = node.get("anyOf") or node.get("oneOf")
    return [leaf for part in parts for leaf in options(part)] if parts else [node]


def keys(node: Node) -> dict[str, Node]:
    """The keys of a section; empty for anything else."""
    for option in options(node):
        if "properties" in option:
            properties: dict[str, Node] = option["properties"]
            return properties
    return {}


def node_at(path: KeyPath, root: Node | None = None) -> Node | None:
    """The node of a key path in the schema or `root`; None if there is no such key."""
    node: Node | None = schema() if root is None else root
    for part in path:
        assert node is not None
        if isinstance(part, int):
            node = next((option["items"] for option in options(node) if "items" in option), None)
        else:
            node = keys(node).get(part)
        if node is None:
            return None
    return node


@cache
def leaves() -> Mapping[str, Node]:
    """Every field that is not a section, by dotted path. `dataset.eval` is both: text, or a section."""
    nodes: dict[str, Node] = {}

    def walk(node: Node, path: KeyPath) -> None:
        for key, child in keys(node).items():
            here = (*path, key)
            if not keys(child) or any(option.get("type") == "string" for option in options(child)):
                nodes[dotted(here)] = child
            walk(child, here)

    walk(schema(), ())
    return MappingProxyType(nodes)


@cache
def numbers() -> Mapping[str, str]:
    """Number fields, which accept expressions: dotted path to "integer" or "number".

    Fields of the sweep do not: they define the arms, before any arm has values.
    """
    kinds = {
        path: option["type"]
        for path, node in leaves().items()
        for option in options(node)
        if option.get("type") in {"integer", "number"} and not path.startswith("sweep.")
    }
    return MappingProxyType(kinds)


def number_kind(path: str) -> str | None:
    """`integer` or `number` for a field that holds numbers, else None."""
    match = _SOURCE_AXIS.match(path)
    return numbers().get(path) if match is None else SOURCE_AXES[match[1]] or None


def is_source(path: str) -> bool:
    """Whether a path is that of the source in a list of sources."""
    return path.endswith(".source") and _SOURCE_AXIS.match(path) is not None


def is_sweepable(path: str) -> bool:
    """Whether a field may differ between arms."""
    return path in sweepable() or _SOURCE_AXIS.match(path) is not None


@cache
def sweepable() -> tuple[str, ...]:
    """Fields that may differ between arms; those of sources in `dataset.train` (`SOURCE_AXES`) may too."""
    sections = ("lora.", "training.", "quantization.")
    return tuple(
        path
        for path in leaves()
        if (path.startswith(sections) or path in {"seed", "dataset.limit.train", "dataset.train"})
        and path not in _NOT_SWEPT
    )


def get(data: Any, path: KeyPath) -> Any:
    """The value of a key path in plain data, or its default.

    Raises:
        KeyError: A required key is missing, or a value above it is not a mapping.
    """
    value, node = data, schema()
    for part in path:
        if not isinstance(value, list if isinstance(part, int) else dict):
            raise KeyError(dotted(path))
        child = node_at((part,), node)
        if child is None:
            raise KeyError(dotted(path))
        node = child
        known, inside = follow(value, (part,))
        if known:
            value = inside
        elif "default" in node:
            value = node["default"]
        else:
            raise KeyError(dotted(path))
    return value


def allowed(path: KeyPath) -> str:
    """What a key may hold, in words that continue "must be ..."."""
    node = node_at(path)
    if node is None:
        return "something else"
    return _WORDS.get(re.sub(r"\[\d+\]", "[]", dotted(path))) or _describe(node)


def unknown_key(path: KeyPath) -> str:
    """The message for an unknown key, with the closest and all valid keys."""
    *parent, name = path
    node = node_at(tuple(parent))
    known = keys(node) if node else {}
    return f"is not a key here{did_you_mean(str(name), known, elsewhere=leaves())}; allowed: {', '.join(known)}"


def did_you_mean(name: str, known: Iterable[str], elsewhere: Iterable[str] = ()) -> str:
    """`; did you mean 'x'?` for a close match, or an empty text."""
    names = list(known)
    if _SYNONYMS.get(name) in names:
        return f"; did you mean {_SYNONYMS[name]!r}?"
    if same := [other for other in names if other.lower() == name.lower()]:
        return f"; did you mean {same[0]!r}?"
    if near := difflib.get_close_matches(name, names, n=1, cutoff=0.6):
        return f"; did you mean {near[0]!r}?"
    wanted = _SYNONYMS.get(name, name)
    homes = [path for path in elsewhere if path.rpartition(".")[2] == wanted]
    return f"; did you mean {' or '.join(homes)}?" if homes else ""


def show(value: Any) -> str:
    """A value for a message: text in quotes, the rest as in YAML, shortened."""
    text = repr(value) if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else f"{text[:76]} ..."


def _describe(node: Node) -> str:
    texts = [_describe_one(option) for option in options(node)]
    return ", or ".join(dict.fromkeys(texts))


def _describe_one(node: Node) -> str:
    if "enum" in node:
        return _join([str(value) for value in node["enum"]])
    if "const" in node:
        return str(node["const"])
    match node.get("type"):
        case "integer":
            return _bounded("a whole number", node)
        case "number":
            return _bounded("a number", node)
        case "boolean":
            return "true or false"
        case "string":
            return "non-empty text" if node.get("minLength") else "text"
        case "null":
            return "null"
        case "array":
            few = " (at least one)" if node.get("minItems") else ""
            return f"a list{few}, each item {_describe(node['items'])}" if node.get("items") else f"a list{few}"
    if names := keys(node):
        return f"a mapping with the keys {', '.join(names)}"
    return "a mapping"


def _bounded(kind: str, node: Node) -> str:
    bounds = []
    if "minimum" in node:
        bounds.append(f"of at least {node['minimum']}")
    if "exclusiveMinimum" in node:
        bounds.append(f"greater than {node['exclusiveMinimum']}")
    if "maximum" in node:
        bounds.append(f"at most {node['maximum']}")
    if "exclusiveMaximum" in node:
        bounds.append(f"less than {node['exclusiveMaximum']}")
    return " ".join([kind, " and ".join(bounds)]) if bounds else kind


def _join(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"

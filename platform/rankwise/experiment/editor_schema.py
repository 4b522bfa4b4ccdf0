"""The JSON Schema of an experiment file for editors: as the checks have it, plus expressions and the sweep's fields.

- The reference of an experiment file for people: Markdown out of the one description in `schema`.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any

from rankwise.experiment.fields import Node, allowed, keys, node_at, numbers, options, schema, sweepable
from rankwise.experiment.paths import KeyPath, as_path, dotted

_EXPRESSION: Node = {
    "type": "string",
    "minLength": 1,
    "description": "An expression over other fields, such as 2*r or max_steps // 10.",
}


def editor_schema() -> Node:
    """The whole schema, draft 7 and without references, which every editor understands."""
    root = copy.deepcopy(schema())
    for path in numbers():
        if path != "version":
            _replace(root, path, _with_expression(_at(root, path)))
    sweep = keys(root["properties"]["sweep"])
    fields = {path: _field(path) for path in sweepable()}
    sweep["parameters"] |= {
        "properties": {path: _axis(path, node) for path, node in fields.items()},
        "additionalProperties": False,
    }
    sweep["arms"]["items"] = {"type": "object", "properties": fields, "additionalProperties": False}
    return {"$schema": "http://json-schema.org/draft-07/schema#", "title": "rankwise experiment", **root}


def _axis(path: str, field: Node) -> Node:
    """A field's node among the sweep's parameters: a list of values, or a range of a search."""
    values = {"type": "array", "minItems": 1, "items": field}
    forms = [values, _range("choice", values)]
    if kind := numbers().get(path):
        forms.append(_range("int", _ends("integer"), log={"type": "boolean", "default": False}))
        if kind == "number":
            forms += [_range("uniform", _ends("number")), _range("log_uniform", _ends("number"))]
    return {"anyOf": forms}


def _range(kind: str, values: Node, **more: Node) -> Node:
    properties = {kind: values, **more}
    return {"type": "object", "properties": properties, "required": [kind], "additionalProperties": False}


def _ends(kind: str) -> Node:
    return {
        "type": "array",
        "items": {"type": kind},
        "minItems": 2,
        "maxItems": 2,
        "description": "[low, high], both included.",
    }


def _field(path: str) -> Node:
    """A field's node for the sweep, without a default: what is not overridden stays as it is."""
    node = node_at(as_path(path))
    assert node is not None, dotted(as_path(path))
    plain = {key: value for key, value in copy.deepcopy(node).items() if key != "default"}
    return _with_expression(plain) if path in numbers() else plain


def _with_expression(node: Node) -> Node:
    """The same node, which also takes an expression's text. Keywords that describe stay outside of the alternatives."""
    outside: Node = {key: node[key] for key in ("description", "default") if key in node}
    inside = [{key: value for key, value in option.items() if key not in outside} for option in options(node)]
    return {**outside, "anyOf": [*inside, copy.deepcopy(_EXPRESSION)]}


def _parent(root: Node, path: str) -> dict[str, Any]:
    node = node_at(as_path(path)[:-1], root)
    assert node is not None, path
    return keys(node)


def _at(root: Node, path: str) -> Node:
    node: Node = _parent(root, path)[path.rpartition(".")[2]]
    return node


def _replace(root: Node, path: str, node: Node) -> None:
    _parent(root, path)[path.rpartition(".")[2]] = node


_HEAD = """\
# The experiment file

Made by `rankwise schema --markdown`; the checks read the same description. Names are those of peft and transformers.

- An unknown key is an error. `rankwise validate FILE` says every problem at once, with file, line and key.
- Numbers follow YAML 1.2: `2e-3` is a number; `on`, `no` and `yes` are texts.
- *e*: an expression over other fields may stand there, as in `lora_alpha: 2*r`.
- *s*: the field may differ between arms, so it can stand under `sweep.parameters` and in `sweep.arms`.
- `--set KEY=VALUE` of `run`, `submit`, `plan` and `validate` overrides any key: `--set training.max_steps=5`.
"""


def reference() -> str:
    """The whole reference, as Markdown."""
    return "\n".join([_HEAD, *_sections(schema(), (), "The top level")])


def _sections(node: Node, path: KeyPath, title: str) -> Iterator[str]:
    """A section's table, then those of the sections in it."""
    yield f"## {title}\n"
    yield "| key | | what it is | allowed | default |\n|---|---|---|---|---|"
    for key, child in keys(node).items():
        yield _row((*path, key), child)
    yield ""
    for key, child in keys(node).items():
        if keys(child):
            yield from _sections(child, (*path, key), f"`{dotted((*path, key))}`")


def _row(path: KeyPath, node: Node) -> str:
    text = " ".join(str(node.get("description", "")).split())
    name = dotted(path)
    marks = {"*e*": name in numbers() and name != "version", "*s*": name in sweepable()}
    only_section = keys(node) and not any(option.get("type") == "string" for option in options(node))
    values = f"see `{name}` below" if only_section else allowed(path)
    cells = [
        f"`{path[-1]}`",
        ", ".join(mark for mark, there in marks.items() if there),
        text,
        values,
        "" if only_section else _default(node),
    ]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _default(node: Node) -> str:
    if "default" not in node:
        return "required"
    value = node["default"]
    return f"`{value}`" if isinstance(value, str) and value else f"`{json.dumps(value, ensure_ascii=False)}`"

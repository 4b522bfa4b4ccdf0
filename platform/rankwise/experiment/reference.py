"""The reference of an experiment file for people: Markdown out of the one description in `schema`."""

from __future__ import annotations

import json
from collections.abc import Iterator

from rankwise.experiment.document import KeyPath, dotted
from rankwise.experiment.fields import Node, allowed, keys, numbers, options, schema, sweepable

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

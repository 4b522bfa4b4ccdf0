"""Checks chat templates for time and memory bombs.

Templates are untrusted programs: they come with bases, adapters and definitions. transformers renders them in Jinja's
immutable sandbox, which protects files, attributes and other objects, but not time and memory. So `guard` parses a
template without computing constants, refuses obvious bombs, and tries it on a few conversations within a step limit.
Branches that no trial reaches are limited only by the deadline of a worker's phase.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from types import FrameType
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_CHARACTERS = 200_000
MAX_STEPS = 200_000
MAX_NUMBER = 1_000_000
_CONVERSATIONS = (
    ("user",),
    ("system", "user", "assistant"),
    ("user", "assistant", "user", "assistant", "user", "assistant"),
)


class TemplateRefused(Exception):
    """Raised when a template could exhaust time or memory; the text gives the reason."""


@functools.lru_cache(maxsize=64)
def guard(text: str) -> None:
    """Check a template for time and memory bombs. Invalid Jinja passes: rendering reports it.

    Raises:
        TemplateRefused: It could exhaust time or memory.
    """
    if len(text) > MAX_CHARACTERS:
        raise TemplateRefused(f"it has {len(text):,} characters; allowed are {MAX_CHARACTERS:,}")
    environment = _Environment(extensions=[_Generation, "jinja2.ext.loopcontrols"])
    try:
        tree = environment.parse(text)
    except (TemplateSyntaxError, RecursionError):
        return
    for node in tree.find_all(nodes.Node):
        _check(node)
    for loop in tree.find_all(nodes.For):
        if _counts(loop) and any(_counts(inner) for part in loop.body for inner in _loops(part)):
            raise TemplateRefused("a loop over range() is inside another one")
    try:
        template = environment.from_string(text)
    except (TemplateSyntaxError, RecursionError):
        return
    for roles in _CONVERSATIONS:
        for prompt in (False, True):
            _try(template.render, _variables(roles, prompt))


class _Environment(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, in which products are looked at before they are made, constants too."""

    intercepted_binops = frozenset({"*"})

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.filters["tojson"] = lambda value, **how: json.dumps(value, default=str)
        self.globals["raise_exception"] = _raise
        self.globals["strftime_now"] = lambda form: "2026-01-01"

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if isinstance(left, str | list | tuple) or isinstance(right, str | list | tuple):
            raise TemplateRefused("it multiplies a text or a list")
        return super().call_binop(context, operator, left, right)


class _Generation(Extension):
    """The tag by which transformers marks an assistant's tokens."""

    tags = {"generation"}  # noqa: RUF012 - Jinja's own form

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


def _check(node: nodes.Node) -> None:
    if isinstance(node, nodes.Const) and isinstance(node.value, int | float) and abs(node.value) > MAX_NUMBER:
        raise TemplateRefused(f"it has the number {node.value!r:.40}; allowed are numbers up to {MAX_NUMBER:,}")
    if isinstance(node, nodes.Pow):
        raise TemplateRefused("it has a power (**)")
    if isinstance(node, nodes.Mul) and any(_is_sequence(side) for side in (node.left, node.right)):
        raise TemplateRefused("it multiplies a text or a list")


def _is_sequence(node: nodes.Expr) -> bool:
    """Whether a product's side is a text or a list by its form; transformers' own environment computes constants."""
    if isinstance(node, nodes.Const):
        return isinstance(node.value, str)
    return isinstance(node, nodes.List | nodes.Tuple | nodes.Concat | nodes.TemplateData)


def _loops(node: nodes.Node) -> Iterator[nodes.For]:
    if isinstance(node, nodes.For):
        yield node
    yield from node.find_all(nodes.For)


def _counts(loop: nodes.For) -> bool:
    calls = [loop.iter, *loop.iter.find_all(nodes.Call)]
    return any(isinstance(c, nodes.Call) and isinstance(c.node, nodes.Name) and c.node.name == "range" for c in calls)


def _variables(roles: tuple[str, ...], prompt: bool) -> dict[str, Any]:
    messages = [{"role": role, "content": f"text {index}"} for index, role in enumerate(roles)]
    tokens = {name: f"<{name}>" for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
    return {"messages": messages, "add_generation_prompt": prompt, "tools": None, "documents": None, **tokens}


def _try(render: Callable[..., str], variables: Mapping[str, Any]) -> None:
    steps = 0

    def count(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal steps
        if frame.f_code.co_filename != "<template>":
            return None
        steps += 1
        if steps > MAX_STEPS:
            raise TemplateRefused(f"it takes more than {MAX_STEPS:,} steps for a short conversation")
        return count

    before = sys.gettrace()
    sys.settrace(count)
    try:
        render(**variables)
    except (TemplateError, TypeError, ValueError, KeyError, ArithmeticError, AttributeError):
        pass  # What it refuses depends on the messages; that is reported with the rows that it refuses.
    except (RecursionError, MemoryError) as error:
        raise TemplateRefused(f"it ends in a {type(error).__name__}") from error
    finally:
        sys.settrace(before)


def _raise(message: str) -> None:
    raise TemplateError(message)

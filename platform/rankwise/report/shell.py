"""Pages that need nothing from outside: style and script are in the page, and its policy (CSP) forbids any request."""

from __future__ import annotations

import base64
from functools import cache
from hashlib import sha256
from importlib.resources import files

import jinja2
from markupsafe import Markup

_PARTS = files("rankwise.report") / "parts"


def render(template: str, **values: object) -> str:
    """A page out of a template of `parts`; every text is escaped, `Markup` is not.

    Args:
        template: Its file name.
        values: What it shows; `page_title` always.
    """
    style, script = _file("report.css"), _file("report.js")
    return (
        _environment()
        .get_template(template)
        .render(
            style=Markup(style), style_hash=_hash(style), script=Markup(script), script_hash=_hash(script), **values
        )
    )


@cache
def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FunctionLoader(_file), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )


@cache
def _file(name: str) -> str:
    return (_PARTS / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    """As a policy names the only style and script that may be used."""
    return "sha256-" + base64.b64encode(sha256(text.encode()).digest()).decode()

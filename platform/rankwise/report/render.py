"""Renders self-contained HTML pages: style and script are inline, and a policy (CSP) forbids all requests."""

from __future__ import annotations

import base64
from functools import cache
from hashlib import sha256
from importlib.resources import files

import jinja2
from markupsafe import Markup

_PARTS = files("rankwise.report") / "parts"


def render(template: str, **values: object) -> str:
    """Render a template of `parts`; every text is escaped, `Markup` is not. `values` must have `page_title`."""
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
    """Return the hash by which the policy allows the style and the script."""
    return "sha256-" + base64.b64encode(sha256(text.encode()).digest()).decode()

"""Secrets are taken out of every text before it is stored or shown."""

from __future__ import annotations

import re

REDACTED = "[redacted]"

# What a secret looks like by itself: prefixes that their issuers made recognisable, keys, signed tokens.
_SHAPES = re.compile(
    r"""
      -----BEGIN[ ][A-Z ]*PRIVATE[ ]KEY-----.*?(?:-----END[ ][A-Z ]*PRIVATE[ ]KEY-----|\Z)
    | \bhf_[A-Za-z0-9]{16,}
    | \bgh[pousr]_[A-Za-z0-9]{20,} | \bgithub_pat_\w{20,} | \bglpat-[\w-]{16,}
    | \bsk-[A-Za-z0-9_-]{20,} | \bxox[abprs]-[\w-]{10,} | \bdapi[0-9a-f]{32}\b
    | \b(?:AKIA|ASIA)[A-Z0-9]{16}\b | \bAIza[\w-]{35}
    | \beyJ[\w-]{10,}\.[\w-]{10,}\.[\w-]*
    """,
    re.VERBOSE | re.DOTALL,
)
# A secret by what stands before it. Code such as `token = next(tokens)` stays: the value must be a quoted literal, or a
# long run of characters without the brackets, dots and spaces of an expression.
_NAMED = re.compile(
    r"""(?P<name>\b[\w.-]*(?:password|passwd|secret|token|api[_-]?key|access[_-]?key|credential)s?["']?\s*[:=]\s*)
        (?: (?P<quote>["'])(?:(?!(?P=quote)).)+(?P=quote)
          | (?=\S*[0-9])[A-Za-z0-9+/=_-]{12,}(?![\w.(\[]) )""",
    re.VERBOSE | re.IGNORECASE,
)
_BEARER = re.compile(r"(?P<name>\b(?:bearer|basic)\s+)[\w.~+/=-]{12,}", re.IGNORECASE)
_USERINFO = re.compile(r"(?P<scheme>\b[a-z][a-z0-9+.-]*://)[^\s/@'\"]+@", re.IGNORECASE)


def redact(text: str) -> str:
    """Replace what looks like a secret: keys, tokens, values of password-like names, the user part of a URL."""

    def named(match: re.Match[str]) -> str:
        quote = match["quote"] or ""
        return f"{match['name']}{quote}{REDACTED}{quote}"

    text = _USERINFO.sub(lambda match: f"{match['scheme']}{REDACTED}@", text)
    text = _SHAPES.sub(REDACTED, text)
    text = _BEARER.sub(lambda match: f"{match['name']}{REDACTED}", text)
    return _NAMED.sub(named, text)

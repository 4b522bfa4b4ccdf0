"""`redact` removes secrets from text before it is stored or shown."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from urllib.parse import unquote, urlsplit

REDACTED = "[redacted]"

# Repetitions that can fail late are bounded, so that the time is linear in the length of any text.
# Secrets with a recognizable shape: issuers' prefixes, private keys, signed tokens.
_SHAPES = re.compile(
    r"""
      -----BEGIN[ ][A-Z ]{0,40}PRIVATE[ ]KEY-----.*?(?:-----END[ ][A-Z ]{0,40}PRIVATE[ ]KEY-----|\Z)
    | \bhf_[A-Za-z0-9]{16,}
    | \bgh[pousr]_[A-Za-z0-9]{20,} | \bgithub_pat_\w{20,} | \bglpat-[\w-]{16,}
    | \bsk-[A-Za-z0-9_-]{20,} | \bxox[abprs]-[\w-]{10,} | \bdapi[0-9a-f]{32}\b
    | \b(?:AKIA|ASIA)[A-Z0-9]{16}\b | \bAIza[\w-]{35}
    | \bpypi-[A-Za-z0-9_-]{40,} | \bnpm_[A-Za-z0-9]{30,}
    | \beyJ[\w-]{10,600}\.[\w-]{10,8000}\.[\w-]*
    """,
    re.VERBOSE | re.DOTALL,
)
# Secrets after a telling name. Code such as `token = next(tokens)` stays: the value must be a quoted literal, or a long
# run of characters without the brackets, dots and spaces of an expression.
_NAMED = re.compile(
    r"""(?P<name>(?:password|passwd|secret|token|(?:api|access|account)[_-]?key|credential)s?["']?\s{0,20}[:=]\s{0,20})
        (?: (?P<quote>["'])(?:(?!(?P=quote)).){1,4000}(?P=quote)
          | (?=\S{0,200}[0-9])[A-Za-z0-9+/=_-]{12,}(?![\w.(\[]) )""",
    re.VERBOSE | re.IGNORECASE,
)
# In shells, environments and libpq's connection strings; also short ones.
_PASSWORD = re.compile(r"(?P<name>(?:password|passwd|pwd)=)(?!\[redacted\])[^\s&;,'\"()]+", re.IGNORECASE)
_BEARER = re.compile(r"(?P<name>\b(?:bearer|basic)\s+)[\w.~+/=-]{12,}", re.IGNORECASE)
# Database URLs allow passwords with a slash. `host:5000/x@y` has a port.
_PASSWORD_WITH_SLASH = re.compile(
    r"(?P<scheme>\b[a-z][a-z0-9+.-]{0,30}://)[^\s/:@'\"\[]{0,200}:(?!\d{1,5}[/?#])(?P<password>[^\s@'\"]{1,500})@",
    re.IGNORECASE,
)
_USERINFO = re.compile(r"(?P<scheme>\b[a-z][a-z0-9+.-]{0,30}://)[^\s/'\"]{1,500}@", re.IGNORECASE)
_QUERY = re.compile(
    r"(?P<name>[?&](?:x-amz-(?:signature|credential|security-token)|sig|signature|token|access_token|auth|api_?key|key)=)"
    r"[^\s&'\"#]+",
    re.IGNORECASE,
)
# Names of variables whose values are secrets.
_SECRET_NAME = re.compile(r"(?:PASSWORD|PASSWD|SECRET|TOKEN|API_?KEY|ACCESS_KEY|CREDENTIALS?)$", re.IGNORECASE)
_SHORTEST = 8
_known: set[str] = set()


def redact(text: str) -> str:
    """Replace everything that looks like a secret: keys, tokens, passwords by name, the user part of a URL.

    Values known from `remember_secrets` are replaced everywhere.
    """

    def named(match: re.Match[str]) -> str:
        quote = match["quote"] or ""
        return f"{match['name']}{quote}{REDACTED}{quote}"

    for value in sorted(_known, key=len, reverse=True):  # A secret may be a prefix of another.
        text = text.replace(value, REDACTED)
    text = _PASSWORD_WITH_SLASH.sub(lambda match: f"{match['scheme']}{REDACTED}@", text)
    text = _USERINFO.sub(lambda match: f"{match['scheme']}{REDACTED}@", text)
    text = _SHAPES.sub(REDACTED, text)
    text = _QUERY.sub(lambda match: f"{match['name']}{REDACTED}", text)
    text = _BEARER.sub(lambda match: f"{match['name']}{REDACTED}", text)
    text = _PASSWORD.sub(lambda match: f"{match['name']}{REDACTED}", text)
    return _NAMED.sub(named, text)


def contains_secret(text: str) -> bool:
    """Whether a text certainly has a secret: a token of a known shape, a private key, a URL with a password."""
    return any(pattern.search(text) for pattern in (_SHAPES, _QUERY, _PASSWORD_WITH_SLASH)) or any(
        ":" in match[0].partition("://")[2] for match in _USERINFO.finditer(text)
    )


def remember_secrets(environment: Mapping[str, str]) -> None:
    """Make `redact` replace the secrets of an environment.

    These are values of at least eight characters of variables such as `HF_TOKEN`, `PGPASSWORD` and
    `AWS_SECRET_ACCESS_KEY`, and the passwords of URLs.
    """
    for name, value in environment.items():
        if _SECRET_NAME.search(name) and not value.startswith("/"):
            _keep([value])
        else:
            _keep(_password(value))


def _keep(values: Iterable[str]) -> None:
    _known.update(value for value in values if len(value) >= _SHORTEST)


def _password(url: str) -> list[str]:
    passwords = [match["password"] for match in _PASSWORD_WITH_SLASH.finditer(url)]
    with suppress(ValueError):
        passwords.append(urlsplit(url).password or "")
    return [*passwords, *map(unquote, passwords)]

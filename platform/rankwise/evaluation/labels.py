"""How metrics and numbers are spelled for people: headings, shares as percent, digits that the error carries."""

from __future__ import annotations

import math

TITLES = {
    "eval.loss": "loss",
    "eval.perplexity": "perplexity",
    "eval.token_accuracy": "token accuracy",
    "eval.exact_match": "exact match",
    "eval.mean_absolute_error": "mean absolute error",
    "eval.mean_relative_error": "mean relative error",
    "eval.within_20_percent": "within 20 %",
    "eval.parse_failures": "parse failures",
}
SHARES = frozenset(
    {
        "eval.token_accuracy",
        "eval.exact_match",
        "eval.mean_relative_error",
        "eval.within_20_percent",
        "eval.parse_failures",
    }
)
# Follow from others, so that they are left out where room is short; `--json` has them.
SECONDARY = frozenset({"eval.perplexity", "eval.mean_relative_error"})
NONE = "-"


def title(key: str) -> str:
    """The metric's name for people."""
    return TITLES.get(key, key.removeprefix("eval.").replace("_", " "))


def format_value(key: str, value: float | None, stderr: float | None = None) -> tuple[str, str]:
    """A value and its standard error as texts, both with the digits that the error supports (two of its own).

    Returns:
        Texts of value and error; the error is empty where there is none, the value a dash where it is not defined.
    """
    if value is None or not math.isfinite(value):
        return NONE, ""
    scale, unit = (100.0, " %") if key in SHARES else (1.0, "")
    shown, error = value * scale, None if stderr is None else stderr * scale
    digits = 3 if abs(shown) < 10 and key not in SHARES else 1
    if error:
        digits = min(max(1 - math.floor(math.log10(error)), 0), 4)
    return f"{shown:,.{digits}f}{unit}", "" if error is None else f"{error:,.{digits}f}"


def with_error(key: str, value: float | None, stderr: float | None = None) -> str:
    """`0.710 ±0.020`."""
    shown, error = format_value(key, value, stderr)
    return f"{shown} ±{error}" if error else shown


def format_count(count: int | None) -> str:
    """`460,800` as `461k`, in a thousand's steps."""
    if count is None:
        return NONE
    if count < 10_000:
        return f"{count:,}"
    return f"{count / 1e3:,.0f}k" if count < 10_000_000 else f"{count / 1e6:,.1f}M"


def format_bytes(count: int | None) -> str:
    """Decimal units: MB is 10^6 bytes."""
    if count is None:
        return NONE
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}" if count / size < 1000 else f"{count / size:,.0f} {unit}"
    return f"{count} B"


def format_seconds(seconds: float | None) -> str:
    """`75.2` as `1m15s`."""
    if seconds is None:
        return NONE
    if seconds < 60:
        return f"{seconds:.1f}s" if seconds < 10 else f"{seconds:.0f}s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s"


def format_param(value: object) -> str:
    """A setting as a person writes it."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    return NONE if value is None else str(value)

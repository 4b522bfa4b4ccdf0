"""Read the number that an answer such as `Price is $1,234.50` gives."""

from __future__ import annotations

import math
import re

# Commas only group thousands ("1,234" is 1234; in "3,5" the number ends before the comma). A minus sign counts where no
# digit or letter stands before it ("10-20" starts with 10). ASCII digits only.
_DIGITS = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+"
_EXPONENT = r"(?:[eE][+-]?[0-9]+)?"
_PLAIN = re.compile(rf"(?P<sign>(?<![0-9A-Za-z])[-\u2212])?(?P<digits>(?:{_DIGITS}){_EXPONENT})")
_CURRENCY = re.compile(
    rf"(?P<sign>(?<![0-9A-Za-z])[-\u2212])?[$€£¥₹]\s*(?P<inner>[-\u2212])?(?P<digits>(?:{_DIGITS}){_EXPONENT})"
)


def parse_number(text: str) -> float | None:
    """Return the number that a text gives, or None when there is none.

    The first number after a currency sign is taken; without a currency sign the first number. So an answer that repeats
    the question ("The 0.23 carat diamond costs $326") is read as it is meant. A number too large for a float counts as
    none.
    """
    match = _CURRENCY.search(text)
    negative = match is not None and bool(match["sign"] or match["inner"])
    if match is None:
        match = _PLAIN.search(text)
        if match is None:
            return None
        negative = bool(match["sign"])
    value = float(match["digits"].replace(",", ""))
    if not math.isfinite(value):
        return None
    return -value if negative else value

"""Runs regular expressions that an adapter of somebody else brings, each with a limit.

peft matches module names with Python's `re`, whose running time can be exponential. Here RE2 matches in linear time
where it has the same meaning as `re`. Other expressions, such as those with a lookahead, run in a child process that
may use `CPU_SECONDS`.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Sequence

CPU_SECONDS = 1
"""Limit for all expressions of one call."""
_WALL_SECONDS = 10.0  # A busy machine may give the child little of its CPU time.
_CHILD_MEMORY = 1 << 30
# RE2's budget for one expression, about 10,000 instructions: a short expression can expand to very many.
_RE2_MEMORY = 256 << 10
_PLAIN = re.compile(r"[\w.-]*", re.ASCII)
# RE2 reads `{,3}` and POSIX classes in another way than `re`, which warns about what may become set operations.
_DIFFERENT = re.compile(r"\{,|\[\[|--|&&|~~|\|\|")
_CHILD = """
import json, re, resource, sys, warnings

warnings.simplefilter("ignore")
given = json.load(sys.stdin)
resource.setrlimit(resource.RLIMIT_CPU, (given["seconds"], given["seconds"] + 1))
resource.setrlimit(resource.RLIMIT_AS, (given["memory"], given["memory"]))
found = []
for pattern in given["patterns"]:
    try:
        compiled = re.compile(pattern)
        found.append([index for index, name in enumerate(given["names"]) if compiled.fullmatch(name)])
    except (re.error, OverflowError, RecursionError, MemoryError) as error:
        found.append(str(error) or type(error).__name__)
print(json.dumps(found))
"""


class PatternError(ValueError):
    """A regular expression is invalid, or exceeded its limit."""


def is_plain(text: str) -> bool:
    """Whether a text consists of letters, digits, `_`, `-` and `.` only, so that it is cheap as an expression."""
    return _PLAIN.fullmatch(text) is not None


def full_matches(patterns: Sequence[str], names: Sequence[str]) -> list[list[str]]:
    """The names that each expression matches as a whole, as `re.fullmatch` decides. Without names: a syntax check.

    Raises:
        PatternError: An expression is invalid, or the limit was reached.
    """
    deadline = time.monotonic() + CPU_SECONDS
    # Outside of ASCII, RE2's classes and `$` differ from those of `re`.
    simple = all(name.isascii() and "\n" not in name for name in names)
    found: dict[int, list[str]] = {}
    for index, pattern in enumerate(patterns):
        if simple and (matched := _with_re2(pattern, names, deadline)) is not None:
            found[index] = matched
    rest = [index for index in range(len(patterns)) if index not in found]
    if rest:
        found.update(zip(rest, _in_child([patterns[index] for index in rest], names), strict=True))
    return [found[index] for index in range(len(patterns))]


def _with_re2(pattern: str, names: Sequence[str], deadline: float) -> list[str] | None:
    """The names that RE2 matches; None if it does not accept the expression, or would read it differently."""
    if not pattern.isascii() or _DIFFERENT.search(pattern):
        return None
    import re2

    options = re2.Options()
    options.log_errors = False
    options.max_mem = _RE2_MEMORY
    try:
        compiled = re2.compile(pattern, options)
    except re2.error:
        return None
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise PatternError(f"{shown(pattern)} is not a valid regular expression: {error}") from error
    matched = []
    for name in names:
        if compiled.fullmatch(name):
            matched.append(name)
        if time.monotonic() > deadline:
            raise _too_slow([pattern], names)
    return matched


def _in_child(patterns: Sequence[str], names: Sequence[str]) -> list[list[str]]:
    given = {"patterns": patterns, "names": names, "seconds": CPU_SECONDS, "memory": _CHILD_MEMORY}
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", _CHILD],
            input=json.dumps(given),
            capture_output=True,
            text=True,
            timeout=_WALL_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise _too_slow(patterns, names) from error
    if done.returncode < 0:
        raise _too_slow(patterns, names)
    if done.returncode:
        raise RuntimeError(f"the process that runs regular expressions failed: {done.stderr.strip()}")
    results: list[list[int] | str] = json.loads(done.stdout)
    for pattern, result in zip(patterns, results, strict=True):
        if isinstance(result, str):
            raise PatternError(f"{shown(pattern)} is not a valid regular expression: {result}")
    return [[names[index] for index in result if isinstance(index, int)] for result in results]


def _too_slow(patterns: Sequence[str], names: Sequence[str]) -> PatternError:
    listed = ", ".join(shown(pattern) for pattern in patterns[:3])
    more = f" and {len(patterns) - 3} more" if len(patterns) > 3 else ""
    return PatternError(
        f"the regular expression {listed}{more} was stopped after {CPU_SECONDS} s over {len(names)} names; replace it "
        "by a list of module names"
    )


def shown(text: str) -> str:
    """A text as in Python's source, shortened to one line."""
    return repr(text) if len(text) <= 100 else f"{text[:100]!r}... ({len(text)} characters)"

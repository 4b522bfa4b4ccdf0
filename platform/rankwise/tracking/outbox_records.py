"""The lines of an outbox, as they are read back from disk: a header, then records. Invalid ones are refused.

A file may have been truncated by a full disk, damaged by a power failure, or written by something else. Whatever passes
here can be sent: a record that could only fail would otherwise be retried as if the store were unavailable.
"""

from __future__ import annotations

import json
import posixpath
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from rankwise.exceptions import TrackingError
from rankwise.records import describe_problem
from rankwise.tracking.values import Context

FORMAT = 2
# Format 1 has neither attempts nor repeated steps: points were compared with the store before they were written.
READABLE = (1, 2)
MAX_LINE = 16 << 20
"""Longer lines are invalid: no record of a run is that long, since the contents of artifacts are in files."""

# PostgreSQL cannot store NUL.
_Text = Annotated[str, Field(pattern=r"^[^\x00]*$")]
_Key = Annotated[str, Field(pattern=r"^[^\x00]+$")]
_Int64 = Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)]
_Milliseconds = Annotated[int, Field(ge=0, lt=1 << 63)]
_Status = Literal["RUNNING", "SCHEDULED", "FINISHED", "FAILED", "KILLED"]


# What Linux allows for a name, and a path that leaves room for the directory of any artifact store.
_LONGEST_NAME = 255
_LONGEST_PATH = 1000


class InvalidOutboxError(TrackingError):
    """Raised when a file is not an outbox."""


class Header(BaseModel):
    """The first line. `tracking_uri` is redacted; `attempt` and `once` are missing in format 1."""

    model_config = ConfigDict(strict=True)

    rankwise_outbox: int
    # MLflow's own rule for run ids.
    run_id: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$", max_length=256)
    tracking_uri: str = Field(pattern=r"^[^\x00-\x1f\x7f]*$", max_length=4096)
    attempt: int | None = Field(default=None, ge=0)
    once: bool = False


def _any_text(value: Any) -> Any:
    if not isinstance(value, str):
        raise ValueError("must be a text")
    return value


# pydantic's `str` refuses lone surrogates, which names of files may have. `DatasetRecord.entity` escapes them.
_AnyText = Annotated[Any, AfterValidator(_any_text)]


def _artifact_path(path: str) -> str:
    if posixpath.normpath(path) != path or path.startswith(("/", "..")) or path == "." or "\0" in path:
        raise ValueError("an artifact path must be relative and normalized (`dir/name.ext`)")
    if len(path.encode()) > _LONGEST_PATH or any(len(part.encode()) > _LONGEST_NAME for part in path.split("/")):
        raise ValueError(f"an artifact path has at most {_LONGEST_PATH} bytes, and {_LONGEST_NAME} a part")
    return path


def _file_name(name: str) -> str:
    if "/" in name or "\0" in name or name in {"", ".", ".."}:
        raise ValueError("the name of a file in the outbox's directory must have no directory")
    if len(name.encode()) > _LONGEST_NAME:
        raise ValueError(f"the name of a file has at most {_LONGEST_NAME} bytes")
    return name


class _Record(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")


class _Points(_Record):
    m: dict[_Key, float] = Field(min_length=1)
    s: _Int64
    t: _Milliseconds


class _Params(_Record):
    params: dict[_Key, _Text] = Field(min_length=1)


class _Tags(_Record):
    tags: dict[_Key, _Text] = Field(min_length=1)


class _Dataset(_Record):
    """The fields of `DatasetRecord`."""

    name: _AnyText
    digest: _Text
    source: _AnyText
    source_type: _Text
    context: Context
    columns: dict[_AnyText, _AnyText] = Field(default_factory=dict)
    profile: dict[_AnyText, Any] = Field(default_factory=dict)


class _Input(_Record):
    input: _Dataset


class _Artifact(_Record):
    file: Annotated[str, AfterValidator(_file_name)]
    to: Annotated[str, AfterValidator(_artifact_path)]
    table: bool


class _Start(_Record):
    status: _Status


class _End(_Record):
    end: _Status
    t: _Milliseconds


_KINDS: Mapping[str, type[_Record]] = {
    "m": _Points,
    "params": _Params,
    "tags": _Tags,
    "input": _Input,
    "file": _Artifact,
    "status": _Start,
    "end": _End,
}


def kind_of(record: Mapping[str, Any] | None) -> str:
    """The kind of a record: its first key; `?` for an invalid line."""
    kind = "?" if record is None else next(iter(record), "?")
    return kind if kind in _KINDS else "?"


def parse_record(line: bytes) -> tuple[Mapping[str, Any] | None, str | None]:
    """The record of a line, and None; or None, and why the line is invalid."""
    try:
        record = json.loads(line)
    except ValueError as error:
        return None, f"not JSON: {error}"
    except RecursionError:
        return None, "not a record: it is nested too deeply"
    kind = kind_of(record) if isinstance(record, dict) else "?"
    if kind not in _KINDS:
        return None, f"not a record: it must be an object that starts with one of {', '.join(_KINDS)}"
    try:
        _KINDS[kind].model_validate(record)
    except ValidationError as error:
        return None, describe_problem(error)
    return record, None


def parse_header(path: Path, line: bytes) -> Header:
    """The header of a file.

    Raises:
        InvalidOutboxError: The file is not an outbox.
        TrackingError: A newer release wrote it.
    """
    try:
        values = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InvalidOutboxError(f"{path} is not an outbox file: its first line is not JSON: {error}") from None
    if not isinstance(values, dict) or "rankwise_outbox" not in values:
        raise InvalidOutboxError(f"{path} is not an outbox file: its first line has no 'rankwise_outbox'")
    number = values["rankwise_outbox"]
    if type(number) is int and number > max(READABLE):
        raise TrackingError(
            f"{path} has outbox format {number}; this release reads {' and '.join(map(str, READABLE))}. Run "
            "`rankwise sync` with the release that wrote it"
        )
    try:
        header = Header.model_validate(values)
    except ValidationError as error:
        raise InvalidOutboxError(f"{path} is not an outbox file: its first line: {describe_problem(error)}") from None
    if header.rankwise_outbox not in READABLE:
        raise InvalidOutboxError(f"{path} is not an outbox file: there is no format {header.rankwise_outbox}")
    if path.name.partition(".")[0] != header.run_id:
        raise InvalidOutboxError(f"{path} is not an outbox file: its first line is for another run, {header.run_id}")
    return header

"""One row's answer."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What became of one row: a text, or the error that it met.

    Attributes:
        model: `models:/NAME/VERSION`, or what else was asked for.
        version: Of the registered model; None for a directory or a LoggedModel.
        adapter_sha256: Digest (`sha256:...`) of the manifest that covers all of the adapter's files.
        base_fingerprint: Of the base that it ran over.
        text: The answer; None where there is an error.
        finish_reason: `stop` or `length`.
        prompt_tokens: Tokens of the rendered prompt.
        completion_tokens: Tokens of the answer, the end token included.
        error: Why there is no answer.
    """

    model: str | None = None
    version: str | None = None
    adapter_sha256: str | None = None
    base_fingerprint: str | None = None
    text: str | None = None
    finish_reason: str | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    error: str | None = None

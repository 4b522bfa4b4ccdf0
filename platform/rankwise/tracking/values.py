"""Texts as every store takes them.

- Data sets as inputs of a run: name, digest, source, schema, size, and whether they trained or evaluated.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from mlflow.entities import Dataset, DatasetInput, InputTag

from rankwise.compat.mlflow import DATASET_COLUMNS, DATASET_CONTEXT
from rankwise.redact import redact


def storable(text: str) -> str:
    """The text without secrets, NUL and halves of surrogate pairs, which are written as escapes.

    PostgreSQL has no NUL in texts. A half of a pair (of a file's name that is no UTF-8, say) has no encoding: the store
    would fail at every attempt, as if it were away, and hold up all that the run has to say after it.
    """
    return encoded(redact(text)).decode().replace("\0", "\\x00")


def encoded(text: str) -> bytes:
    """The text as UTF-8, halves of surrogate pairs as escapes."""
    return text.encode(errors="backslashreplace")


Context = Literal["train", "eval", "predict"]
# MLflow's column holds 36 characters.
_DIGEST_LENGTH = 36


@dataclass(frozen=True, kw_only=True)
class DatasetRecord:
    """One data set.

    Attributes:
        name: As shown in the UI, such as the file's name.
        digest: The caller's digest, `sha256:<64 hex>`; MLflow shows its first digits, a tag of the input holds all.
        source: As written in the experiment file, with its pin where there is one.
        source_type: `local`, `hugging_face` or `pypi`.
        context: What the run does with it.
        columns: Name to type, for the schema.
        profile: Numbers such as rows and tokens.
    """

    name: str
    digest: str
    source: str
    source_type: str
    context: Context
    columns: Mapping[str, str] = field(default_factory=dict)
    profile: Mapping[str, Any] = field(default_factory=dict)

    @property
    def short_digest(self) -> str:
        """As much of the digest as MLflow's column holds."""
        return self.digest.rpartition(":")[2][:_DIGEST_LENGTH]

    def entity(self) -> DatasetInput:
        """MLflow's form of it."""
        schema = {
            DATASET_COLUMNS: [{"type": kind, "name": name, "required": True} for name, kind in self.columns.items()]
        }
        dataset = Dataset(
            name=storable(self.name)[:500],
            digest=self.short_digest,
            source_type=self.source_type,
            source=json.dumps({"uri": storable(self.source)}),
            schema=json.dumps(schema) if self.columns else None,
            profile=json.dumps(dict(self.profile)) if self.profile else None,
        )
        return DatasetInput(
            dataset=dataset,
            tags=[
                InputTag(key=DATASET_CONTEXT, value=self.context),
                InputTag(key="rankwise.digest", value=self.digest),
            ],
        )

"""Texts and data set records in a form that every MLflow store accepts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from mlflow.entities import Dataset, DatasetInput, InputTag

from rankwise.compat.mlflow import DATASET_COLUMNS, DATASET_CONTEXT
from rankwise.redact import redact


def storable(text: str) -> str:
    """Redact secrets, and escape NUL (PostgreSQL cannot store it) and lone surrogates.

    A lone surrogate, e.g. from a file name that is not UTF-8, cannot be encoded: every delivery would fail as in an
    outage.
    """
    return encoded(redact(text)).decode().replace("\0", "\\x00")


def encoded(text: str) -> bytes:
    """Encode as UTF-8, with lone surrogates as escapes."""
    return text.encode(errors="backslashreplace")


Context = Literal["train", "eval", "predict"]
_DIGEST_LENGTH = 36  # The width of MLflow's column.


@dataclass(frozen=True, kw_only=True)
class DatasetRecord:
    """A data set as an input of a run.

    `name` is shown in the UI; `digest` is `sha256:<64 hex>`; `source` is as written in the experiment file;
    `source_type` is `local`, `hugging_face` or `pypi`; `columns` maps names to types; `profile` has numbers such as
    rows and tokens.
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
        """The digest cut to the width of MLflow's column."""
        return self.digest.rpartition(":")[2][:_DIGEST_LENGTH]

    def entity(self) -> DatasetInput:
        """Return MLflow's entity."""
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

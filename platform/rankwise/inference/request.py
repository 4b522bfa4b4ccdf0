"""What is asked of a table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Self

from rankwise.inference.predictor import BATCH_SIZE
from rankwise.modeling.generation import Decoding

SHARD_ROWS = 256


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is asked of a table.

    Attributes:
        models: URIs; the first answers rows that name none.
        model_column: The column in which a row may name its model.
        prompt: A template over columns; None for the columns `messages` or `prompt`.
        decoding: How tokens are chosen.
        seed: Of sampling.
        base_model: Where the base is, if not where it was recorded.
        allow_base_mismatch: Take another base all the same.
        device: `cpu`, `cuda:1`, ...; None for the first GPU, else the CPU.
        batch_size: Rows that are decoded together. It takes no part in the answers.
        shard_rows: Rows between two savings. It takes no part in the answers.
        fail_fast: Stop at the first row that cannot be answered.
    """

    models: tuple[str, ...] = ()
    model_column: str = "model"
    prompt: str | None = None
    decoding: Decoding = field(default_factory=Decoding)
    seed: int = 0
    base_model: str | None = None
    allow_base_mismatch: bool = False
    device: str | None = None
    batch_size: int = BATCH_SIZE
    shard_rows: int = SHARD_ROWS
    fail_fast: bool = False

    def identity(self, input_digest: str) -> dict[str, Any]:
        """What decides the answers, as plain values."""
        return {
            "input": input_digest,
            "models": list(self.models),
            "model_column": self.model_column,
            "prompt": self.prompt,
            "max_new_tokens": self.decoding.max_new_tokens,
            "temperature": self.decoding.temperature,
            "top_k": self.decoding.top_k,
            "top_p": self.decoding.top_p,
            "stop": list(self.decoding.stop),
            "seed": self.seed,
            "base_model": self.base_model,
            "allow_base_mismatch": self.allow_base_mismatch,
        }

    def to_json(self) -> dict[str, Any]:
        """All of it, for the row of a job."""
        return asdict(self)

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of `to_json`."""
        decoding = {**values["decoding"], "stop": tuple(values["decoding"]["stop"])}
        return cls(**{**values, "models": tuple(values["models"]), "decoding": Decoding(**decoding)})

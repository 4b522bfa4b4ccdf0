"""Rows of the embedding: an adapter cannot stand for rows that its base does not have, unless it brings them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from peft import LoraConfig

from rankwise.assets.layout import read_json
from rankwise.exceptions import BaseMismatchError


def embedding_rows(model: Any) -> int:
    """The number of tokens that the model's input embedding has rows for."""
    return int(model.get_input_embeddings().weight.shape[0])


def check_rows(model: Any, config: LoraConfig, base_path: Path) -> None:
    """Refuse an adapter over a resized embedding, unless all new rows are stored with it.

    Args:
        model: The adapted model.
        config: The adapter's configuration; `trainable_token_indices` names the rows that are stored.
        base_path: The base's directory, whose `config.json` says how many rows it has.

    Raises:
        BaseMismatchError: Rows beyond the base's are not stored.
    """
    values = read_json(base_path / "config.json")
    recorded = values.get("vocab_size", values.get("text_config", {}).get("vocab_size"))
    rows = embedding_rows(model)
    if recorded is None or rows == recorded:
        return
    stored = set(token_indices(config))
    lost = [row for row in range(int(recorded), rows) if row not in stored]
    head = model.get_output_embeddings()
    tied = head is None or bool(getattr(model.config, "tie_word_embeddings", False))
    if rows > recorded and not lost and (tied or isinstance(config.trainable_token_indices, dict)):
        return
    raise BaseMismatchError(
        f"the model's embedding has {rows} rows, its base {base_path} has {recorded}: the new rows are not stored with "
        f"the adapter{f' ({len(lost)} of them, from {lost[0]})' if lost else ''}, so it could not be loaded over its "
        "base again. Use tokens within the base's rows, or train the new rows with "
        "LoraConfig(trainable_token_indices=...)"
    )


def check_indices(model: Any, config: LoraConfig) -> None:
    """Refuse an adapter with rows for tokens that the model's embedding does not have.

    Raises:
        BaseMismatchError: An index is beyond the embedding.
    """
    rows = embedding_rows(model)
    beyond = sorted(index for index in set(token_indices(config)) if not 0 <= index < rows)
    if beyond:
        raise BaseMismatchError(
            f"the adapter has rows for tokens {beyond[:5]}, the base's embedding has {rows} rows; resize the embedding "
            "first (`model.resize_token_embeddings`), as it was when the adapter was trained"
        )


def token_indices(config: LoraConfig) -> Iterable[int]:
    """The token ids of all rows stored with an adapter."""
    indices = config.trainable_token_indices or []
    if isinstance(indices, dict):
        return [int(index) for entries in indices.values() for index in entries]
    return [int(index) for index in indices]

"""Rows of the embedding: an adapter cannot stand for rows that its base does not have, unless it brings them.

An adapter brings rows by `LoraConfig(trainable_token_indices=...)`: they are stored with it. One that brings all rows
beyond the base's is loaded over the base with as many rows added; what these hold does not matter, since the adapter's
own take their place.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig

from rankwise.assets.layout import read_json
from rankwise.exceptions import BaseMismatchError


def plain_module(module: Any) -> Any:
    """An embedding or a head without what peft has wrapped around it.

    The weight of peft's wrapper is a copy of the whole embedding with the adapter's rows in it, made at every look.
    """
    module = getattr(module, "original_module", None) or module
    return module.get_base_layer() if hasattr(module, "get_base_layer") else module


def embedding_rows(model: Any) -> int:
    """The number of tokens that the model's input embedding has rows for."""
    return int(plain_module(model.get_input_embeddings()).weight.shape[0])


def base_rows(base_path: Path) -> int | None:
    """The number of rows that a base's directory has; None where its `config.json` does not say."""
    values = read_json(base_path / "config.json")
    recorded = values.get("vocab_size", values.get("text_config", {}).get("vocab_size"))
    return None if recorded is None else int(recorded)


def rows_needed(config: LoraConfig, rows: int) -> int:
    """The number of rows that an adapter needs over a base with `rows`: more, where it brings some beyond them."""
    return max(rows, max(token_indices(config), default=-1) + 1)


def check_rows(model: Any, config: LoraConfig, base_path: Path) -> None:
    """Refuse an adapter over a resized embedding, unless all new rows are stored with it.

    Args:
        model: The adapted model.
        config: The adapter's configuration; `trainable_token_indices` names the rows that are stored.
        base_path: The base's directory, whose `config.json` says how many rows it has.

    Raises:
        BaseMismatchError: Rows beyond the base's are not stored.
    """
    recorded, rows = base_rows(base_path), embedding_rows(model)
    if recorded is None or rows == recorded:
        return
    if rows > recorded and not (lost := _lost(model, config, recorded, rows)):
        return
    named = f" ({len(lost)} of them, from {lost[0]})" if rows > recorded and lost else ""
    raise BaseMismatchError(
        f"the model's embedding has {rows} rows, its base {base_path} has {recorded}: the new rows are not stored with "
        f"the adapter{named}, so it could not be loaded over its base again. Use tokens within the base's rows, or "
        "train the new rows of the embedding, and of a head of its own, with LoraConfig(trainable_token_indices=...)"
    )


def add_rows(model: Any, config: LoraConfig) -> bool:
    """Give a bare base the rows that an adapter brings; nothing is done where it brings none beyond the base's.

    Args:
        model: A base without adapters: its embedding is replaced by a larger one.
        config: The configuration of the adapter that is to be attached next.

    Returns:
        Whether rows were added.

    Raises:
        BaseMismatchError: The adapter does not bring all rows up to its highest one.
    """
    rows = embedding_rows(model)
    needed = rows_needed(config, rows)
    if needed == rows:
        return False
    if lost := _lost(model, config, rows, needed):
        raise BaseMismatchError(
            f"the adapter has rows for tokens up to {needed - 1}, the base's embedding has {rows} rows, and those "
            f"between are not all stored with the adapter ({len(lost)} are not, from {lost[0]}): what they were is "
            "not known. Take a base with more rows, or train the adapter again with all new rows in "
            "LoraConfig(trainable_token_indices=...)"
        )
    device = model.get_input_embeddings().weight.device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        model.resize_token_embeddings(needed, mean_resizing=False)
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        if module is not None:
            module.weight.data[rows:] = 0
    model.requires_grad_(False)
    return True


def check_indices(model: Any, config: LoraConfig) -> None:
    """Refuse an adapter with rows for tokens that the model's embedding does not have.

    Raises:
        BaseMismatchError: An index is beyond the embedding.
    """
    rows = embedding_rows(model)
    beyond = sorted(index for index in set(token_indices(config)) if not 0 <= index < rows)
    if beyond:
        raise BaseMismatchError(
            f"the adapter has rows for tokens {beyond[:5]}, the base's embedding has {rows} rows; add rows first "
            "(`rankwise.modeling.embeddings.add_rows`), as `rankwise.flavor.load_model` does"
        )


def token_indices(config: LoraConfig) -> list[int]:
    """The token ids of all rows stored with an adapter."""
    return [index for entries in _entries(config) for index in entries]


def _entries(config: LoraConfig) -> list[list[int]]:
    """The stored token ids, a list for each embedding that has some."""
    indices = config.trainable_token_indices or []
    lists = list(indices.values()) if isinstance(indices, dict) else [indices]
    return [[int(index) for index in entries] for entries in lists]


def _lost(model: Any, config: LoraConfig, start: int, stop: int) -> list[int]:
    """Rows from `start` up to `stop` that are not stored for the embedding, or not for a head of its own."""
    head = plain_module(model.get_output_embeddings())
    tied = head is None or bool(getattr(model.config, "tie_word_embeddings", False))
    entries = _entries(config)
    if not tied and (len(entries) < 2 or getattr(head, "bias", None) is not None):
        # A head with a bias has one more number a row, which peft does not store.
        return list(range(start, stop))
    return [row for row in range(start, stop) if not all(row in one for one in entries)]

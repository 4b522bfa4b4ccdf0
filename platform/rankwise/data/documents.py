"""Documents to tokens, for continued pretraining: no question, no answer, every token is learned.

To train on, documents form one stream, each followed by the end token (and begun with the tokenizer's first token,
where the tokenizer itself begins a text with one). The stream is cut into windows of the length limit, so that nothing
is padded; only the last window is shorter. To evaluate, each document is cut into windows of its own, after the token
that comes before a document in the stream: its loss is then a measurement of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from rankwise.data.template import Renderer, begins_with_bos
from rankwise.data.tokens import BLOCK_ROWS, Encoded, EncodedSet
from rankwise.exceptions import DatasetError
from rankwise.reporter import SILENT, Reporter

if TYPE_CHECKING:
    from rankwise.data.rows import Example


def windows(
    documents: Sequence[Example],
    renderer: Renderer,
    max_length: int,
    *,
    joined: bool,
    progress: Reporter | None = None,
) -> EncodedSet:
    """Cut documents into windows.

    Args:
        documents: Examples whose completion is the document.
        renderer: Of the base's tokenizer.
        max_length: Tokens of a window.
        joined: Whether windows run across documents (to train on), each with the id of the document it begins in;
            otherwise each window has tokens of one document.
        progress: Reports finished documents.

    Raises:
        DatasetError: The tokenizer has no end token.
    """
    end = renderer.tokenizer.eos_token_id
    if end is None:
        raise DatasetError(
            "dataset.format: text joins documents with the end token, but the base's tokenizer has no eos_token"
        )
    rows: list[Encoded] = []
    lengths: list[int] = []
    held = np.empty(0, np.int32)
    owner: str | None = None
    for example, tokens in _tokens(documents, renderer, int(end), progress):
        lengths.append(len(tokens))
        if not joined:
            before = [] if begins_with_bos(renderer.tokenizer) else [int(end)]
            own = np.concatenate([np.asarray(before, np.int32), tokens])
            rows += [_window(example.id, own[at : at + max_length]) for at in range(0, len(own), max_length)]
            continue
        owner = example.id if owner is None else owner
        held = np.concatenate([held, tokens])
        at = 0
        while len(held) - at >= max_length:
            rows.append(_window(owner, held[at : at + max_length]))
            at += max_length
            owner = example.id
        held = held[at:]
        if not len(held):
            owner = None
    if len(held) and owner is not None:
        rows.append(_window(owner, held))
    # A window of one token has nothing to predict.
    return EncodedSet.of(
        [row for row in rows if len(row.input_ids) > 1], longest=max(lengths, default=0), whole_lengths=lengths
    )


def _window(row_id: str, tokens: npt.NDArray[np.int32]) -> Encoded:
    supervised = np.ones(len(tokens), np.bool_)
    supervised[0] = False
    return Encoded(id=row_id, input_ids=tokens.astype(np.int32), supervised=supervised)


def _tokens(
    documents: Sequence[Example], renderer: Renderer, end: int, progress: Reporter | None
) -> Iterator[tuple[Example, npt.NDArray[np.int32]]]:
    first = [renderer.tokenizer.bos_token_id] if begins_with_bos(renderer.tokenizer) else []
    with (progress or SILENT).task("tokenizing", len(documents), "rows") as advance:
        for start in range(0, len(documents), BLOCK_ROWS):
            block = documents[start : start + BLOCK_ROWS]
            for example, tokens in zip(block, renderer.tokens([each.completion for each in block]), strict=True):
                yield example, np.asarray([*first, *tokens, end], np.int32)
            advance(len(block))

"""The answers of an input's shards, one shard after another."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path

from rankwise.assets.progress import Progress
from rankwise.exceptions import AdapterIntegrityError, JobError
from rankwise.flavor.loading import LoadedAdapter
from rankwise.inference.answer import Answer
from rankwise.inference.predictor import Predictor
from rankwise.inference.prompts import PromptReader
from rankwise.inference.request import Request
from rankwise.inference.shards import Manifest
from rankwise.inference.survey import named_model
from rankwise.inference.tables import Row, read_rows


def check_adapters(manifest: Manifest, adapters: Mapping[str, LoadedAdapter]) -> None:
    """Refuse adapters that are not those with which the prediction began.

    Raises:
        AdapterIntegrityError: A version has other files than it had.
    """
    for uri, adapter in adapters.items():
        recorded = manifest.adapters.get(uri)
        if recorded is not None and recorded != adapter.metadata.manifest:
            raise AdapterIntegrityError(
                f"{uri} is another adapter ({adapter.metadata.manifest}) than the one that the prediction began with "
                f"({recorded}); begin anew with --restart"
            )


def answer_shards(
    request: Request,
    manifest: Manifest,
    source: Path,
    wanted: Collection[int],
    predictor: Predictor,
    progress: Progress | None = None,
) -> Iterator[tuple[int, list[Answer]]]:
    """Answer some shards of an input.

    Args:
        request: What is asked.
        manifest: What was written down when it began.
        source: The input.
        wanted: Which shards.
        predictor: Has all models of the manifest.
        progress: Told of rows within a shard.

    Yields:
        A shard and the answers of its rows, in order.

    Raises:
        JobError: A row cannot be answered, with `fail_fast`.
        AssetError: The input cannot be read.
    """
    reader = PromptReader.parse(request.prompt)
    rows = read_rows(source)
    for shard in range(max(wanted, default=-1) + 1):
        some = list(islice(rows, manifest.shard_rows))
        if shard in wanted:
            yield shard, _answer(request, manifest, predictor, reader, some, progress)


def _answer(
    request: Request,
    manifest: Manifest,
    predictor: Predictor,
    reader: PromptReader,
    rows: Sequence[Row],
    progress: Progress | None,
) -> list[Answer]:
    answers = {row.index: Answer(error=row.error) for row in rows if row.error is not None}
    if request.fail_fast and answers:
        index = min(answers)
        raise JobError(f"row {index}: {answers[index].error}")
    readable = [row for row in rows if row.error is None]
    named = [named_model(row.columns, request.model_column) or request.models[0] for row in readable]
    decoding = request.decoding
    made = predictor.predict(
        [manifest.survey.typed(row.columns) for row in readable],
        models=[manifest.models[name] for name in named],
        prompt=reader,
        max_new_tokens=decoding.max_new_tokens,
        temperature=decoding.temperature,
        top_k=decoding.top_k,
        top_p=decoding.top_p,
        stop=decoding.stop,
        seed=request.seed,
        places=[row.index for row in readable],
        batch_size=request.batch_size,
        fail_fast=request.fail_fast,
        progress=progress,
    )
    answers |= {row.index: answer for row, answer in zip(readable, made, strict=True)}
    return [answers[row.index] for row in rows]

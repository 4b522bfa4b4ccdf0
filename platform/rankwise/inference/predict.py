"""Files in, files out: answer the rows of a table with registered adapters, resumably."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from rankwise.assets.digest import file_digest
from rankwise.assets.progress import SILENT, Progress
from rankwise.exceptions import AssetError, ConfigError, JobError, TrackingError
from rankwise.flavor.fetch import resolve_uri
from rankwise.inference.answer import Answer
from rankwise.inference.output import write_output
from rankwise.inference.predictor import BATCH_SIZE, Predictor
from rankwise.inference.prompts import PromptReader
from rankwise.inference.shards import Manifest, Parts
from rankwise.inference.survey import Survey, named_model, survey
from rankwise.inference.tables import Row, read_rows, table_format
from rankwise.modeling.generation import Decoding
from rankwise.settings import Settings

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
            "top_p": self.decoding.top_p,
            "stop": list(self.decoding.stop),
            "seed": self.seed,
            "base_model": self.base_model,
            "allow_base_mismatch": self.allow_base_mismatch,
        }


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What a prediction did.

    Attributes:
        output: The file.
        rows: Rows of the input and of the output.
        failed: Those with an error in place of an answer.
        reused: Rows whose answers an earlier run had made.
        models: The resolved URI of each model asked for.
        completion_tokens: Tokens generated now.
        seconds: Of generating, loading apart.
    """

    output: Path
    rows: int
    failed: int
    reused: int
    models: Mapping[str, str]
    completion_tokens: int
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """As `predict --json` prints it."""
        return {
            "output": str(self.output),
            "rows": self.rows,
            "failed": self.failed,
            "reused": self.reused,
            "models": dict(self.models),
            "completion_tokens": self.completion_tokens,
            "seconds": self.seconds,
        }


def predict_file(
    request: Request,
    source: Path,
    output: Path,
    *,
    settings: Settings,
    tracking_uri: str | None = None,
    overwrite: bool = False,
    restart: bool = False,
    progress: Progress = SILENT,
) -> Summary:
    """Answer every row of a table.

    Answers are kept in `OUTPUT.parts/` shard by shard; the same call after any interruption goes on there, and the
    output appears whole at the end, each row once, in the order of the input.

    Args:
        request: What is asked.
        source: The table: `.jsonl`, `.csv` or `.parquet`.
        output: Where the answers go; likewise.
        settings: Where bases and caches are.
        tracking_uri: Of the registry; MLflow's current one by default.
        overwrite: Replace an output that is there.
        restart: Throw away what an interrupted run has done.
        progress: Told of rows.

    Raises:
        ConfigError: The request, or what an earlier run began, does not fit; the output is there already.
        AssetError: The input cannot be read, or the base is not to be found.
        JobError: A row cannot be answered, with `fail_fast`.
        TrackingError: The registry cannot be reached, or has no such model.
        BaseMismatchError: The adapters lie over different bases.
        AdapterIntegrityError: An adapter is not what was stored.
    """
    table_format(source)
    form = table_format(output)
    if source.resolve() == output.resolve():
        raise ConfigError(f"the output {output} is the input; name another file")
    digest = file_digest(source, settings, progress=progress)
    parts = Parts(output)
    with parts.held():
        if restart:
            parts.remove()
        known = parts.manifest()
        if output.exists() and known is None and not overwrite:
            parts.remove()
            raise ConfigError(f"{output} is there already; name another file, or replace it with --overwrite")
        found = survey(source, request.model_column, progress)
        _check_types(form, source, found)
        reader = PromptReader.parse(request.prompt)
        if reader.template is not None and found.rows:
            reader.template.check(found.columns)
        manifest = _manifest(request, digest, found, known, parts, tracking_uri)
        left = [shard for shard in range(manifest.shards) if not parts.has(shard)]
        tokens, seconds = 0, 0.0
        if left:
            tokens, seconds = _answer(
                request, source, manifest, left, parts, found, reader, settings, tracking_uri, progress
            )
        if file_digest(source, settings) != digest:
            raise AssetError(f"{source} changed while it was worked on; begin anew with --restart")
        failed = write_output(source, output, parts.answers(manifest), list(found.columns))
        parts.remove()
    return Summary(
        output=output,
        rows=manifest.rows,
        failed=failed,
        reused=manifest.rows - sum(len(manifest.span(shard)) for shard in left),
        models=manifest.models,
        completion_tokens=tokens,
        seconds=seconds,
    )


def _check_types(form: str, source: Path, found: Survey) -> None:
    if form == ".parquet" and table_format(source) != ".parquet" and (mixed := found.mixed()):
        shown = "; ".join(f"{name}: {', '.join(kinds)}" for name, kinds in mixed.items())
        raise ConfigError(
            f"a column of Parquet has one type, and {source} has columns of several ({shown}); write .jsonl"
        )


def _manifest(
    request: Request,
    digest: str,
    found: Survey,
    known: Manifest | None,
    parts: Parts,
    tracking_uri: str | None,
) -> Manifest:
    """What was begun, if it is the same; else what begins now."""
    identity = request.identity(digest)
    if known is not None:
        differs = [
            f"{key} was {known.request.get(key)!r}, is {value!r}"
            for key, value in identity.items()
            if known.request.get(key) != value
        ]
        if differs:
            raise ConfigError(
                f"{parts.directory} holds the beginning of another prediction ({'; '.join(differs)}); finish that one "
                "with its own command, or throw it away with --restart"
            )
        return known
    if found.unnamed and not request.models:
        raise ConfigError(
            f"{found.unnamed} of {found.rows} rows name no model in a column {request.model_column!r}; give the one "
            "that answers them with --model"
        )
    models = _resolve(request, found, tracking_uri)
    manifest = Manifest(request=identity, models=models, rows=found.rows, shard_rows=request.shard_rows)
    parts.begin(manifest)
    return manifest


def _resolve(request: Request, found: Survey, tracking_uri: str | None) -> dict[str, str]:
    """The version of each model, decided once. All that cannot be found are named together."""
    models: dict[str, str] = {}
    problems: list[str] = []
    for name in dict.fromkeys([*request.models, *found.models]):
        try:
            models[name] = resolve_uri(name, tracking_uri).uri
        except (AssetError, ConfigError, TrackingError) as error:
            asked = f" (named by {found.models[name]} rows)" if name in found.models else ""
            problems.append(f"{name}{asked}: {error}")
    if problems:
        raise ConfigError("\n".join(["models that cannot be found:", *problems]), tuple(problems))
    return models


def _answer(
    request: Request,
    source: Path,
    manifest: Manifest,
    left: Sequence[int],
    parts: Parts,
    found: Survey,
    reader: PromptReader,
    settings: Settings,
    tracking_uri: str | None,
    progress: Progress,
) -> tuple[int, float]:
    """Make the shards that are missing; tokens generated and seconds taken."""
    uris = list(dict.fromkeys(manifest.models.values()))
    with progress.task(f"loading {len(uris)} adapters and their base", None, "adapters"):
        predictor = Predictor.load(
            uris,
            base_model=request.base_model,
            allow_base_mismatch=request.allow_base_mismatch,
            device=request.device,
            settings=settings,
            tracking_uri=tracking_uri,
        )
    tokens, began = 0, time.perf_counter()
    wanted = set(left)
    total = sum(len(manifest.span(shard)) for shard in left)
    with predictor, progress.task("answering", total, "rows") as advance:
        for shard, rows in enumerate(_shards(source, manifest)):
            if shard not in wanted:
                continue
            answers = _answer_rows(request, manifest, predictor, reader, found, rows)
            parts.write(shard, answers)
            tokens += sum(answer.completion_tokens or 0 for answer in answers)
            advance(len(rows))
    return tokens, time.perf_counter() - began


def _shards(source: Path, manifest: Manifest) -> Iterator[list[Row]]:
    rows = read_rows(source)
    while shard := list(islice(rows, manifest.shard_rows)):
        yield shard


def _answer_rows(
    request: Request, manifest: Manifest, predictor: Predictor, reader: PromptReader, found: Survey, rows: Sequence[Row]
) -> list[Answer]:
    answers = {row.index: Answer(error=row.error) for row in rows if row.error is not None}
    if request.fail_fast and answers:
        index = min(answers)
        raise JobError(f"row {index}: {answers[index].error}")
    readable = [row for row in rows if row.error is None]
    named = [named_model(row.columns, request.model_column) or request.models[0] for row in readable]
    decoding = request.decoding
    made = predictor.predict(
        [found.typed(row.columns) for row in readable],
        models=[manifest.models[name] for name in named],
        prompt=reader,
        max_new_tokens=decoding.max_new_tokens,
        temperature=decoding.temperature,
        top_p=decoding.top_p,
        stop=decoding.stop,
        seed=request.seed,
        places=[row.index for row in readable],
        batch_size=request.batch_size,
        fail_fast=request.fail_fast,
    )
    answers |= {row.index: answer for row, answer in zip(readable, made, strict=True)}
    return [answers[row.index] for row in rows]

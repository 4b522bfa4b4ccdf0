"""Predict a table file: plan, answer its shards resumably, and write the output.

1. `plan` reads the input once and fixes the models, the rows and the shards.
2. `answer_shards` answers shards.
3. `write_output` joins the input rows with their answers.

`predict_file` runs all steps in one process; `tasks.predict` runs them as jobs of the queue.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from rankwise.data.prompting import FIRST_READING
from rankwise.data.row_template import RowTemplate
from rankwise.data.tables import TableRow, table_kind
from rankwise.exceptions import AdapterIntegrityError, AssetError, ConfigError, JobError, TrackingError
from rankwise.flavor.fetch import Origin, check, resolve_uri
from rankwise.flavor.load import LoadedAdapter
from rankwise.flavor.metadata import MANIFEST_TAG
from rankwise.inference.output import output_format, write_rows
from rankwise.inference.predictor import Answer, Predictor
from rankwise.inference.shards import JobsStatus, Manifest, Parts, QueuedJobs, Request
from rankwise.inference.source import InputChangedError, Source, Survey, named_model
from rankwise.reporter import SILENT, Reporter
from rankwise.settings import Settings

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """A prediction of one file; `whole` is its id in the specs of its jobs, None for a local command."""

    request: Request
    manifest: Manifest
    source: Path
    output: Path
    whole: str | None = None

    @property
    def parts(self) -> Parts:
        """The directory that keeps the answers."""
        return Parts(self.output, self.whole)

    def shard_work(self, shards: range) -> ShardWork:
        """Split shards into answered and pending ones."""
        pending = [shard for shard in shards if not self.parts.has(shard)]
        rows, rows_pending = (sum(len(self.manifest.span(shard)) for shard in group) for group in (shards, pending))
        return ShardWork(shards=shards, pending=pending, rows=rows, reused=rows - rows_pending)

    def open(self, settings: Settings, progress: Reporter, source: Source | None = None) -> Source:
        """Open the input with the index of the first pass over it; without an index, read the input again to build one.

        Raises:
            InputChangedError: The input has changed since the prediction started.
            AssetError: It cannot be read.
        """
        source = source or Source(self.source, settings, self.request.text)
        index = self.parts.index(self.manifest)
        if index is not None:
            source.use(index)
            return source
        logger.info("%s has no index of its input; reading the whole input once", self.parts.directory)
        source.survey(self.output, self.request.model_column, self.manifest.shard_rows, progress)
        if source.index.input != self.manifest.request["input"]:
            raise InputChangedError(self.source, source.index.input)
        self.parts.write_index(source.index)
        return source


@dataclass(frozen=True, kw_only=True)
class ShardWork:
    """Shards of one process: `pending` ones lack answers, `reused` counts rows answered by earlier runs."""

    shards: range
    pending: Sequence[int]
    rows: int
    reused: int


def answer_shards(
    prediction: Prediction,
    part: ShardWork,
    source: Source,
    predictor: Predictor,
    keep: Callable[[int, list[Answer]], None],
    progress: Reporter | None = None,
) -> tuple[int, float]:
    """Answer the pending shards; `keep` gets each shard and the answers of its rows in order.

    Returns the number of generated tokens and the seconds taken, without loading.

    Raises:
        AdapterIntegrityError: The files of a model have changed since the prediction started.
        JobError: A row cannot be answered, with `fail_fast`.
        AssetError: The input cannot be read, or has changed.
    """
    _check_adapters(prediction.manifest, predictor.adapters)
    tokens, began = 0, time.perf_counter()
    for shard, rows in source.shards(part.pending, prediction.manifest.rows):
        answers = _answer(prediction, source, predictor, rows, progress)
        tokens += sum(answer.completion_tokens or 0 for answer in answers)
        keep(shard, answers)
    return tokens, time.perf_counter() - began


def _check_adapters(manifest: Manifest, adapters: Mapping[str, LoadedAdapter]) -> None:
    for uri, adapter in adapters.items():
        recorded = manifest.adapters.get(uri)
        if recorded is not None and recorded != adapter.metadata.manifest:
            raise AdapterIntegrityError(
                f"{uri} has changed: its manifest is {adapter.metadata.manifest}, the prediction started with "
                f"{recorded}; start over with --restart"
            )


def _answer(
    prediction: Prediction,
    source: Source,
    predictor: Predictor,
    rows: Sequence[TableRow],
    progress: Reporter | None,
) -> list[Answer]:
    request, manifest = prediction.request, prediction.manifest
    answers = {row.index: Answer(error=row.error) for row in rows if row.error is not None}
    if request.fail_fast and answers:
        index = min(answers)
        raise JobError(f"row {index}: {answers[index].error}")
    readable = [row for row in rows if row.error is None]
    named = [named_model(row.columns, request.model_column) or request.models[0] for row in readable]
    decoding = request.decoding
    models = [manifest.models[name] for name in named]
    # Up to 0.2, training and prediction each guessed the types of CSV.
    guessed = {name for name, adapter in predictor.adapters.items() if adapter.metadata.reading.rendering == 1}
    made = predictor.predict(
        [
            manifest.survey.typed(row.columns) if model in guessed else source.values(row)
            for row, model in zip(readable, models, strict=True)
        ],
        models=models,
        prompt=request.prompt,
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


def check_paths(source: Path, output: Path) -> None:
    """Reject unusable paths.

    Raises:
        ConfigError: A format is unknown, both are the same file, or the output is a directory.
    """
    table_kind(source)
    output_format(output)
    if source.resolve() == output.resolve():
        raise ConfigError(f"the output {output} is the same file as the input; name another file")
    if output.is_dir():
        raise ConfigError(f"the output {output} is a directory; name a file")


def plan(
    request: Request,
    source: Source,
    output: Path,
    parts: Parts,
    known: Manifest | None,
    tracking_uri: str | None,
    progress: Reporter,
) -> Manifest:
    """Continue the prediction `known`, or plan a new one from one pass over the input and write its index to `parts`.

    Raises:
        ConfigError: `known` is another prediction; rows name no model, or one that does not exist; the template or the
            output format does not fit the rows.
        AssetError: The input cannot be read.
        AdapterIntegrityError: The files in a directory do not match their manifest.
    """
    if known is not None:
        _check_same(known, request, source.digest(progress), parts)
        return known
    survey = source.survey(output, request.model_column, request.shard_rows, progress)
    if request.prompt is not None:
        # How values are rendered depends on the adapters, which are not read yet; the columns do not.
        template = RowTemplate.parse(request.prompt, "--prompt", FIRST_READING.values)
        if survey.rows:
            template.check(survey.columns)
    if survey.unnamed and not request.models:
        raise ConfigError(
            f"{survey.unnamed} of {survey.rows} rows name no model in a column {request.model_column!r}; give a "
            "default model with --model"
        )
    origins = _resolve(request, survey, tracking_uri)
    digests = {origin.uri: adapter_digest(origin) for origin in origins.values()}
    parts.write_index(source.index)
    return Manifest(
        request=request.identity(source.index.input),
        models={name: origin.uri for name, origin in origins.items()},
        adapters={uri: digest for uri, digest in digests.items() if digest is not None},
        survey=survey,
        shard_rows=request.shard_rows,
    )


def _check_same(known: Manifest, request: Request, digest: str, parts: Parts) -> None:
    differs = [
        f"{key} was {known.request.get(key)!r}, is {value!r}"
        for key, value in request.identity(digest).items()
        if known.request.get(key) != value
    ]
    if differs:
        raise ConfigError(
            f"{parts.directory} holds an unfinished prediction with other settings ({'; '.join(differs)}); finish it "
            "with its own command, or discard it with --restart"
        )


def adapter_digest(origin: Origin) -> str | None:
    """The digest of a stored adapter's manifest, without download; None if only its files have it."""
    if origin.model_id is None and origin.version is None:
        return check(Path(origin.location), origin).metadata.manifest
    return origin.tags.get(MANIFEST_TAG)


def _resolve(request: Request, survey: Survey, tracking_uri: str | None) -> dict[str, Origin]:
    """Resolve every model once; report all unknown ones together."""
    models: dict[str, Origin] = {}
    problems: list[str] = []
    for name in dict.fromkeys([*request.models, *survey.models]):
        try:
            models[name] = resolve_uri(name, tracking_uri)
        except (AssetError, ConfigError, TrackingError) as error:
            origin = f" (named by {survey.models[name]} rows)" if name in survey.models else ""
            problems.append(f"{name}{origin}: {error}")
    if problems:
        raise ConfigError("\n".join(["models not found:", *problems]), tuple(problems))
    return models


# Result columns of the output. An input column of the same name gets the prefix `input.`.
RESULTS: dict[str, pa.DataType] = {
    "text": pa.string(),
    "finish_reason": pa.string(),
    "prompt_tokens": pa.int64(),
    "completion_tokens": pa.int64(),
    "model": pa.string(),
    "version": pa.string(),
    "adapter_sha256": pa.string(),
    "base_fingerprint": pa.string(),
    "error": pa.string(),
}
_ID = "id"


def write_output(prediction: Prediction, source: Source) -> int:
    """Join the input and the answers into the output; returns the number of rows with an error.

    Raises:
        ConfigError: The output's format cannot hold a value, or answers are missing.
        AssetError: The input cannot be read, or has changed.
        StorageError: The disk is full, or the directory is not writable.
    """
    output, columns = prediction.output, prediction.manifest.survey.columns
    names = _names([name for name in columns if name != _ID])
    own = source.types() if output_format(output) == ".parquet" else {}
    # A row without an id gets its index, as a string if the Parquet column holds strings.
    texts = pa.types.is_string(own.get(_ID, pa.int64()))
    first = own.get(_ID) if _ID in columns else pa.int64()
    types: dict[str, pa.DataType | None] = {_ID: first, **RESULTS}
    types |= {shown: own.get(name) for name, shown in names.items()}
    failed = 0

    def rows() -> Iterator[dict[str, Any]]:
        nonlocal failed
        answers = prediction.parts.answers(prediction.manifest)
        for row, answer in zip(source.rows(), answers, strict=True):
            failed += answer.error is not None
            yield _row(row, answer, names, str(row.index) if texts else row.index)

    write_rows(output, rows(), types)
    return failed


def _names(columns: Sequence[str]) -> dict[str, str]:
    """The output name of each input column: unique, and never that of a result column."""
    taken = {_ID, *RESULTS, *columns}
    names = {}
    for name in columns:
        shown = name
        if name in RESULTS:
            while shown in taken:
                shown = f"input.{shown}"
            taken.add(shown)
        names[name] = shown
    return names


def _row(row: TableRow, answer: Answer, names: Mapping[str, str], place: int | str) -> dict[str, Any]:
    results = {name: getattr(answer, name) for name in RESULTS}
    return {
        _ID: row.columns.get(_ID, place),
        **{name: value for name, value in results.items() if value is not None},
        **{names[name]: value for name, value in row.columns.items() if name != _ID},
    }


@dataclass(frozen=True, kw_only=True)
class Summary:
    """Results of a prediction; `seconds` is generation time without loading."""

    output: Path
    rows: int
    failed: int
    reused: int
    models: Mapping[str, str]
    completion_tokens: int
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """The document of `predict --json`."""
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
    jobs_status: Callable[[QueuedJobs], JobsStatus] = lambda queued: JobsStatus.OPEN,
    progress: Reporter = SILENT,
) -> Summary:
    """Answer every row of a table (`.jsonl`, `.csv` or `.parquet`) in this process.

    `OUTPUT.parts/` keeps the answers shard by shard. After an interruption the same call resumes there. The output
    appears complete, with one row for each input row, in input order.

    `jobs_status` reports the state of queued jobs that started the same output; by default they count as running.

    Raises:
        ConfigError: The request does not fit the input or an earlier run; the output already exists.
        AssetError: The input cannot be read, or the base was not found.
        JobError: A row cannot be answered, with `fail_fast`.
        TrackingError: The registry cannot be reached, or has no such model.
        BaseMismatchError: The adapters need different bases.
        AdapterIntegrityError: The files of an adapter do not match their manifest.
    """
    check_paths(source, output)
    opened = Source(source, settings, request.text, hold=True)
    parts = Parts(output)
    with parts.locked():
        queued = parts.queued()
        if queued is not None:
            _check_ended(jobs_status(queued), output, restart=restart)
        if restart or queued is not None:
            parts.remove()
        known = parts.manifest()
        if known is None:
            parts.remove()
            if output.exists() and not overwrite:
                raise ConfigError(f"{output} already exists; name another file, or replace it with --overwrite")
        parts.sweep()
        manifest = plan(request, opened, output, parts, known, tracking_uri, progress)
        if known is None:
            parts.begin(manifest)
        prediction = Prediction(request=request, manifest=manifest, source=source, output=output)
        prediction.open(settings, progress, opened)
        part = prediction.shard_work(range(manifest.shards))
        tokens, seconds = 0, 0.0
        if part.pending:
            tokens, seconds = _answer_here(prediction, part, opened, settings, tracking_uri, progress)
        opened.check_unchanged()
        failed = write_output(prediction, opened)
        parts.remove()
    return Summary(
        output=output,
        rows=part.rows,
        failed=failed,
        reused=part.reused,
        models=manifest.models,
        completion_tokens=tokens,
        seconds=seconds,
    )


def _check_ended(status: JobsStatus, output: Path, *, restart: bool) -> None:
    """Reject an output whose queued jobs have not ended, or can be retried."""
    if status is JobsStatus.OPEN and restart:
        raise ConfigError(
            f"{output} belongs to queued jobs that have not ended (rankwise jobs list --kind predict); start over "
            "with rankwise predict --submit --restart, or cancel the jobs"
        )
    # The jobs wrote an existing output; only the directory is left over.
    if not restart and (status is not JobsStatus.DONE or not output.exists()):
        raise ConfigError(
            f"{output} belongs to queued jobs (rankwise jobs list --kind predict); the same command with --submit "
            "shows them and retries failed ones, --restart discards their work"
        )


def _answer_here(
    prediction: Prediction,
    part: ShardWork,
    source: Source,
    settings: Settings,
    tracking_uri: str | None,
    progress: Reporter,
) -> tuple[int, float]:
    request, parts = prediction.request, prediction.parts
    uris = list(dict.fromkeys(prediction.manifest.models.values()))
    with progress.task(f"loading {len(uris)} adapters and their base", None, "adapters"):
        predictor = Predictor.load(
            uris,
            base_model=request.base_model,
            allow_base_mismatch=request.allow_base_mismatch,
            device=request.device,
            attn_implementation=request.attn_implementation,
            settings=settings,
            tracking_uri=tracking_uri,
        )
    with predictor, progress.task("answering", part.rows - part.reused, "rows") as advance:

        def keep(shard: int, answers: list[Answer]) -> None:
            parts.write(shard, answers)
            advance(len(answers))

        return answer_shards(prediction, part, source, predictor, keep)

"""Files in, files out: answer the rows of a table with registered adapters, resumably.

One path for one command and for jobs of the queue: `plan` decides what the prediction is from one pass over the input,
`answer_part` answers some of its shards, `write_output` puts the output together. `predict_file` does all three in one
process; `tasks.predict` does each in a job.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from rankwise.exceptions import AdapterIntegrityError, AssetError, ConfigError, JobError, TrackingError
from rankwise.flavor.fetch import Origin, check, resolve_uri
from rankwise.flavor.load import LoadedAdapter
from rankwise.flavor.metadata import MANIFEST_TAG
from rankwise.inference.predictor import Answer, Predictor, PromptReader
from rankwise.inference.shards import Manifest, Parts, Queued, Request, Stand
from rankwise.inference.source import InputChangedError, Source, Survey, named_model
from rankwise.inference.tables import Row, table_format, write_rows
from rankwise.reporter import SILENT, Reporter
from rankwise.settings import Settings

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """One prediction: answered by one command, or in parts by jobs of the queue.

    Attributes:
        request: What is asked.
        manifest: What was resolved when it began.
        source: The input.
        output: Where the answers go.
        whole: Names it in the rows of its jobs; None where one command answers it.
    """

    request: Request
    manifest: Manifest
    source: Path
    output: Path
    whole: str | None = None

    @property
    def parts(self) -> Parts:
        """Where the answers are kept."""
        return Parts(self.output, self.whole)

    def part(self, shards: range) -> Part:
        """Some shards, split into those that are answered already and those that are left."""
        left = [shard for shard in shards if not self.parts.has(shard)]
        rows, rows_left = (sum(len(self.manifest.span(shard)) for shard in some) for some in (shards, left))
        return Part(shards=shards, left=left, rows=rows, reused=rows - rows_left)

    def open(self, settings: Settings, progress: Reporter, source: Source | None = None) -> Source:
        """The input with the index that the first pass over it has left.

        Args:
            settings: Where digests are remembered.
            progress: Told of rows where there is no index.
            source: The input, where it is open already.

        Raises:
            InputChangedError: It is not the input that the prediction began with.
            AssetError: It cannot be read.
        """
        source = source or Source(self.source, settings)
        index = self.parts.index(self.manifest)
        if index is not None:
            source.use(index)
            return source
        logger.info("%s has no index of its input, which is read from its start once", self.parts.directory)
        source.survey(self.output, self.request.model_column, self.manifest.shard_rows, progress)
        if source.index.input != self.manifest.request["input"]:
            raise InputChangedError(self.source, source.index.input)
        self.parts.write_index(source.index)
        return source


@dataclass(frozen=True, kw_only=True)
class Part:
    """Shards that one process answers.

    Attributes:
        shards: All of them.
        left: Those without answers.
        rows: How many rows they have.
        reused: How many of these were answered by an earlier run.
    """

    shards: range
    left: Sequence[int]
    rows: int
    reused: int


def answer_part(
    prediction: Prediction,
    part: Part,
    source: Source,
    predictor: Predictor,
    keep: Callable[[int, list[Answer]], None],
    progress: Reporter | None = None,
) -> tuple[int, float]:
    """Answer the shards of a part that are left; tokens generated, and seconds taken, loading apart.

    Args:
        prediction: The prediction.
        part: Its shards.
        source: Its input, opened.
        predictor: Has all models of the manifest.
        keep: Given each shard and the answers of its rows, in order.
        progress: Told of rows within a shard.

    Raises:
        AdapterIntegrityError: A model has other files than it had when the prediction began.
        JobError: A row cannot be answered, with `fail_fast`.
        AssetError: The input cannot be read, or has changed.
    """
    _check_adapters(prediction.manifest, predictor.adapters)
    reader = PromptReader.parse(prediction.request.prompt)
    tokens, began = 0, time.perf_counter()
    for shard, rows in source.shards(part.left, prediction.manifest.rows):
        answers = _answer(prediction, predictor, reader, rows, progress)
        tokens += sum(answer.completion_tokens or 0 for answer in answers)
        keep(shard, answers)
    return tokens, time.perf_counter() - began


def _check_adapters(manifest: Manifest, adapters: Mapping[str, LoadedAdapter]) -> None:
    for uri, adapter in adapters.items():
        recorded = manifest.adapters.get(uri)
        if recorded is not None and recorded != adapter.metadata.manifest:
            raise AdapterIntegrityError(
                f"{uri} is another adapter ({adapter.metadata.manifest}) than the one that the prediction began with "
                f"({recorded}); begin anew with --restart"
            )


def _answer(
    prediction: Prediction,
    predictor: Predictor,
    reader: PromptReader,
    rows: Sequence[Row],
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


def check_paths(source: Path, output: Path) -> None:
    """Refuse what can neither be read nor written.

    Raises:
        ConfigError: A format is not known, both are one file, or the output is a directory.
    """
    table_format(source)
    table_format(output)
    if source.resolve() == output.resolve():
        raise ConfigError(f"the output {output} is the input; name another file")
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
    """What a prediction is: as it began, or decided now from one pass over the input.

    Args:
        request: What is asked.
        source: The input.
        output: The output.
        parts: Where the answers are kept; the index of the input is written there.
        known: What was begun; None where nothing was.
        tracking_uri: Of the registry; MLflow's current one by default.
        progress: Told of rows.

    Raises:
        ConfigError: What was begun is another prediction; rows name no model, or one that is not to be found; the
            template or the output does not fit.
        AssetError: The input cannot be read.
        AdapterIntegrityError: A directory is not what was stored.
    """
    if known is not None:
        _check_same(known, request, source.digest(progress), parts)
        return known
    survey = source.survey(output, request.model_column, request.shard_rows, progress)
    reader = PromptReader.parse(request.prompt)
    if reader.template is not None and survey.rows:
        reader.template.check(survey.columns)
    if survey.unnamed and not request.models:
        raise ConfigError(
            f"{survey.unnamed} of {survey.rows} rows name no model in a column {request.model_column!r}; give the one "
            "that answers them with --model"
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
    """Refuse to continue what another request, or another input, has begun."""
    differs = [
        f"{key} was {known.request.get(key)!r}, is {value!r}"
        for key, value in request.identity(digest).items()
        if known.request.get(key) != value
    ]
    if differs:
        raise ConfigError(
            f"{parts.directory} holds the beginning of another prediction ({'; '.join(differs)}); finish that one "
            "with its own command, or throw it away with --restart"
        )


def adapter_digest(origin: Origin) -> str | None:
    """The digest of a stored adapter's manifest, without fetching it; None where only its files could say."""
    if origin.model_id is None and origin.version is None:
        return check(Path(origin.location), origin).metadata.manifest
    return origin.tags.get(MANIFEST_TAG)


def _resolve(request: Request, survey: Survey, tracking_uri: str | None) -> dict[str, Origin]:
    """The version of each model, decided once. All that cannot be found are named together."""
    models: dict[str, Origin] = {}
    problems: list[str] = []
    for name in dict.fromkeys([*request.models, *survey.models]):
        try:
            models[name] = resolve_uri(name, tracking_uri)
        except (AssetError, ConfigError, TrackingError) as error:
            asked = f" (named by {survey.models[name]} rows)" if name in survey.models else ""
            problems.append(f"{name}{asked}: {error}")
    if problems:
        raise ConfigError("\n".join(["models that cannot be found:", *problems]), tuple(problems))
    return models


# The columns that a row of the output has beside those of the input; those of the input with such a name get `input.`
# before it.
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
    """Put the output together from the input and the answers; how many rows have an error.

    Raises:
        ConfigError: A value cannot be written in the output's format, or answers are missing.
        AssetError: The input cannot be read, or has changed.
        StorageError: The disk is full, or the directory is not writable.
    """
    output, columns = prediction.output, prediction.manifest.survey.columns
    names = _names([name for name in columns if name != _ID])
    own = source.types() if table_format(output) == ".parquet" else {}
    # A row without an id of its own gets its place; in Parquet as a text, where the others are texts.
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
    """What each input column is called in the output: no two the same, and none as a result is."""
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


def _row(row: Row, answer: Answer, names: Mapping[str, str], place: int | str) -> dict[str, Any]:
    results = {name: getattr(answer, name) for name in RESULTS}
    return {
        _ID: row.columns.get(_ID, place),
        **{name: value for name, value in results.items() if value is not None},
        **{names[name]: value for name, value in row.columns.items() if name != _ID},
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
    stand: Callable[[Queued], Stand] = lambda queued: Stand.OPEN,
    progress: Reporter = SILENT,
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
        stand: Says how far jobs of the queue are that began it; by default they are taken to be at work.
        progress: Told of rows.

    Raises:
        ConfigError: The request, or what an earlier run began, does not fit; the output is there already.
        AssetError: The input cannot be read, or the base is not to be found.
        JobError: A row cannot be answered, with `fail_fast`.
        TrackingError: The registry cannot be reached, or has no such model.
        BaseMismatchError: The adapters lie over different bases.
        AdapterIntegrityError: An adapter is not what was stored.
    """
    check_paths(source, output)
    opened = Source(source, settings, hold=True)
    parts = Parts(output)
    with parts.held():
        queued = parts.queued()
        if queued is not None:
            _check_ended(stand(queued), output, restart=restart)
        if restart or queued is not None:
            parts.remove()
        known = parts.manifest()
        if known is None:
            parts.remove()
            if output.exists() and not overwrite:
                raise ConfigError(f"{output} is there already; name another file, or replace it with --overwrite")
        parts.sweep()
        manifest = plan(request, opened, output, parts, known, tracking_uri, progress)
        if known is None:
            parts.begin(manifest)
        prediction = Prediction(request=request, manifest=manifest, source=source, output=output)
        prediction.open(settings, progress, opened)
        part = prediction.part(range(manifest.shards))
        tokens, seconds = 0, 0.0
        if part.left:
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


def _check_ended(stand: Stand, output: Path, *, restart: bool) -> None:
    """Leave to jobs of the queue what is theirs.

    Raises:
        ConfigError: They have not ended, or not well and may be tried again.
    """
    if stand is Stand.OPEN and restart:
        raise ConfigError(
            f"{output} is made by jobs of the queue that have not ended (rankwise jobs list --kind predict): begin "
            "anew with rankwise predict --submit --restart, or cancel the jobs"
        )
    # An output that is there was put together by them, and only the directory was left behind.
    if not restart and (stand is not Stand.DONE or not output.exists()):
        raise ConfigError(
            f"{output} is made by jobs of the queue (rankwise jobs list --kind predict); the same command with "
            "--submit shows them and tries failed ones again, --restart throws what they have done away"
        )


def _answer_here(
    prediction: Prediction,
    part: Part,
    source: Source,
    settings: Settings,
    tracking_uri: str | None,
    progress: Reporter,
) -> tuple[int, float]:
    """Answer what is left in this process, over a base of its own."""
    request, parts = prediction.request, prediction.parts
    uris = list(dict.fromkeys(prediction.manifest.models.values()))
    with progress.task(f"loading {len(uris)} adapters and their base", None, "adapters"):
        predictor = Predictor.load(
            uris,
            base_model=request.base_model,
            allow_base_mismatch=request.allow_base_mismatch,
            device=request.device,
            settings=settings,
            tracking_uri=tracking_uri,
        )
    with predictor, progress.task("answering", part.rows - part.reused, "rows") as advance:

        def keep(shard: int, answers: list[Answer]) -> None:
            parts.write(shard, answers)
            advance(len(answers))

        return answer_part(prediction, part, source, predictor, keep)

"""Files in, files out: answer the rows of a table with registered adapters, resumably.

- The answers of an input's shards, one shard after another.
- How a prediction begins: the input is looked through once, aliases are resolved, and all of it is written down.
- The table of answers: each row's results and its input columns, in the order of the input.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa

from rankwise.digests import file_digest
from rankwise.exceptions import AdapterIntegrityError, AssetError, ConfigError, JobError, TrackingError
from rankwise.flavor.fetch import Origin, check, resolve_uri
from rankwise.flavor.load import LoadedAdapter
from rankwise.flavor.metadata import MANIFEST_TAG
from rankwise.inference.predictor import Answer, Predictor, PromptReader
from rankwise.inference.shards import Manifest, Parts, Queued, Request, Stand
from rankwise.inference.tables import (
    ArrowTypes,
    Row,
    Survey,
    named_model,
    parquet_types,
    plain_row,
    read_rows,
    survey,
    table_format,
    write_rows,
)
from rankwise.reporter import SILENT, Reporter
from rankwise.settings import Settings


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
    progress: Reporter | None = None,
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
    progress: Reporter | None,
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


def check_unchanged(known: Manifest, request: Request, digest: str, parts: Parts) -> None:
    """Refuse to go on with what another request, or another input, has begun.

    Raises:
        ConfigError: They differ.
    """
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


def new_manifest(
    request: Request, source: Path, output: Path, digest: str, tracking_uri: str | None, progress: Reporter
) -> Manifest:
    """Look through an input and decide which versions answer it.

    Args:
        request: What is asked.
        source: The input.
        output: The output.
        digest: Of the input.
        tracking_uri: Of the registry; MLflow's current one by default.
        progress: Told of rows.

    Raises:
        ConfigError: Rows name no model, or one that is not to be found; the template or the output does not fit.
        AssetError: The input cannot be read.
        AdapterIntegrityError: A directory is not what was stored.
    """
    found = _look_through(source, output, request.model_column, progress)
    reader = PromptReader.parse(request.prompt)
    if reader.template is not None and found.rows:
        reader.template.check(found.columns)
    if found.unnamed and not request.models:
        raise ConfigError(
            f"{found.unnamed} of {found.rows} rows name no model in a column {request.model_column!r}; give the one "
            "that answers them with --model"
        )
    origins = _resolve(request, found, tracking_uri)
    digests = {origin.uri: adapter_digest(origin) for origin in origins.values()}
    return Manifest(
        request=request.identity(digest),
        models={name: origin.uri for name, origin in origins.items()},
        adapters={uri: digest for uri, digest in digests.items() if digest is not None},
        survey=found,
        shard_rows=request.shard_rows,
    )


def adapter_digest(origin: Origin) -> str | None:
    """The digest of a stored adapter's manifest, without fetching it; None where only its files could say."""
    if origin.model_id is None and origin.version is None:
        return check(Path(origin.location), origin).metadata.manifest
    return origin.tags.get(MANIFEST_TAG)


def _look_through(source: Path, output: Path, model_column: str, progress: Reporter) -> Survey:
    """Survey an input, and refuse values that the output could not hold: now, not when all rows are answered."""
    of, into = table_format(source), table_format(output)
    if of == ".parquet" and into != ".parquet":
        return survey(source, model_column, progress, lambda columns: plain_row(columns, output))
    if of == ".parquet" or into != ".parquet":
        return survey(source, model_column, progress)
    types = ArrowTypes(output)
    found = survey(source, model_column, progress, types.add)
    types.types()
    return found


def _resolve(request: Request, found: Survey, tracking_uri: str | None) -> dict[str, Origin]:
    """The version of each model, decided once. All that cannot be found are named together."""
    models: dict[str, Origin] = {}
    problems: list[str] = []
    for name in dict.fromkeys([*request.models, *found.models]):
        try:
            models[name] = resolve_uri(name, tracking_uri)
        except (AssetError, ConfigError, TrackingError) as error:
            asked = f" (named by {found.models[name]} rows)" if name in found.models else ""
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


def write_output(source: Path, output: Path, answers: Iterable[Answer], found: Survey) -> int:
    """Put the output together; how many rows have an error.

    Args:
        source: The input.
        output: Where the table goes.
        answers: One for each row of the input, in order.
        found: What the input has.

    Raises:
        ConfigError: A value cannot be written in the output's format.
        StorageError: The disk is full, or the directory is not writable.
    """
    names = _names([name for name in found.columns if name != _ID])
    own = _types(source, output)
    # A row without an id of its own gets its place; in Parquet as a text, where the others are texts.
    texts = pa.types.is_string(own.get(_ID, pa.int64()))
    first = own.get(_ID) if _ID in found.columns else pa.int64()
    types: dict[str, pa.DataType | None] = {_ID: first, **RESULTS}
    types |= {shown: own.get(name) for name, shown in names.items()}
    failed = 0

    def rows() -> Iterator[dict[str, Any]]:
        nonlocal failed
        for row, answer in zip(read_rows(source), answers, strict=True):
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


def _types(source: Path, output: Path) -> dict[str, pa.DataType]:
    """The input's columns with their types, where the output has types."""
    if table_format(output) != ".parquet":
        return {}
    if table_format(source) == ".parquet":
        return parquet_types(source)
    types = ArrowTypes(output)
    for row in read_rows(source):
        types.add(row.columns)
    return types.types()


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
    digest = file_digest(source, settings, progress=progress)
    parts = Parts(output)
    with parts.held():
        queued = parts.queued()
        if queued is not None:
            _check_ended(stand(queued), output, restart=restart)
        if restart or queued is not None:
            parts.remove()
        manifest = parts.manifest()
        if manifest is None:
            parts.remove()
            if output.exists() and not overwrite:
                raise ConfigError(f"{output} is there already; name another file, or replace it with --overwrite")
            parts.sweep()
            manifest = new_manifest(request, source, output, digest, tracking_uri, progress)
            parts.begin(manifest)
        else:
            check_unchanged(manifest, request, digest, parts)
            parts.sweep()
        left = [shard for shard in range(manifest.shards) if not parts.has(shard)]
        tokens, seconds = 0, 0.0
        if left:
            tokens, seconds = _answer_rows(request, source, manifest, left, parts, settings, tracking_uri, progress)
        if file_digest(source, settings) != digest:
            raise AssetError(f"{source} changed while it was worked on; begin anew with --restart")
        failed = write_output(source, output, parts.answers(manifest), manifest.survey)
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


def _answer_rows(
    request: Request,
    source: Path,
    manifest: Manifest,
    left: Sequence[int],
    parts: Parts,
    settings: Settings,
    tracking_uri: str | None,
    progress: Reporter,
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
    check_adapters(manifest, predictor.adapters)
    tokens, began = 0, time.perf_counter()
    total = sum(len(manifest.span(shard)) for shard in left)
    with predictor, progress.task("answering", total, "rows") as advance:
        for shard, answers in answer_shards(request, manifest, source, set(left), predictor):
            parts.write(shard, answers)
            tokens += sum(answer.completion_tokens or 0 for answer in answers)
            advance(len(answers))
    return tokens, time.perf_counter() - began

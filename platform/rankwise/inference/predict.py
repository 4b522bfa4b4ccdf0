"""Files in, files out: answer the rows of a table with registered adapters, resumably."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rankwise.assets.digest import file_digest
from rankwise.assets.progress import SILENT, Progress
from rankwise.exceptions import AssetError, ConfigError
from rankwise.inference.answering import answer_shards, check_adapters
from rankwise.inference.begin import check_paths, check_unchanged, new_manifest
from rankwise.inference.output import write_output
from rankwise.inference.predictor import Predictor
from rankwise.inference.request import Request
from rankwise.inference.shards import Manifest, Parts, Queued, Stand
from rankwise.settings import Settings

__all__ = ["Request", "Summary", "predict_file"]


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
            tokens, seconds = _answer(request, source, manifest, left, parts, settings, tracking_uri, progress)
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


def _answer(
    request: Request,
    source: Path,
    manifest: Manifest,
    left: Sequence[int],
    parts: Parts,
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
    check_adapters(manifest, predictor.adapters)
    tokens, began = 0, time.perf_counter()
    total = sum(len(manifest.span(shard)) for shard in left)
    with predictor, progress.task("answering", total, "rows") as advance:
        for shard, answers in answer_shards(request, manifest, source, set(left), predictor):
            parts.write(shard, answers)
            tokens += sum(answer.completion_tokens or 0 for answer in answers)
            advance(len(answers))
    return tokens, time.perf_counter() - began

"""How a prediction begins: the input is looked through once, aliases are resolved, and all of it is written down."""

from __future__ import annotations

from pathlib import Path

from rankwise.assets.progress import Progress
from rankwise.exceptions import AssetError, ConfigError, TrackingError
from rankwise.flavor.fetch import Origin, check, resolve_uri
from rankwise.flavor.metadata import MANIFEST_TAG
from rankwise.inference.arrow_types import ArrowTypes
from rankwise.inference.prompts import PromptReader
from rankwise.inference.request import Request
from rankwise.inference.shards import Manifest, Parts
from rankwise.inference.survey import Survey, survey
from rankwise.inference.tables import plain_row, table_format


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
    request: Request, source: Path, output: Path, digest: str, tracking_uri: str | None, progress: Progress
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


def _look_through(source: Path, output: Path, model_column: str, progress: Progress) -> Survey:
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

"""`rankwise import`: adapters of other programs, registered with the flavor."""

from __future__ import annotations

import click

from rankwise.cli.output import note, print_json, size, waiting
from rankwise.settings import Settings

_QUANTIZATIONS = ("nf4", "nf4-single", "fp4", "fp4-single", "8bit", "none")


@click.command(name="import")
@click.argument("source", metavar="DIR_OR_URI")
@click.option("--name", required=True, help="Of the registered model; a version is added if it is there.")
@click.option(
    "--base", help="The base it was trained on: org/name, a directory, pypi:...; default: what it says itself."
)
@click.option("--base-revision", help="Commit (40 hex digits) of a hub base, sha256:... of any other.")
@click.option(
    "--quantization",
    type=click.Choice(_QUANTIZATIONS),
    help="How the base was quantized in training; default: what is recorded, else nf4 (with double quantization; "
    "-single: without).",
)
@click.option("--alias", help="Also set on the new version.")
@click.option("--system", help="A system prompt to put before bare texts.")
@click.option("--device", help="Where it is tried out: cpu, cuda, cuda:1.")
@click.option("--json", "as_json", is_flag=True, help="Print the version, its base and the findings as JSON.")
def import_(
    source: str,
    name: str,
    base: str | None,
    base_revision: str | None,
    quantization: str | None,
    alias: str | None,
    system: str | None,
    device: str | None,
    as_json: bool,
) -> None:
    """Register an adapter that another program has stored, with everything that loading it over its base needs.

    DIR_OR_URI is a PEFT directory, or a model of mlflow.transformers: a path, models:/NAME@ALIAS, models:/NAME/VERSION,
    models:/m-..., or runs:/RUN_ID/PATH. What it does not say (quantization, revision), and what mlflow.transformers has
    saved wrong, is told and recorded with the version. It is loaded over its base once before it is registered.
    """
    # Late: MLflow and torch take seconds to import.
    with waiting(f"Importing {source} ...") as status:
        from rankwise.flavor.imports import QUANTIZATIONS, import_adapter
        from rankwise.tracking.connect import connect

        settings = Settings.load()
        connect(settings)
        done = import_adapter(
            source,
            name,
            base_model=base,
            base_revision=base_revision,
            quantization=None if quantization is None else QUANTIZATIONS[quantization],
            alias=alias,
            system=system,
            device=device,
            settings=settings,
            tracking_uri=settings.tracking_uri,
        )
        status.stop()
    for finding in done.findings:
        note(f"{finding.code}: {finding.text}")
    result = done.to_dict()
    note(
        f"{source} ({done.kind}) is registered over {result['base']['source']} at {result['base']['revision']}, "
        f"{result['quantization']} ({done.quantization_from}), {size(result['adapter']['bytes'])}, as"
    )
    if as_json:
        print_json(result)
    else:
        click.echo(done.uri)

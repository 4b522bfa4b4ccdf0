"""`rankwise pull`: registered adapters as plain directories."""

from __future__ import annotations

from pathlib import Path

import click

from rankwise.cli.output import note
from rankwise.settings import Settings


@click.command()
@click.argument("uri")
@click.argument("directory", type=click.Path(path_type=Path))
def pull(uri: str, directory: Path) -> None:
    """Fetch the adapter URI into DIRECTORY as a plain PEFT directory, checked.

    URI is models:/NAME@ALIAS, models:/NAME/VERSION, models:/m-..., runs:/RUN_ID/NAME, or a directory that
    rankwise.flavor.save_model wrote. The files lie at the root of DIRECTORY, whose parents are made: configuration,
    weights, tokenizer, card, and a manifest over them. PeftModel.from_pretrained(base, DIRECTORY) loads them; the
    base's source and revision are in adapter_config.json.
    """
    # Late: MLflow and torch take seconds to import.
    from rich.console import Console

    with Console(stderr=True).status(f"Fetching {uri} ...") as status:
        from rankwise.flavor.download import download_adapter
        from rankwise.tracking.connect import connect

        settings = Settings.load()
        if uri.startswith(("models:", "runs:")):
            connect(settings)
        path = download_adapter(uri, directory, tracking_uri=settings.tracking_uri)
        status.stop()
    note(f"{uri} is in")
    click.echo(path)

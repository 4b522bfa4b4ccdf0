"""`rankwise pull`: registered adapters as plain directories, and how a server serves them."""

from __future__ import annotations

from pathlib import Path

import click

from rankwise.cli.output import note, print_json, waiting
from rankwise.settings import Settings


@click.command()
@click.argument("uri")
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print the directory and the `vllm serve` line as JSON.")
def pull(uri: str, directory: Path, as_json: bool) -> None:
    """Fetch the adapter URI into DIRECTORY as a plain PEFT directory, checked.

    URI is models:/NAME@ALIAS, models:/NAME/VERSION, models:/m-..., runs:/RUN_ID/NAME, or a directory that
    rankwise.flavor.save_model wrote. The files lie at the root of DIRECTORY, whose parents are made: configuration,
    weights, tokenizer, card, and a manifest over them. PeftModel.from_pretrained(base, DIRECTORY) loads them; the
    base's source and revision are in adapter_config.json. The `vllm serve` line for it goes to stderr.
    """
    # Late: MLflow and torch take seconds to import.
    with waiting(f"Fetching {uri} ...") as status:
        from rankwise.flavor.download import download_adapter, read_metadata
        from rankwise.flavor.fetch import resolve_uri
        from rankwise.serving.command import serve_command
        from rankwise.tracking.connect import connect

        settings = Settings.load()
        if uri.startswith(("models:", "runs:")):
            connect(settings)
        # An alias that moves in the meantime must not give one version's files and another's facts.
        origin = resolve_uri(uri, settings.tracking_uri)
        path = download_adapter(origin.uri, directory, tracking_uri=settings.tracking_uri)
        metadata = read_metadata(origin.uri, tracking_uri=settings.tracking_uri)
        serve = serve_command(path, metadata, origin.name or path.name, settings)
        status.stop()
    if as_json:
        print_json({"uri": uri, "resolved": origin.uri, "directory": str(path), "vllm": serve.to_json()})
        return
    note(f"{uri} is in")
    click.echo(path)
    if serve.line is None:
        note(f"vLLM cannot serve it as it is: {'; '.join(serve.obstacles)}")
    else:
        note(f"to serve it:\n{serve.line}\n{serve.differs}")
    for remark in serve.remarks:
        note(remark)

"""`rankwise export`: a registered adapter merged into its base."""

from __future__ import annotations

from pathlib import Path

import click

from rankwise.cli.output import note, print_json, waiting
from rankwise.settings import Settings


@click.command()
@click.argument("uri")
@click.argument("directory", type=click.Path(path_type=Path))
@click.option(
    "--format", "form", type=click.Choice(["merged"]), required=True, help="What to write; `pull` writes adapters."
)
@click.option(
    "--into",
    type=click.Choice(["16bit", "nf4-dequantized"]),
    help="Merge into the 16-bit base, or into the 4-bit base dequantized (default for a 4-bit base: it agrees better).",
)
@click.option(
    "--dtype",
    type=click.Choice(["bfloat16", "float16", "float32"]),
    help="Of the merged weights; by default the 16-bit type of the base's files.",
)
@click.option(
    "--prompts",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Measure the agreement on these: .jsonl with prompt or messages, or a text a line. Default: 8 built-in ones.",
)
@click.option(
    "--sample", type=click.IntRange(min=1), default=32, show_default=True, help="Prompts to take of the file."
)
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=32, show_default=True, help="Longest answer.")
@click.option("--base", help="Where the base is; by default the recorded source, then RANKWISE_BASES.")
@click.option("--device", help="Where the models are compared: cpu, cuda, cuda:1.")
@click.option("--json", "as_json", is_flag=True, help="Print the content of rankwise_export.json.")
def export(
    uri: str,
    directory: Path,
    form: str,
    into: str | None,
    dtype: str | None,
    prompts: Path | None,
    sample: int,
    max_new_tokens: int,
    base: str | None,
    device: str | None,
    as_json: bool,
) -> None:
    """Write the adapter URI, merged into its base, into DIRECTORY: a model that AutoModelForCausalLM loads.

    URI is as in `rankwise pull`. What it was merged into, and how far the merged model agrees with the registered one
    (equal greedy tokens, largest difference of a logit, KL divergence), is measured, printed, and written into
    rankwise_export.json and the card beside the weights (safetensors only).
    """
    # Late: MLflow and torch take seconds to import.
    with waiting(f"Merging {uri} ...") as status:
        from rankwise.flavor.export import MERGED_INTO, export_merged
        from rankwise.flavor.prompts import read_prompts
        from rankwise.tracking.connect import connect

        settings = Settings.load()
        given = read_prompts(prompts, sample) if prompts is not None else None
        if uri.startswith(("models:", "runs:")):
            connect(settings)
        done = export_merged(
            uri,
            directory,
            into=into,  # type: ignore[arg-type]
            dtype=dtype,
            prompts=given,
            max_new_tokens=max_new_tokens,
            base_model=base,
            device=device,
            settings=settings,
            tracking_uri=settings.tracking_uri,
        )
        status.stop()
    agreement, record = done.agreement, done.record
    note(
        f"{record['model']} is merged into {MERGED_INTO[done.into]} ({done.into}, {done.reason}), in {record['dtype']}."
    )
    note(
        f"Agreement with the registered model on {agreement.prompts} prompts, {agreement.tokens} tokens: "
        f"{agreement.equal_greedy_tokens:.2%} equal greedy tokens, {agreement.equal_greedy_answers:.2%} equal answers, "
        f"largest difference of a logit {agreement.max_logit_difference:.4g}, KL divergence {agreement.mean_kl:.4g} "
        f"nats (largest {agreement.max_kl:.4g}). It is in"
    )
    if as_json:
        print_json({"directory": str(done.directory), **record})
    else:
        click.echo(done.directory)

"""`rankwise pull`, `import`, `export` and `keys`: adapters into and out of the registry, and their signatures."""

from __future__ import annotations

import shlex
from pathlib import Path

import click

from rankwise.cli.output import note, print_json, waiting
from rankwise.files import format_size
from rankwise.settings import Settings


@click.command()
@click.argument("uri")
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print the directory and the `vllm serve` line as JSON.")
def pull(uri: str, directory: Path, as_json: bool) -> None:
    """Download the adapter URI to DIRECTORY as a plain PEFT directory, and verify it.

    URI is models:/NAME@ALIAS, models:/NAME/VERSION, models:/m-..., runs:/RUN_ID/NAME, or a directory that
    rankwise.flavor.save_model wrote. DIRECTORY (created if needed) gets the configuration, weights, tokenizer, card,
    and a manifest over them. Load it with PeftModel.from_pretrained(base, DIRECTORY); adapter_config.json has the
    base's source and revision. The `vllm serve` line is printed on stderr.
    """
    # Late: MLflow and torch take seconds to import.
    with waiting(f"Fetching {uri} ...") as status:
        from rankwise.flavor.fetch import download_adapter, read_metadata, resolve_uri
        from rankwise.serving.serve_command import serve_command
        from rankwise.tracking.connection import connect

        settings = Settings.load()
        if uri.startswith(("models:", "runs:")):
            connect(settings)
        # Resolved once: an alias may move between the two downloads.
        origin = resolve_uri(uri, settings.tracking_uri)
        path = download_adapter(origin.uri, directory, tracking_uri=settings.tracking_uri)
        metadata = read_metadata(origin.uri, tracking_uri=settings.tracking_uri)
        serve = serve_command(path, metadata, origin.name or path.name, settings)
        status.stop()
    if as_json:
        print_json({"uri": uri, "resolved": origin.uri, "directory": str(path), "vllm": serve.to_json()})
        return
    note(f"{uri} was downloaded to")
    click.echo(path)
    if serve.line is None:
        note(f"vLLM cannot serve it: {'; '.join(serve.obstacles)}")
    else:
        note(f"to serve it:\n{serve.line}\n{serve.differs}")
    for remark in serve.remarks:
        note(remark)


_QUANTIZATIONS = ("nf4", "nf4-single", "fp4", "fp4-single", "8bit", "none")


@click.command(name="import")
@click.argument("source", metavar="DIR_OR_URI")
@click.option("--name", required=True, help="Registered model; gets a new version if it exists.")
@click.option("--base", help="Base used in training: org/name, a directory, pypi:... Default: the recorded one.")
@click.option("--base-revision", help="Commit (40 hex digits) of a hub base, sha256:... of others.")
@click.option(
    "--quantization",
    type=click.Choice(_QUANTIZATIONS),
    help="Quantization of the base in training. Default: the recorded one, or nf4. Double quantization is used "
    "except for -single.",
)
@click.option("--alias", help="Alias to set on the new version.")
@click.option("--system", help="System prompt for plain text prompts.")
@click.option("--device", help="Device for the test load: cpu, cuda, cuda:1.")
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
    """Register an adapter made by another program, with everything needed to load it over its base.

    DIR_OR_URI is a PEFT directory, or a model of mlflow.transformers: a path, models:/NAME@ALIAS, models:/NAME/VERSION,
    models:/m-..., or runs:/RUN_ID/PATH. Missing facts (quantization, revision), and known mistakes of
    mlflow.transformers, are printed and recorded with the version. The adapter is loaded once before it is registered.
    """
    # Late: MLflow and torch take seconds to import.
    with waiting(f"Importing {source} ...") as status:
        from rankwise.flavor.imports import QUANTIZATIONS, import_adapter
        from rankwise.tracking.connection import connect

        settings = Settings.load()
        connect(settings)
        imported = import_adapter(
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
    for finding in imported.findings:
        note(f"{finding.code}: {finding.text}")
    result = imported.to_dict()
    note(
        f"{source} ({imported.kind}) is registered over {result['base']['source']} at {result['base']['revision']}, "
        f"{result['quantization']} ({imported.quantization_from}), {format_size(result['adapter']['bytes'])}, as"
    )
    if as_json:
        print_json(result)
    else:
        click.echo(imported.uri)


@click.command()
@click.argument("uri")
@click.argument("directory", type=click.Path(path_type=Path))
@click.option(
    "--format", "form", type=click.Choice(["merged"]), required=True, help="Format to write; use `pull` for adapters."
)
@click.option(
    "--into",
    type=click.Choice(["16bit", "nf4-dequantized"]),
    help="Base to merge into: 16 bit, or 4 bit dequantized (default for a 4-bit base, closer agreement).",
)
@click.option(
    "--dtype",
    type=click.Choice(["bfloat16", "float16", "float32"]),
    help="Type of merged weights. Default: the 16-bit type of the base's files.",
)
@click.option(
    "--prompts",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Prompts for the comparison: .jsonl with prompt or messages, or one text per line. Default: 8 built-in ones.",
)
@click.option(
    "--sample", type=click.IntRange(min=1), default=32, show_default=True, help="Number of prompts from the file."
)
@click.option(
    "--max-new-tokens",
    type=click.IntRange(min=1),
    default=32,
    show_default=True,
    help="Maximum length of an answer.",
)
@click.option("--base", help="Location of the base. Default: the recorded source, then RANKWISE_BASES.")
@click.option("--device", help="Device for the comparison: cpu, cuda, cuda:1.")
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
    """Merge the adapter URI into its base, and write DIRECTORY: a model for AutoModelForCausalLM.

    URI is as in `rankwise pull`. The merged model is compared with the registered one (equal greedy tokens, largest
    logit difference, KL divergence). The result is printed, and written with the merge target to rankwise_export.json
    and the model card. Weights are safetensors only.
    """
    # Late: MLflow and torch take seconds to import.
    with waiting(f"Merging {uri} ...") as status:
        from rankwise.flavor.export import MERGED_INTO, export_merged
        from rankwise.flavor.inputs import read_prompts
        from rankwise.tracking.connection import connect

        settings = Settings.load()
        given = read_prompts(prompts, sample) if prompts is not None else None
        if uri.startswith(("models:", "runs:")):
            connect(settings)
        exported = export_merged(
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
    agreement, record = exported.agreement, exported.record
    note(
        f"{record['model']} is merged into {MERGED_INTO[exported.into]} ({exported.into}, {exported.reason}), "
        f"in {record['dtype']}."
    )
    note(
        f"Agreement with the registered model on {agreement.prompts} prompts, {agreement.tokens} tokens: "
        f"{agreement.equal_greedy_tokens:.2%} equal greedy tokens, {agreement.equal_greedy_answers:.2%} equal answers, "
        f"largest logit difference {agreement.max_logit_difference:.4g}, KL divergence {agreement.mean_kl:.4g} "
        f"nats (largest {agreement.max_kl:.4g}). Written to"
    )
    if as_json:
        print_json({"directory": str(exported.directory), **record})
    else:
        click.echo(exported.directory)


@click.group()
def keys() -> None:
    """Create signing keys, sign adapters, and show public keys."""


@keys.command()
@click.argument("directory", type=click.Path(file_okay=False, path_type=Path))
@click.option("--name", default="rankwise", show_default=True, help="Name of the files, and of the signer in messages.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def new(directory: Path, name: str, as_json: bool) -> None:
    """Create a key pair in DIRECTORY: NAME.key, which must stay secret, and NAME.pub to share.

    Set RANKWISE_SIGNING_KEY to the first where adapters are logged, RANKWISE_TRUSTED_KEYS to the second where they are
    loaded.
    """
    from rankwise.flavor.signing import new_pair

    if not name or "/" in name or name.startswith("."):
        raise click.UsageError(f"--name must be a file name without / and a leading dot, got {name!r}")
    private, public, key = new_pair(directory.expanduser().absolute(), name)
    if as_json:
        print_json({"private": str(private), "public": str(public), "id": key})
        return
    click.echo(key)
    note(f"to sign, where adapters are logged:   export RANKWISE_SIGNING_KEY={shlex.quote(str(private))}")
    note(f"to trust, where they are loaded:      export RANKWISE_TRUSTED_KEYS={shlex.quote(str(public))}")


@keys.command()
@click.argument("uri")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def sign(uri: str, as_json: bool) -> None:
    """Sign a version (models:/NAME/VERSION or models:/NAME@ALIAS) under its present name, with RANKWISE_SIGNING_KEY.

    Needed for a copy under another name, a renamed model, or a version that was not signed when it was logged. The
    files are verified first, and not changed.
    """
    from rankwise.flavor.store import sign_version
    from rankwise.settings import Settings
    from rankwise.tracking.connection import connect

    settings = Settings.load()
    connect(settings)
    signed, key = sign_version(uri, settings.tracking_uri)
    if as_json:
        print_json({"model_uri": signed, "key": key})
        return
    click.echo(signed)
    note(f"signed by {key}")


@keys.command()
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def show(files: tuple[Path, ...], as_json: bool) -> None:
    """Show the ids of public keys, from files or directories."""
    from rankwise.flavor.signing import trusted_keys

    public_keys = sorted(
        trusted_keys([path.expanduser().absolute() for path in files]).values(), key=lambda key: key.name
    )
    if as_json:
        print_json({"keys": [{"name": key.name, "id": key.id} for key in public_keys]})
        return
    for key in public_keys:
        click.echo(f"{key.id}  {key.name}")

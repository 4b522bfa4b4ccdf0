"""`rankwise pull`: registered adapters as plain directories, and how a server serves them.

- `rankwise import`: adapters of other programs, registered with the flavor.
- `rankwise export`: a registered adapter merged into its base.
- `rankwise keys`: key pairs that sign adapters.
"""

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
    """Fetch the adapter URI into DIRECTORY as a plain PEFT directory, checked.

    URI is models:/NAME@ALIAS, models:/NAME/VERSION, models:/m-..., runs:/RUN_ID/NAME, or a directory that
    rankwise.flavor.save_model wrote. The files lie at the root of DIRECTORY, whose parents are made: configuration,
    weights, tokenizer, card, and a manifest over them. PeftModel.from_pretrained(base, DIRECTORY) loads them; the
    base's source and revision are in adapter_config.json. The `vllm serve` line for it goes to stderr.
    """
    # Late: MLflow and torch take seconds to import.
    with waiting(f"Fetching {uri} ...") as status:
        from rankwise.flavor.fetch import download_adapter, read_metadata, resolve_uri
        from rankwise.serving.serve_command import serve_command
        from rankwise.tracking.connection import connect

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
        from rankwise.tracking.connection import connect

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
        f"{result['quantization']} ({done.quantization_from}), {format_size(result['adapter']['bytes'])}, as"
    )
    if as_json:
        print_json(result)
    else:
        click.echo(done.uri)


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
        from rankwise.flavor.pyfunc import read_prompts
        from rankwise.tracking.connection import connect

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


@click.group()
def keys() -> None:
    """Make keys that sign adapters, sign with them, and show public ones."""


@keys.command()
@click.argument("directory", type=click.Path(file_okay=False, path_type=Path))
@click.option("--name", default="rankwise", show_default=True, help="Of the files, and of the signer in messages.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def new(directory: Path, name: str, as_json: bool) -> None:
    """Make a pair in DIRECTORY: NAME.key to sign with, which stays secret, and NAME.pub to give away.

    RANKWISE_SIGNING_KEY names the first one where adapters are logged, RANKWISE_TRUSTED_KEYS the second one where they
    are loaded.
    """
    from rankwise.flavor.signing import new_pair

    if not name or "/" in name or name.startswith("."):
        raise click.UsageError(f"--name is the beginning of a file's name, got {name!r}")
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
    """Sign a version (models:/NAME/VERSION or models:/NAME@ALIAS) for the name that it has, with RANKWISE_SIGNING_KEY.

    For a copy of a version under another name, a registered model that was renamed, a version that was not signed when
    it was logged. Its files are checked first and stay as they are.
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
    """Show the ids of public keys: files, or directories of them."""
    from rankwise.flavor.signing import trusted_keys

    found = sorted(trusted_keys([path.expanduser().absolute() for path in files]).values(), key=lambda key: key.name)
    if as_json:
        print_json({"keys": [{"name": key.name, "id": key.id} for key in found]})
        return
    for key in found:
        click.echo(f"{key.id}  {key.name}")

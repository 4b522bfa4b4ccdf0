"""`rankwise keys`: key pairs that sign adapters."""

from __future__ import annotations

import shlex
from pathlib import Path

import click

from rankwise.cli.output import note, print_json


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
    from rankwise.assets.keys import new_pair

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
    from rankwise.flavor.countersign import sign_version
    from rankwise.settings import Settings
    from rankwise.tracking.connect import connect

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
    from rankwise.assets.keys import trusted_keys

    found = sorted(trusted_keys([path.expanduser().absolute() for path in files]).values(), key=lambda key: key.name)
    if as_json:
        print_json([{"name": key.name, "id": key.id} for key in found])
        return
    for key in found:
        click.echo(f"{key.id}  {key.name}")

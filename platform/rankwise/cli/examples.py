"""`rankwise examples`: list the experiment files that come with rankwise, and write one to start from."""

from __future__ import annotations

from pathlib import Path

import click
from rich.table import Table

import rankwise
from rankwise.cli.output import note, print_json, print_table
from rankwise.exceptions import ConfigError
from rankwise.experiment.experiment import load_experiment
from rankwise.files import write_atomically


@click.command()
@click.argument("name", required=False)
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Where to write the experiment file. Default: ./NAME.yaml.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def examples(name: str | None, out: Path | None, as_json: bool) -> None:
    """List the experiment files that come with rankwise, or write the one called NAME.

    The files that an example refers to are written next to it. Existing files are never overwritten.

    Next step: rankwise run NAME.yaml
    """
    directory = _examples_directory()
    files = {path.stem: path for path in sorted(directory.glob("*.yaml"))}
    if name is None:
        if out is not None:
            raise click.UsageError("--out needs the NAME of an example")
        _list(files, as_json)
        return
    if name not in files:
        raise ConfigError(f"unknown example {name}; examples: {', '.join(files)}")
    target = out or Path(f"{name}.yaml")
    written = _write(directory, files[name], target)
    if as_json:
        print_json({"file": str(target), "files": [str(path) for path in written]})
    else:
        click.echo(str(target))
        note(f"next: rankwise plan {target}, then rankwise run {target}")


def _examples_directory() -> Path:
    """The directory of the examples: in the package of a wheel, `experiments/` in a checkout."""
    package = Path(rankwise.__file__).parent
    for directory in (package / "examples", package.parents[1] / "experiments"):
        if directory.is_dir():
            return directory
    raise ConfigError("this installation of rankwise has no examples; install a release, or a checkout")


def _list(files: dict[str, Path], as_json: bool) -> None:
    descriptions = {name: load_experiment(path).spec.description for name, path in files.items()}
    if as_json:
        print_json({"examples": [{"name": name, "description": text} for name, text in descriptions.items()]})
        return
    table = Table("name", "description")
    for name, text in descriptions.items():
        table.add_row(name, text)
    print_table(table)


def _write(directory: Path, source: Path, target: Path) -> list[Path]:
    """Write an example and the shipped files that it refers to; the example is last in the result."""
    text = source.read_text()
    contents = {
        target.parent / path.relative_to(directory): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.suffix != ".yaml" and path.relative_to(directory).as_posix() in text
    } | {target: text.encode()}
    conflicts = [str(path) for path, content in contents.items() if path.exists() and path.read_bytes() != content]
    if conflicts:
        raise ConfigError(
            f"files exist with other content: {', '.join(conflicts)}; move them away or choose another --out"
        )
    for path, content in contents.items():
        write_atomically(path, content, shared=True)
    return list(contents)

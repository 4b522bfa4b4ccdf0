"""Stored locations of a home that was moved or copied: MLflow keeps absolute paths of artifacts in its database.

MLflow writes the location of an experiment, run, logged model and version as an absolute URI. After `cp -r` or `mv` of
a home, these still lead to the old place: artifacts are read from there, or written there, or missing.
"""

from __future__ import annotations

import shutil
import sqlite3
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

from rankwise.exceptions import ConfigError, StorageError, TrackingError
from rankwise.files import file_lock, storage_errors
from rankwise.settings import Settings

# MLflow's columns with locations, and the column that identifies their row.
_COLUMNS = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
)


@dataclass(frozen=True, kw_only=True)
class Locations:
    """Locations outside of the home.

    Attributes:
        moved: Old homes, and how many locations of each have their files in this home.
        unknown: Locations of local files that are neither in this home nor in one of the old homes.
    """

    moved: Mapping[Path, int]
    unknown: tuple[str, ...]


def find_moved(settings: Settings) -> Locations:
    """Find stored locations that lead out of the home; only reads.

    Raises:
        StorageError: The database cannot be read.
    """
    with _database(settings, write=False) as database:
        return _survey(settings, [location for _, _, _, location in _stored(database)])


def check_not_moved(settings: Settings) -> None:
    """Refuse a home whose experiments are stored elsewhere: new runs would be written to the old place.

    Raises:
        TrackingError: The home was moved or copied.
    """
    with _database(settings, write=False) as database:
        query = "SELECT artifact_location FROM experiments WHERE artifact_location IS NOT NULL"
        locations = [location for (location,) in database.execute(query)]
    moved = _survey(settings, locations).moved
    if moved:
        raise TrackingError(moved_text(settings, moved))


def moved_text(settings: Settings, moved: Mapping[Path, int]) -> str:
    """Say that a home was moved or copied, and what to do."""
    old = ", ".join(str(path) for path in moved)
    return (
        f"{settings.home} was moved or copied: MLflow's database still names {old} as the place of its artifacts. Run "
        "`rankwise home relocate` once to use those in this home"
    )


def relocate(settings: Settings) -> tuple[Locations, Path | None]:
    """Rewrite the locations of old homes to this one; returns what was rewritten, and the backup of the database.

    Nothing else is changed: the files of the old home, if it still exists, stay as they are.

    Raises:
        ConfigError: The store is not in the home.
        StorageError: The database cannot be read or written, or another process is writing to it.
    """
    if not settings.local_store:
        raise ConfigError(
            "home relocate changes the MLflow store in RANKWISE_HOME, but MLFLOW_TRACKING_URI names another store; "
            "unset it, or ask the administrator of that store"
        )
    path = settings.home / "mlflow.db"
    if not path.exists():
        raise ConfigError(f"{settings.home} has no MLflow store; set RANKWISE_HOME to the home that was moved")
    doing = "rewriting the stored locations"
    with storage_errors(settings.home, doing), file_lock(settings.home / ".mlflow.lock", doing):
        found = find_moved(settings)
        if not found.moved:
            return found, None
        backup = path.with_name(f"mlflow.db.{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}.bak")
        shutil.copy2(path, backup)
        with _database(settings, write=True) as database:
            for table, column, row, location in list(_stored(database)):
                new = _rewritten(location, found.moved, settings.home)
                if new is not None:
                    database.execute(f"UPDATE {table} SET {column} = ? WHERE rowid = ?", (new, row))
    return found, backup


@contextmanager
def _database(settings: Settings, *, write: bool) -> Iterator[sqlite3.Connection]:
    uri = f"file:{quote(str(settings.home / 'mlflow.db'))}?mode={'rw' if write else 'ro'}"
    try:
        with closing(sqlite3.connect(uri, uri=True, timeout=30)) as database, database:
            if write:
                database.execute("BEGIN IMMEDIATE")
            yield database
    except sqlite3.Error as error:
        raise StorageError(
            f"{settings.home / 'mlflow.db'}: {error}; stop the workers and commands that use this home, and try again"
        ) from error


def _stored(database: sqlite3.Connection) -> Iterator[tuple[str, str, int, str]]:
    """Table, column, row and location of every location of a local file."""
    for table, column in _COLUMNS:
        # The names are constants of this module.
        for row, location in database.execute(f"SELECT rowid, {column} FROM {table} WHERE {column} IS NOT NULL"):
            if local_path(location) is not None:
                yield table, column, row, location


def local_path(location: str) -> Path | None:
    """The path of a local location; None for one of an object store, a server or the registry."""
    if location.startswith("/"):
        return Path(location)
    parts = urlsplit(location)
    return Path(unquote(parts.path)) if parts.scheme == "file" else None


def _survey(settings: Settings, locations: list[str]) -> Locations:
    outside: dict[str, Path] = {}
    for location in locations:
        path = local_path(location)
        if path is not None and not path.is_relative_to(settings.home):
            outside[location] = path
    # The same home under another path, through a link or a mount.
    here = settings.home.resolve()
    outside = {location: path for location, path in outside.items() if not path.resolve().is_relative_to(here)}
    # An old home is a path in front of the artifacts of this home.
    homes = {home for path in outside.values() if (home := _old_home(path, settings.artifacts)) is not None}
    moved = {home: sum(local_path(each) is not None and _is_under(each, home) for each in locations) for home in homes}
    unknown = tuple(sorted(each for each in outside if not any(_is_under(each, home) for home in homes)))
    return Locations(moved=moved, unknown=unknown)


def _is_under(location: str, home: Path) -> bool:
    path = local_path(location)
    return path is not None and path.is_relative_to(home)


def _old_home(path: Path, artifacts: Path) -> Path | None:
    """The home that a path outside of this home belonged to, if this home has the same directory."""
    parts = path.parts
    for at in range(1, len(parts) - 1):
        if parts[at] == artifacts.name and artifacts.joinpath(*parts[at + 1 :]).is_dir():
            return Path(*parts[:at])
    return None


def _rewritten(location: str, homes: Mapping[Path, int], home: Path) -> str | None:
    """The location in this home; None if it is there already, or not in one of the old homes."""
    path = local_path(location)
    assert path is not None, "only locations of local files are read"
    if path.is_relative_to(home):
        return None
    # The longest prefix: one old home may lie within another.
    for old in sorted(homes, key=lambda each: -len(each.parts)):
        if path.is_relative_to(old):
            new = home / path.relative_to(old)
            return str(new) if location.startswith("/") else new.as_uri()
    return None

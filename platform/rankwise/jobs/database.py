"""Connections to the queue's database, its migrations, and the refusal of SQLite on network file systems."""

from __future__ import annotations

import logging
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import URL, Engine, create_engine, event
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError, OperationalError

from rankwise.exceptions import JobStoreError
from rankwise.files import file_lock, make_directory
from rankwise.lock_holders import database_holders, describe_holders

NETWORK_FILE_SYSTEMS = frozenset(
    {"afs", "beegfs", "ceph", "cifs", "glusterfs", "gpfs", "lustre", "ncpfs", "nfs", "nfs4", "panfs", "smb2", "smb3"}
    | {"smbfs", "weka", "wekafs"}
    | {"fuse.ceph", "fuse.gcsfuse", "fuse.glusterfs", "fuse.goofys", "fuse.juicefs", "fuse.mount-s3", "fuse.rclone"}
    | {"fuse.s3fs", "fuse.sshfs"}
)
"""The kernel's names for network file systems, where SQLite's locks and shared memory do not work."""


def file_system(path: Path) -> tuple[str, str]:
    """The type and mount point of the file system that holds a path, which need not exist."""
    innermost = ("", "")
    real = path.resolve()
    for part in psutil.disk_partitions(all=True):
        # A later mount at the same mount point hides the earlier one.
        if real.is_relative_to(part.mountpoint) and len(part.mountpoint) >= len(innermost[1]):
            innermost = part.fstype, part.mountpoint
    return innermost


def refuse_network(path: Path) -> None:
    """Refuse a SQLite file on a network file system, where it loses updates and gets corrupted.

    Raises:
        JobStoreError: The path is on a network file system.
    """
    kind, mount = file_system(path)
    if kind.lower() in NETWORK_FILE_SYSTEMS:
        raise JobStoreError(
            f"{path} is on a network file system ({kind} at {mount}), where SQLite loses data: set RANKWISE_HOME to a "
            "local directory, or RANKWISE_DATABASE_URL to a PostgreSQL database that all machines share"
        )


logger = logging.getLogger(__name__)
BUSY_TIMEOUT_S = 60
"""How long a SQLite writer waits for another one."""
_BUSY_WAIT_S = 5
"""After so many seconds a stopped process that blocks the writer is named."""
POSTGRESQL_TIMEOUTS = {
    "connect_timeout": 10,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 20_000,
}
"""libpq's settings: an unreachable server is detected after 20 s, well within a lease. Without them, a heartbeat
would wait 15 minutes."""


def open_engine(url: str) -> Engine:
    """Create an engine for the queue's database.

    SQLite runs in WAL mode, and every writing transaction is `BEGIN IMMEDIATE`. With a deferred begin, two processes
    could read the same rows and both claim them.

    Raises:
        JobStoreError: The URL is not for SQLite or PostgreSQL, or the SQLite file is on a network file system.
    """
    parsed = _parsed(url)
    backend = parsed.get_backend_name()
    if backend == "postgresql":
        return _open_postgresql(parsed)
    if backend != "sqlite":
        raise JobStoreError(
            f"RANKWISE_DATABASE_URL: the queue runs on sqlite or postgresql, not on {backend!r}; "
            "leave it unset for a SQLite file in RANKWISE_HOME"
        )
    if parsed.database and parsed.database != ":memory:":
        refuse_network(Path(parsed.database))
        directory = Path(parsed.database).parent
        make_directory(directory, "opening the queue's database")
    engine = create_engine(parsed, connect_args={"timeout": min(_BUSY_WAIT_S, BUSY_TIMEOUT_S)})

    @event.listens_for(engine, "connect")
    def _configure(connection: Any, _record: Any) -> None:
        # Turns off the driver's own BEGIN; `_begin` issues it.
        connection.isolation_level = None
        cursor = connection.cursor()
        cursor.execute("PRAGMA journal_mode=WAL")
        cursor.execute("PRAGMA synchronous=FULL")
        cursor.execute("PRAGMA foreign_keys=ON")
        cursor.close()

    @event.listens_for(engine, "begin")
    def _begin(connection: Any) -> None:
        if connection.get_execution_options().get("rankwise_read_only", False):
            connection.exec_driver_sql("BEGIN")
        else:
            _begin_writing(connection, Path(parsed.database or ""))

    return engine


def _begin_writing(connection: Any, database: Path) -> None:
    """Begin a transaction when the other writers have ended theirs, or raise after `BUSY_TIMEOUT_S`."""
    deadline = time.monotonic() + BUSY_TIMEOUT_S
    named: set[int] = set()
    while True:
        try:
            connection.exec_driver_sql("BEGIN IMMEDIATE")
        except OperationalError as error:
            if getattr(error.orig, "sqlite_errorcode", None) != sqlite3.SQLITE_BUSY:
                raise
            holders = database_holders(database)
            if time.monotonic() >= deadline:
                raise JobStoreError(
                    f"the queue's database {database} was locked for {BUSY_TIMEOUT_S} s: "
                    + (describe_holders(holders) or "another process is writing to it; try again")
                ) from error
            for holder in holders:
                if holder.stopped and holder.pid not in named:
                    named.add(holder.pid)
                    logger.warning("waiting for the queue's database: %s", holder.text())
        else:
            return


def _parsed(url: str) -> URL:
    try:
        parsed = make_url(url)
        parsed.get_backend_name()
    except (ArgumentError, NoSuchModuleError) as error:
        raise JobStoreError(f"RANKWISE_DATABASE_URL: not a database URL ({error})") from error
    return parsed


def _open_postgresql(url: URL) -> Engine:
    # Settings in the URL take precedence.
    timeouts = {name: value for name, value in POSTGRESQL_TIMEOUTS.items() if name not in url.query}
    try:
        return create_engine(url.set(drivername="postgresql+psycopg"), pool_pre_ping=True, connect_args=timeouts)
    except ImportError as error:
        raise JobStoreError(
            "RANKWISE_DATABASE_URL: PostgreSQL needs the extra `postgres`: pip install 'rankwise[postgres]'"
        ) from error


@contextmanager
def database_errors(doing: str) -> Iterator[None]:
    """Translate errors of the driver into a `JobStoreError`."""
    try:
        yield
    except DBAPIError as error:
        raise JobStoreError(
            f"{doing}: the queue's database failed: {error.orig}; "
            "check that it can be reached and written (RANKWISE_DATABASE_URL)"
        ) from error


def _scripts() -> ScriptDirectory:
    return ScriptDirectory(str(Path(__file__).parent / "migrations"))


def _configuration(engine: Engine) -> Config:
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    config.attributes["engine"] = engine
    return config


def current_revision(engine: Engine) -> str | None:
    """The revision of the database's schema; None for an empty database."""
    # A reader does not wait for writers.
    reader = engine.execution_options(rankwise_read_only=True)
    with database_errors("reading the revision of the queue"), reader.connect() as connection:
        return MigrationContext.configure(connection).get_current_revision()


def has_queue(url: str) -> bool:
    """Whether the database of a URL holds a queue; creates nothing.

    Raises:
        JobStoreError: The database cannot be reached.
    """
    parsed = _parsed(url)
    if parsed.get_backend_name() == "sqlite" and not Path(parsed.database or "").is_file():
        return False
    engine = open_engine(url)
    try:
        return current_revision(engine) is not None
    finally:
        engine.dispose()


def head_revision() -> str:
    """The schema revision of this release."""
    head = _scripts().get_current_head()
    assert head is not None
    return head


def known_revisions() -> frozenset[str]:
    """The schema revisions that this release can upgrade."""
    return frozenset(script.revision for script in _scripts().walk_revisions())


def upgrade(engine: Engine, lock: Path) -> None:
    """Upgrade the schema to this release's revision, one process at a time.

    The lock file serializes the processes of one home. Processes of several homes on one PostgreSQL are serialized by
    an advisory lock that the migration takes.

    Raises:
        JobStoreError: The database was written by a newer release, or cannot be reached.
    """
    with database_errors("migrating the queue"):
        head = head_revision()
        if current_revision(engine) == head:
            return
        make_directory(lock.parent, "locking the queue's migrations")
        with file_lock(lock, "migrating the queue"):
            revision = current_revision(engine)
            if revision is not None and revision not in known_revisions():
                raise JobStoreError(
                    f"the queue's database has revision {revision!r}, which this release does not know "
                    f"(it knows up to {head!r}): it was written by a newer rankwise; install that one"
                )
            if revision != head:
                command.upgrade(_configuration(engine), "head")

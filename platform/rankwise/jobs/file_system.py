"""Whether a SQLite file lies where its locks and its shared memory work."""

from __future__ import annotations

from pathlib import Path

import psutil

from rankwise.exceptions import JobStoreError

NETWORK = frozenset(
    {"afs", "beegfs", "ceph", "cifs", "glusterfs", "gpfs", "lustre", "ncpfs", "nfs", "nfs4", "panfs", "smb2", "smb3"}
    | {"smbfs", "weka", "wekafs"}
    | {"fuse.ceph", "fuse.gcsfuse", "fuse.glusterfs", "fuse.goofys", "fuse.juicefs", "fuse.mount-s3", "fuse.rclone"}
    | {"fuse.s3fs", "fuse.sshfs"}
)
"""Types of file systems, as the kernel calls them."""


def file_system(path: Path) -> tuple[str, str]:
    """The type and the mount point of the file system that holds a path, which need not be there yet."""
    found = ("", "")
    real = path.resolve()
    for part in psutil.disk_partitions(all=True):
        # A later mount on the same point hides the earlier one.
        if real.is_relative_to(part.mountpoint) and len(part.mountpoint) >= len(found[1]):
            found = part.fstype, part.mountpoint
    return found


def refuse_network(path: Path) -> None:
    """Refuse a SQLite file that several machines could open: it gets lost updates there, and damage.

    Raises:
        JobStoreError: It is on a network file system.
    """
    kind, mount = file_system(path)
    if kind.lower() in NETWORK:
        raise JobStoreError(
            f"{path} is on a network file system ({kind} at {mount}), where SQLite loses data: set RANKWISE_HOME to a "
            "local directory, or RANKWISE_DATABASE_URL to a PostgreSQL database that all machines share"
        )

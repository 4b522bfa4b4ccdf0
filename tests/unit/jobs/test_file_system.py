from types import SimpleNamespace

import pytest

from rankwise.exceptions import JobStoreError
from rankwise.jobs import database
from rankwise.jobs import database as file_system


@pytest.fixture
def mounts(monkeypatch):
    table = [("/", "ext4"), ("/data", "nfs4"), ("/data/scratch", "xfs"), ("/over", "nfs"), ("/over", "tmpfs")]
    parts = [SimpleNamespace(mountpoint=point, fstype=kind) for point, kind in table]
    monkeypatch.setattr(file_system.psutil, "disk_partitions", lambda all: parts)


@pytest.mark.usefixtures("mounts")
def test_sqlite_on_a_network_file_system_is_refused():
    with pytest.raises(JobStoreError, match=r"/data/home/rankwise\.db is on a network file system \(nfs4 at /data\)"):
        database.open_engine("sqlite:////data/home/rankwise.db")


@pytest.mark.usefixtures("mounts")
@pytest.mark.parametrize(
    ("path", "found"),
    [("/home/q.db", "ext4"), ("/data/scratch/q.db", "xfs"), ("/database/q", "ext4"), ("/over/q", "tmpfs")],
)
def test_the_innermost_and_latest_mount_counts(tmp_path, path, found):
    from pathlib import Path

    assert file_system.file_system(Path(path))[0] == found
    file_system.refuse_network(Path(path))

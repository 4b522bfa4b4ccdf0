import sqlite3

import pytest

from rankwise.exceptions import JobStoreError
from rankwise.jobs import queries as health
from rankwise.jobs.job import JobKind, NewJob, Worker
from rankwise.jobs.store import JobStore


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "q.db"
    store = JobStore(f"sqlite:///{path}", lock=tmp_path / "lock")
    store.submit([NewJob(kind=JobKind.TRAIN, experiment="e", spec_hash=name, spec={}) for name in "abcd"])
    for _ in range(2):
        store.claim(Worker(name="w", host="h", pid=1), lease=60)
    store.close()
    return path


def problems(path):
    return health.check(f"sqlite:///{path}").problems


def edit(path, statement):
    with sqlite3.connect(path) as connection:
        connection.execute(statement)
    connection.close()


def test_a_queue_in_order_has_no_problems(path):
    found = health.check(f"sqlite:///{path}")
    assert found.problems == ()
    assert (found.jobs, found.revision) == (4, found.head)


def test_a_queue_that_is_not_there_is_said_and_not_made(tmp_path):
    with pytest.raises(JobStoreError, match=r"there is no queue at .*q\.db: `rankwise db upgrade` creates one"):
        problems(tmp_path / "q.db")
    assert not (tmp_path / "q.db").exists()


@pytest.mark.parametrize(("statement", "problem"), [
    ("UPDATE attempt SET ended_at = 1 WHERE job_id = 1", "1 jobs in progress have no open attempt"),
    ("UPDATE job SET state = 'queued' WHERE id = 1", "1 jobs that are not in progress have a token"),
    ("UPDATE job SET token = 'x' WHERE id = 1", "1 open attempts belong to jobs that another attempt holds"),
    ("UPDATE alembic_version SET version_num = '9999'", "written by a newer rankwise; install that one"),
    ("DELETE FROM alembic_version", "the database is empty"),
    ("INSERT INTO job_dependency VALUES (1, 99)", "1 rows refer to missing jobs, the first one in table job_d"),
    ("UPDATE job SET definition = 'x'", "4 rows refer to missing definitions, the first one in table job"),
])  # fmt: skip
def test_what_is_wrong_is_said(path, statement, problem):
    edit(path, statement)
    assert any(problem in text for text in problems(path)), problems(path)


def test_jobs_that_wait_in_vain_are_said(path):
    edit(path, "INSERT INTO job_dependency VALUES (3, 4)")
    edit(path, "UPDATE job SET state = 'failed' WHERE id = 4")
    assert problems(path) == ("1 queued jobs wait for a failed or cancelled job",)


def test_a_damaged_file_is_said(path):
    content = bytearray(path.read_bytes())
    content[4096 * 2 : 4096 * 3] = b"\xff" * 4096
    path.write_bytes(content)
    try:
        found = " ".join(problems(path))
    except JobStoreError as error:
        found = str(error)
    assert "damaged" in found or "malformed" in found


def test_a_password_is_never_shown():
    assert health.shown("postgresql://me:secret@host/db") == "postgresql://me:***@host/db"


def test_the_path_of_a_file_is_shown_as_people_write_it():
    assert health.shown("sqlite:////home/Jürgen K/rankwise.db") == "sqlite:////home/Jürgen K/rankwise.db"

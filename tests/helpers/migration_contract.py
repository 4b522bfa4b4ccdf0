"""What a migration must keep. A test module subclasses `MigrationContract` and gives `saved` and `lock` fixtures."""

from __future__ import annotations

from dataclasses import replace

import pytest
from alembic import command, op
from sqlalchemy import MetaData, select

from helpers.saved_queues.make import arm_work
from rankwise.jobs import queries as health
from rankwise.jobs.database import _configuration, current_revision, head_revision, open_engine, upgrade
from rankwise.jobs.job import JobKind, JobState, NewJob, Outcome, Worker
from rankwise.jobs.rows import Table
from rankwise.jobs.store import JobStore
from rankwise.tasks.context import ArmWork

WORKER = Worker(name="new", host="new", pid=2)
# What waited for a failed job for ever is cancelled by the migration.
CHANGED = {"waits-in-vain-hash", "waits-in-vain-too-hash"}


def contents(engine):
    """All rows of all tables, by table."""
    metadata = MetaData()
    metadata.reflect(engine)
    with engine.connect() as connection:
        return {
            name: [dict(row._mapping) for row in connection.execute(select(table).order_by(*table.primary_key))]
            for name, table in metadata.tables.items()
        }


class MigrationContract:
    @pytest.fixture
    def engine(self, saved):
        engine = open_engine(saved)
        yield engine
        engine.dispose()

    def test_no_value_of_a_saved_queue_is_lost(self, saved, engine, lock):
        before = contents(engine)
        assert {row["state"] for row in before["job"]} == {str(state) for state in JobState}
        upgrade(engine, lock)
        after = contents(engine)
        assert current_revision(engine) == head_revision()
        for name in ("job", "job_dependency", "attempt"):
            assert len(after[name]) == len(before[name]) > 4
            for old, new in zip(before[name], after[name], strict=True):
                if old.get("spec_hash") not in CHANGED:
                    assert old.items() <= new.items()
        assert health.check(saved).problems == ()

    def test_what_waited_in_vain_is_cancelled_and_says_why(self, saved, lock):
        store = JobStore(saved, lock=lock)
        first, second = sorted((job for job in store.jobs() if job.spec_hash in CHANGED), key=lambda job: job.spec_hash)
        cause = next(job for job in store.jobs() if job.spec_hash == "fatal-hash")
        assert (first.state, first.error) == (JobState.CANCELLED, f"{cause.title} failed")
        assert (second.state, second.error) == (JobState.CANCELLED, f"{first.title} was cancelled")
        store.close()

    def test_life_goes_on_after_a_migration(self, saved, lock):
        store = JobStore(saved, lock=lock)
        jobs = {job.spec_hash: job for job in store.jobs()}
        running, asked = jobs["running-hash"], jobs["asked-to-stop-hash"]
        assert store.beat([running.token, asked.token], lease=60).cancelled == {asked.token}
        assert store.finish(running.token, Outcome.SUCCEEDED, result={"done": True})
        assert store.claim(WORKER, lease=60)[0].spec_hash == "urgent-hash"
        pack = store.claim(WORKER, lease=60, max_arms=9, among=[jobs["pack-a-hash"].id, jobs["pack-b-hash"].id])
        assert [job.pack_id for job in pack] == [jobs["pack-a-hash"].pack_id] * 2
        left = {job.spec_hash for job in iter(lambda: next(iter(store.claim(WORKER, lease=60)), None), None)}
        assert {"waits-for-succeeded-hash", "waits-for-running-hash", "lost-hash", "plain-hash"} <= left
        assert store.retry([jobs["fatal-hash"].id])[0].state is JobState.QUEUED
        store.close()

    def test_work_that_was_queued_before_definitions_had_a_table_is_still_known(self, revision, saved, lock):
        store = JobStore(saved, lock=lock)
        jobs = [job for job in store.jobs() if "arm" in job.spec]
        assert len(jobs) == (revision == "0003")
        for job in jobs:
            # An arm of that time has the first version of rendering.
            work = arm_work()
            dataset = work.arm.dataset.model_copy(update={"rendering": 1})
            work = replace(work, arm=work.arm.model_copy(update={"dataset": dataset}))
            assert ArmWork.of(job) == work
            (again,) = store.submit([work.train_job()], again=True)
            assert again == job
            assert store.claim(WORKER, lease=60, among=[job.id])[0].spec == job.spec
        store.close()

    def test_definitions_go_back_into_the_payloads_for_the_release_before(self, saved, engine, lock):
        store = JobStore(saved, lock=lock)
        spec = {"arm": "{}", "definition": "version: 1\n", "group": None}
        (job,) = store.submit([NewJob(kind=JobKind.TRAIN, experiment="e", spec_hash="new", spec=spec)])
        store.close()
        before = {row["id"]: row["spec"] for row in contents(engine)["job"]}
        command.downgrade(_configuration(engine), "0003")
        after = {row["id"]: row["spec"] for row in contents(engine)["job"]}
        assert after.pop(job.id) == spec
        assert before.pop(job.id) == {**spec, "definition": None}
        assert after == before
        upgrade(engine, lock)
        assert {row["id"]: row["spec"] for row in contents(engine)["job"]}[job.id] == spec

    def test_a_migration_that_is_cut_off_leaves_the_old_schema(self, saved, engine, lock, monkeypatch):
        before = contents(engine)

        def full(*arguments, **named):
            raise OSError("no space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(op, "create_table", full)
            with pytest.raises(OSError, match="no space left"):
                upgrade(engine, lock)
        assert contents(engine) == before
        upgrade(engine, lock)
        assert set(contents(engine)) >= set(Table.metadata.tables)

    def test_a_check_tells_that_the_database_is_behind(self, saved):
        found = health.check(saved)
        assert found.problems == (
            f"the database has revision {found.revision}, this release needs {found.head}: run `rankwise db upgrade`",
        )

from __future__ import annotations

import json
import threading
import time

import click
import pytest
from click.testing import CliRunner

from rankwise.cli.jobs import follow, jobs, open_queue, status
from rankwise.cli.maintenance import db
from rankwise.exceptions import JobError, JobStoreError
from rankwise.jobs.database import head_revision
from rankwise.jobs.job import JobKind, NewJob, Outcome, Worker
from rankwise.logs import job_log_path
from rankwise.settings import Settings

WORKER = Worker(name="here:7", host="here", pid=7)


@pytest.fixture
def queue():
    """One job trained, one that runs, one that failed with what waited for it, one queued."""
    with open_queue() as queue:
        trains = queue.submit([
            NewJob(kind=JobKind.TRAIN, experiment="e", spec_hash=f"{name}-hash", spec={"r": 8}, pack_key="p")
            for name in ("done", "running", "failed", "queued")
        ])  # fmt: skip
        evaluate = NewJob(kind=JobKind.EVALUATE, experiment="f", spec_hash="x", spec={}, after=(trains[2].id,))
        queue.submit([evaluate])
        done, running, failed = queue.claim(WORKER, lease=60, max_arms=3)
        queue.finish(done.token, Outcome.SUCCEEDED, result={"loss": 1.5})
        queue.finish(failed.token, Outcome.FATAL, error="loss is not finite\nat step 3")
        progress = {"phase": "train", "step": 10, "steps": 40, "tokens_per_second": 90.0}
        queue.beat([running.token], lease=60, progress={running.token: progress})
        queue.announce(WORKER, {"device": "cpu", "state": "working"})
        yield queue


def call(command, *arguments):
    return CliRunner().invoke(command, arguments, catch_exceptions=False)


def listed(*arguments):
    return [row["id"] for row in json.loads(call(jobs, "list", "--json", *arguments).stdout)["jobs"]]


@pytest.mark.usefixtures("queue")
def test_jobs_are_listed_by_state_kind_experiment_and_page():
    assert listed() == [1, 2, 3, 4, 5]
    assert listed("--state", "failed", "--state", "running") == [2, 3]
    assert listed("--kind", "evaluate") == listed("--experiment", "f") == [5]
    assert listed("--limit", "2") == [1, 2]
    assert listed("--limit", "2", "--after", "2") == [3, 4]
    assert "continue with --after 2" in call(jobs, "list", "--limit", "2").stderr
    row = json.loads(call(jobs, "list", "--json", "--limit", "1").stdout)["jobs"][0]
    assert list(row) == ["id", "kind", "state", "spec_hash", "attempts", "failures", "preemptions", "run_id", "error"]
    text = call(jobs, "list").stdout
    assert "loss is not finite" in text
    assert "at step 3" not in text, "one line a job"


def test_a_job_is_shown_with_its_attempts_and_the_end_of_its_log(queue):
    path = job_log_path(Settings.load(), 3)
    path.parent.mkdir(parents=True)
    line = {"timestamp": "2030-01-02T03:04:05.6Z", "level": "error", "event": "it broke", "step": 3}
    path.write_text(f"{json.dumps(line)}\nnot json\n")
    text = call(jobs, "show", "3").stdout
    assert text.splitlines()[0] == "job 3 (train failed-hash) of e: failed"
    assert "attempt 1 by here:7: fatal after" in text
    assert "2030-01-02 03:04:05 error   it broke step=3" in text
    shown = json.loads(call(jobs, "show", "3", "--json").stdout)
    assert shown["log"] == [line, "not json"]
    assert [each["outcome"] for each in shown["history"]] == ["fatal"]
    assert "token" not in shown["history"][0]
    assert json.loads(call(jobs, "show", "5", "--json").stdout)["cancelled_by"] == 3


def test_what_a_queued_job_waits_for_is_shown(queue):
    queue.submit([NewJob(kind=JobKind.EVALUATE, experiment="e", spec_hash="y", spec={}, after=(1, 2))])
    assert "waits for job 2 (train running-hash), which is running" in call(jobs, "show", "6").stdout


def test_jobs_are_cancelled_and_tried_again(queue):
    said = call(jobs, "cancel", "2", "4").stderr.splitlines()
    assert said == ["job 2: running (stopping)", "job 4: cancelled"]
    assert call(jobs, "retry", "5").stderr.startswith("job 5: cancelled: job 3 (train failed-hash) failed")
    back = json.loads(call(jobs, "retry", "3", "4", "--json").stdout)["jobs"]
    assert [(row["id"], row["state"], row["failures"]) for row in back] == [
        (3, "queued", 0),
        (4, "queued", 0),
        (5, "queued", 0),
    ]
    with pytest.raises(JobError, match="there is no job 99"):
        call(jobs, "retry", "3", "99")


def test_all_jobs_of_an_experiment_are_cancelled_and_its_failed_ones_tried_again(queue):
    with pytest.raises(click.UsageError, match="give job ids, or --experiment NAME"):
        CliRunner().invoke(jobs, ["cancel"], standalone_mode=False, catch_exceptions=False)
    with pytest.raises(click.UsageError):
        CliRunner().invoke(jobs, ["retry", "3", "--experiment", "e"], standalone_mode=False, catch_exceptions=False)
    said = call(jobs, "cancel", "--experiment", "e").stderr.splitlines()
    assert said == ["job 2: running (stopping)", "job 4: cancelled"]
    back = json.loads(call(jobs, "retry", "--experiment", "e", "--json").stdout)["jobs"]
    assert [row["id"] for row in back] == [3, 5], "what was cancelled stays so, but for what waits for a failed one"
    with pytest.raises(JobError, match="experiment 'e' has no job that is failed; see `rankwise jobs list`"):
        call(jobs, "retry", "--experiment", "e")


def test_a_job_that_waits_after_a_failure_says_until_when(queue):
    queue.finish(queue.get(2).token, Outcome.FAILED, error="crash")
    row = next(line for line in call(jobs, "list").stdout.splitlines() if line.startswith("2 "))
    assert "queued (retry in 10 s)" in row or "queued (retry in 9 s)" in row
    assert "queued (retry in" in call(jobs, "show", "2").stdout.splitlines()[0]


def test_a_log_that_is_not_here_says_where_it_may_be(queue):
    with pytest.raises(JobError, match=r"job 4 \(train queued-hash\) has no log: no worker has started it yet"):
        call(jobs, "logs", "4")
    with pytest.raises(JobError, match=r"has no log at .*3\.log: it ran on here; look in RANKWISE_HOME there"):
        call(jobs, "logs", "3")


def test_a_log_is_followed_until_the_job_has_ended(queue):
    path = job_log_path(Settings.load(), 2)

    def work():
        time.sleep(0.2)
        path.parent.mkdir(parents=True)
        with path.open("a") as file:
            for part in ('{"event": "one"', '}\n{"event": "two"}\n{"event": "three"}\n'):
                file.write(part)
                file.flush()
                time.sleep(0.4)
        queue.finish(queue.get(2).token, Outcome.SUCCEEDED)

    thread = threading.Thread(target=work)
    thread.start()
    result = call(jobs, "logs", "2", "-f", "--json")
    thread.join()
    assert [json.loads(line)["event"] for line in result.stdout.splitlines()] == ["one", "two", "three"]
    assert call(jobs, "logs", "2", "-n", "1", "--json").stdout == '{"event": "three"}\n'


def test_a_line_written_at_the_very_end_is_not_left_out(tmp_path):
    path = tmp_path / "log"
    path.write_text("first\n")

    def ended():
        # The job ends, and its last words come, after the file was read.
        with path.open("a") as file:
            file.write("last\n")
        return True

    assert list(follow(path, None, ended)) == ["first", "last"]


@pytest.mark.usefixtures("queue")
def test_status_tells_depth_packs_workers_and_the_time_left():
    found = json.loads(call(status, "--json").stdout)
    assert found["jobs"]["train"] == {
        "queued": 1, "running": 1, "uploading": 0, "succeeded": 1, "failed": 1, "cancelled": 0
    }  # fmt: skip
    assert [(worker["name"], worker["device"]) for worker in found["workers"]] == [("here:7", "cpu")]
    (pack,) = found["packs"]
    assert (pack["jobs"], pack["step"], pack["steps"], pack["tokens_per_second"]) == ([2], 10, 40, 90.0)
    assert found["eta_seconds"]["train"] > 0
    assert found["eta_seconds"]["predict"] == 0
    text = call(status).stdout
    assert "train of e: 1 jobs (2) by here:7, train, step 10 of 40, 90 tokens/s" in text
    assert "worker here:7, cpu, working" in text
    assert json.loads(call(status, "--json", "--experiment", "f").stdout)["packs"] == []


@pytest.mark.usefixtures("queue")
def test_a_probe_tells_whether_a_worker_of_this_host_was_heard_of(monkeypatch):
    monkeypatch.setattr("rankwise.cli.jobs.host_name", lambda: "here")
    assert probe() == (0, "")
    monkeypatch.setattr("rankwise.cli.jobs._SILENT_S", -1)
    code, said = probe()
    assert code == 1
    assert "no sign of life from a worker of here for" in said
    monkeypatch.setattr("rankwise.cli.jobs.host_name", lambda: "elsewhere")
    assert probe() == (1, "no worker of elsewhere is registered in the queue\n")


def probe():
    result = CliRunner().invoke(status, ["--alive"], standalone_mode=False)
    assert result.stdout == ""
    return result.return_value, result.stderr


def test_status_of_an_empty_queue_says_so():
    assert call(status).stdout == "no jobs\n"


def test_the_database_is_upgraded_and_checked(monkeypatch, tmp_path):
    with pytest.raises(JobStoreError, match="there is no queue at"):
        call(db, "check")
    assert f"revision none -> {head_revision()}" in call(db, "upgrade").stderr
    assert json.loads(call(db, "upgrade", "--json").stdout)["before"] == head_revision()
    result = CliRunner().invoke(db, ["check"], standalone_mode=False)
    assert result.return_value == 0
    assert f"revision {head_revision()}, 0 jobs, no problems" in result.stderr
    from helpers.databases import load_sqlite

    monkeypatch.setenv("RANKWISE_DATABASE_URL", load_sqlite("0001", tmp_path / "old.db"))
    result = CliRunner().invoke(db, ["check"], standalone_mode=False)
    assert result.return_value == 3
    assert f"has revision 0001, this release needs {head_revision()}: run `rankwise db upgrade`" in result.stderr

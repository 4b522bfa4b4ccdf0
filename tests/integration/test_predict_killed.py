"""`rankwise predict` and workers that do it are killed at any moment: the next start gives the same file."""

from __future__ import annotations

import json
import random
import signal
import time

import pytest
from helpers.fault_table import record
from helpers.predicting import COMMAND, left_behind, make_predicting, shards_of
from helpers.waiting import until
from helpers.workers import Process, processes, queue_of

from rankwise.inference.shards import Parts
from rankwise.jobs.job import JobKind, JobState

ROWS = 60
LEASE = 3
WORKER = ["worker", "--drain", "--lease", str(LEASE)]


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    return make_predicting(tmp_path_factory.mktemp("killed"), ROWS)


@pytest.fixture(scope="module")
def undisturbed(project):
    """The output of a command that nobody disturbed, and the seconds that it took."""
    began = time.monotonic()
    project.succeed(*COMMAND, "whole.jsonl")
    took = time.monotonic() - began
    content = (project.directory / "whole.jsonl").read_bytes()
    rows = [json.loads(line) for line in content.splitlines()]
    assert [row["id"] for row in rows] == list(range(ROWS))
    assert all("error" not in row for row in rows)
    return content, took


def kill_local(project, output, moments):
    """Start the command again and again and kill it: after seconds (a float), or at a number of shards (an int)."""
    killed = []
    for moment in moments:
        process = Process(project, *COMMAND, output)
        if isinstance(moment, float):
            time.sleep(moment)
        else:
            until(lambda: shards_of(project, output) >= moment or process.popen.poll() is not None)  # noqa: B023
        done = process.popen.poll() is not None
        process.kill()
        until(lambda: not processes(project), 20, "the end of the process")
        if done:
            # It was quicker than the moment: what it has made is what is asked for.
            break
        killed.append(shards_of(project, output))
    if not (project.directory / output).exists() or shards_of(project, output):
        project.succeed(*COMMAND, output)
    return killed


def test_a_command_that_was_killed_goes_on_where_it_was(project, undisturbed):
    killed = kill_local(project, "quick.jsonl", [3, 9])
    assert len(killed) == 2
    assert 0 < killed[0] < killed[1] < ROWS / 2
    assert (project.directory / "quick.jsonl").read_bytes() == undisturbed[0]
    assert left_behind(project, "quick.jsonl") == []


@pytest.mark.faults
def test_kill_9_of_the_command_at_seeded_moments(project, undisturbed):
    content, took = undisturbed
    draw = random.Random(6)
    kills, shards = 0, []
    for number in range(8):
        output = f"local-{number}.jsonl"
        moments = [draw.uniform(0.0, took) if number % 2 else draw.randint(1, ROWS // 2 - 1) for _ in range(3)]
        killed = kill_local(project, output, moments if number % 2 else sorted(moments))
        kills += len(killed)
        shards += killed
        assert (project.directory / output).read_bytes() == content
        assert left_behind(project, output) == []
    assert kills >= 12
    record(
        f"kill -9 of rankwise predict at {kills} seeded moments",
        "the next start gives the same file, each row once, nothing left behind",
        f"8 files of {ROWS} rows equal to the undisturbed one; killed with {min(shards)} to {max(shards)} of "
        f"{ROWS // 2} shards there",
    )


@pytest.mark.faults
def test_kill_9_of_workers_that_run_predict_jobs(project, undisturbed):
    content, _ = undisturbed
    draw = random.Random(7)
    worker = None
    killed = dict.fromkeys(("child", "parent", "both"), 0)
    files = 4
    for number in range(files):
        project.succeed(*COMMAND, f"jobs-{number}.jsonl", "--submit", "--shards", "3")
    with queue_of(project) as queue:
        for moment in range(12):
            if all(job.ended for job in queue.jobs(kinds=[JobKind.PREDICT])):
                break
            if worker is None or worker.popen.poll() is not None:
                worker = Process(project, *WORKER)
            until(lambda: queue.counts()[JobState.RUNNING] or worker.popen.poll() is not None)  # noqa: B023
            if moment % 2:
                time.sleep(draw.uniform(0.0, 2.0))
            else:
                wanted = draw.randint(1, 6)
                until(lambda: begun(project, queue) >= wanted or worker.popen.poll() is not None)  # noqa: B023
            victim = ("child", "parent", "both")[moment % 3]
            children = [info.info["child"] for info in queue.workers() if info.info.get("child") is not None]
            if victim in ("child", "both"):
                for pid, process in processes(project).items():
                    if pid in children:
                        process.kill()
            if victim in ("parent", "both"):
                worker.kill()
                until(lambda: not processes(project), 20, "the end of the child")
                worker = None
            killed[victim] += 1
        for _ in range(3):
            # A job that was hit three times has failed; a person may try it again.
            assert project.run(*WORKER).returncode == 0
            queue.retry([job.id for job in queue.jobs() if job.state is JobState.FAILED])
        jobs = queue.jobs(kinds=[JobKind.PREDICT])
        assert {job.state for job in jobs} == {JobState.SUCCEEDED}, [(job.id, job.error) for job in jobs]
        attempts = sum(job.attempts for job in jobs)
        reused = sum(job.result.get("reused", 0) for job in jobs)
    assert attempts > len(jobs)
    assert reused > 0
    for number in range(files):
        assert (project.directory / f"jobs-{number}.jsonl").read_bytes() == content
        assert left_behind(project, f"jobs-{number}.jsonl") == []
    record(
        f"kill -9 of workers that run predict jobs ({', '.join(f'{who} {count}' for who, count in killed.items())})",
        "the output is the local command's to the byte, each row once, nothing left behind",
        f"{files} files of {ROWS} rows equal; {len(jobs)} jobs in {attempts} attempts, {reused} rows not answered anew",
    )


def begun(project, queue):
    """Shards on disk of the job that is answered now."""
    found = 0
    for job in queue.jobs(kinds=[JobKind.PREDICT], states=[JobState.RUNNING]):
        if job.spec["span"] is not None:
            parts = Parts(project.directory / f"{job.spec['output'].rpartition('/')[2]}", job.spec["whole"])
            found = max(found, sum(parts.has(shard) for shard in range(*job.spec["span"])))
    return found


@pytest.mark.faults
def test_sigterm_of_a_worker_that_answers_keeps_the_shard_under_way(project, undisturbed):
    project.succeed(*COMMAND, "terminated.jsonl", "--submit")
    worker = Process(project, *WORKER)
    until(lambda: shards_of(project, "terminated.jsonl") >= 3)
    began = time.monotonic()
    worker.popen.send_signal(signal.SIGTERM)
    assert worker.wait(60) == 130, worker.said
    ended = time.monotonic() - began
    kept = shards_of(project, "terminated.jsonl")
    with queue_of(project) as queue:
        (job,) = [job for job in queue.jobs(states=[JobState.QUEUED]) if job.spec["span"] is not None]
        assert (job.preemptions, job.failures) == (1, 0)
        project.succeed(*WORKER)
        assert queue.get(job.id).result["reused"] == 2 * kept
    assert (project.directory / "terminated.jsonl").read_bytes() == undisturbed[0]
    record(
        "SIGTERM of a worker that runs a predict job",
        "the shard under way is kept, the job goes back as preempted and goes on at the next shard",
        f"ended after {ended:.1f} s with {kept} of {ROWS // 2} shards; the rest by the next worker, file equal",
    )

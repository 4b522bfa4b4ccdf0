"""Workers that are killed, stopped, told to stop, hung, or whose clock is wrong: the work is as if nothing had been."""

import random
import re
import signal
import time

import psutil
import pytest
from helpers.fault_table import record
from helpers.project import make_project
from helpers.waiting import until
from helpers.workers import (
    Process,
    adapters,
    at_rest,
    processes,
    queue_of,
    saved_steps,
    send,
    starts,
    told_steps,
)
from helpers.workers import submitted as submit_arms

from rankwise.jobs.job import JobKind, JobState

pytestmark = pytest.mark.faults

STEPS, SAVED = 150, 5
SEEDS = range(8)
MOMENTS = 20
LEASE = 3
WORKER = ["worker", "--drain", "--max-arms", "2", "--lease", str(LEASE)]


def submitted(directory, seeds=(0,), steps=STEPS, saved=SAVED):
    """A project with two arms for each seed in the queue."""
    return submit_arms(directory, seeds, steps, saved)


def queued(project, state):
    """Train jobs in a state."""
    with queue_of(project) as queue:
        return queue.jobs(kinds=[JobKind.TRAIN], states=[state], limit=1000)


def claimed(project):
    return queued(project, JobState.RUNNING)


def stopped_processes(project):
    return [each for each in processes(project).values() if each.status() == psutil.STATUS_STOPPED]


def trained(project):
    """Steps of the pack that is trained now."""
    told = told_steps(project)
    return max((told.get(job.mlflow_run_id, 0) for job in claimed(project)), default=0)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The adapters of all seeds, from a worker that nobody disturbed."""
    project = submitted(tmp_path_factory.mktemp("undisturbed"), SEEDS)
    project.succeed(*WORKER)
    at_rest(project, STEPS)
    return adapters(project)


def test_kill_9_of_child_parent_and_both(tmp_path, undisturbed):
    project = submitted(tmp_path, SEEDS)
    draw = random.Random(20)
    worker = None
    last_steps: dict[tuple[int, int], int] = {}
    killed = dict.fromkeys(("child", "parent", "both"), 0)
    orphans = 0.0
    for moment in range(MOMENTS):
        if worker is None or worker.popen.poll() is not None:
            worker = Process(project, *WORKER)
        until(lambda: claimed(project))
        if moment % 2:
            time.sleep(draw.uniform(0.0, 2.5))
        else:
            step = draw.randint(1, STEPS - 1)
            until(lambda: trained(project) >= step or not claimed(project), what=f"step {step}")  # noqa: B023
        victim = ("child", "parent", "both")[moment % 3]
        with queue_of(project) as queue:
            children = [info.info["child"] for info in queue.workers() if info.info.get("child") is not None]
            held = {job.id: job for job in queue.jobs(kinds=[JobKind.TRAIN], limit=1000) if job.token}
        if victim in ("child", "both"):
            for pid, process in processes(project).items():
                if pid in children:
                    process.kill()
        if victim in ("parent", "both"):
            worker.kill()
            orphans = max(orphans, until(lambda: not processes(project), 20, "the end of the child"))
            worker = None
        killed[victim] += 1
        told = told_steps(project)
        last_steps |= {(job.id, job.attempts): told.get(job.mlflow_run_id, 0) for job in held.values()}
    for _ in range(3):
        # A job that was hit three times has failed; a person may try it again.
        project.succeed(*WORKER)
        with queue_of(project) as queue:
            failed = [job.id for job in queue.jobs(limit=1000) if job.state is JobState.FAILED]
            queue.retry(failed)
    at_rest(project, STEPS)
    redone = []
    with queue_of(project) as queue:
        for job in queue.jobs(kinds=[JobKind.TRAIN], limit=1000):
            begun = starts(project, job)
            for (job_id, attempt), last in last_steps.items():
                after = [number for number in sorted(begun) if number > attempt]
                if job_id == job.id and 0 < last < STEPS and after:
                    redone.append(last - begun[after[0]])
        attempts = sum(job.attempts for job in queue.jobs(limit=1000))
        jobs = len(queue.jobs(limit=1000))
    assert redone
    assert all(0 <= steps <= SAVED for steps in redone), redone
    assert adapters(project) == undisturbed
    record(
        f"kill -9 at {MOMENTS} seeded moments ({', '.join(f'{who} {count}' for who, count in killed.items())})",
        f"all finish, no orphan, redone steps <= {SAVED}, adapters byte-equal, 1 version each",
        f"{jobs} jobs in {attempts} attempts; {len(redone)} resumptions, {max(redone)} steps redone at most; "
        f"child gone within {orphans:.1f} s; {len(undisturbed)} adapters equal",
    )


def test_a_worker_that_stood_still_past_its_lease_changes_nothing_any_more(tmp_path):
    steps = 1500
    project = submitted(tmp_path, steps=steps, saved=100)
    zombie = Process(project, *WORKER)
    until(lambda: saved_steps(project), what="a checkpoint")
    stopped = processes(project)
    send(project, signal.SIGSTOP)
    began = time.monotonic()
    second = Process(project, *WORKER)
    until(lambda: len(claimed(project)) == 2 and all(job.attempts == 2 for job in claimed(project)), what="a takeover")
    takeover = time.monotonic() - began
    time.sleep(1)
    for process in stopped.values():
        process.send_signal(signal.SIGCONT)
    assert zombie.wait() == 0, zombie.said
    assert second.wait() == 0, second.said
    assert "was taken over by another worker" in zombie.said
    at_rest(project, steps)
    with queue_of(project) as queue:
        for job in queue.jobs(kinds=[JobKind.TRAIN]):
            outcomes = [attempt.outcome for attempt in queue.attempts(job.id)]
            assert outcomes == ["lost", "succeeded"]
            assert job.failures == 0
    record(
        f"SIGSTOP past the lease ({LEASE} s), another takes over, SIGCONT",
        "the zombie's heartbeat and finish change 0 rows, 1 version, 0 duplicate points",
        f"taken over after {takeover:.1f} s; 2 arms x {steps} points, each once; 2 versions for 2 jobs",
    )


def test_a_worker_stopped_between_the_token_check_and_the_registration_leaves_one_version(tmp_path):
    project = submitted(tmp_path)
    zombie = Process(project, "2", str(LEASE), "600", module="helpers.faulty_worker", FAULT="stop_before_registering")
    until(lambda: (project.home / "fault-stop_before_registering").exists(), what="the stop")
    until(lambda: len(stopped_processes(project)) == 2, what="the stop of both")
    second = Process(project, *WORKER)
    assert second.wait() == 0, second.said
    # If the sender was inside a transaction, the second worker has ended the child.
    for process in stopped_processes(project):
        process.send_signal(signal.SIGCONT)
    assert zombie.wait() == 0, zombie.said
    both = project.succeed("sync", "--json")
    at_rest(project, STEPS)
    record(
        "SIGSTOP between token check and registration",
        "at rest 1 version each",
        f"{both.count('models:/tiny-adder/')} superfluous version removed by the zombie or by sync",
    )


@pytest.mark.parametrize("database", ["mlflow", "queue"])
def test_a_worker_stopped_inside_a_transaction_is_ended_when_its_lease_has_expired(tmp_path, database):
    project = submitted(tmp_path)
    fault = f"stop_in_{database}"
    zombie = Process(project, "2", str(LEASE), "600", module="helpers.faulty_worker", FAULT=fault)
    until(lambda: (project.home / f"fault-{fault}").exists(), what="the stop")
    until(lambda: len(stopped_processes(project)) == 2, what="the stop of both")
    began = time.monotonic()
    second = Process(project, *WORKER)
    assert second.wait() == 0, second.said
    took = time.monotonic() - began
    file = {"mlflow": "mlflow.db", "queue": "rankwise.db"}[database]
    assert re.search(
        rf"ended process \d+ of worker \S+, whose lease has expired: it was stopped and held the lock of \S+{file}",
        second.said,
    ), second.said
    # Only the process with the lock was ended.
    (parent,) = stopped_processes(project)
    parent.send_signal(signal.SIGCONT)
    assert zombie.wait() == 0, zombie.said
    assert "out of memory" not in zombie.said
    project.succeed("sync", "--json")
    at_rest(project, STEPS)
    record(
        f"SIGSTOP inside a transaction on {file}, lease {LEASE} s",
        "another worker ends the stopped process and finishes its jobs",
        f"all done {took:.0f} s after the second worker's start",
    )


@pytest.mark.parametrize("times", [1, 2])
def test_sigterm_keeps_a_checkpoint_and_gives_the_jobs_back(tmp_path, undisturbed, times):
    project = submitted(tmp_path)
    worker = Process(project, *WORKER)
    until(lambda: saved_steps(project), what="a checkpoint")
    began = time.monotonic()
    for _ in range(times):
        worker.popen.send_signal(signal.SIGTERM)
        time.sleep(0.05)
    assert worker.wait(60) == 130, worker.said
    ended = time.monotonic() - began
    assert not processes(project)
    with queue_of(project) as queue:
        jobs = queue.jobs(kinds=[JobKind.TRAIN])
        assert [(job.state, job.preemptions, job.failures) for job in jobs] == [("queued", 1, 0)] * 2
    kept = max(saved_steps(project))
    project.succeed(*WORKER)
    at_rest(project, STEPS)
    found = adapters(project)
    assert found == {key: undisturbed[key] for key in found}
    record(
        f"SIGTERM {'once' if times == 1 else 'twice'}",
        "checkpoint, jobs released as preempted, nothing registered, adapters byte-equal",
        f"ended after {ended:.1f} s, went on from step {kept}",
    )


def test_a_hang_in_the_data_loader_is_noticed_and_the_job_is_tried_again(tmp_path):
    project = submitted(tmp_path)
    patience = 15
    worker = Process(project, "2", "60", str(patience), module="helpers.faulty_worker", FAULT="hang")
    assert worker.wait() == 0, worker.said
    at_rest(project, STEPS)
    with queue_of(project) as queue:
        (first, second) = queue.attempts(1)
    assert first.outcome == "failed"
    assert "during phase tokenize; its thread stacks are in" in first.error
    (stacks,) = [path for path in (project.home / "logs" / "workers").glob("*.stacks") if path.stat().st_size]
    assert "hang_in_the_data_loader" in stacks.read_text()
    record(
        "a hang in the data loader while the process lives",
        "the watchdog fires, the stack is kept, the job is retried",
        f"noticed {first.ended_at - first.started_at:.0f} s after the claim (patience {patience} s), "
        f"succeeded in attempt {second.number}",
    )


def test_what_is_computed_waits_for_the_registry_and_is_not_trained_again(tmp_path, undisturbed):
    project = submitted(tmp_path)
    worker = Process(project, "2", "60", "600", module="helpers.faulty_worker", FAULT="registry_away")
    until(lambda: queued(project, JobState.UPLOADING), what="the state uploading")
    began = time.monotonic()
    assert worker.wait() == 0, worker.said
    assert "trained but not yet registered: the server is away" in worker.said
    at_rest(project, STEPS)
    with queue_of(project) as queue:
        assert {job.attempts for job in queue.jobs()} == {1}
    found = adapters(project)
    assert found == {key: undisturbed[key] for key in found}
    record(
        "the registry does not answer when an arm is computed",
        "the job waits as uploading and is published without training",
        f"published {time.monotonic() - began:.0f} s later in the same attempt, adapters equal",
    )


def test_a_clock_that_is_an_hour_off_decides_nothing(tmp_path):
    project = submitted(tmp_path, seeds=(0, 1))
    ahead = Process(project, "2", str(LEASE), "600", module="helpers.faulty_worker", FAULT="clock")
    right = Process(project, *WORKER)
    assert (ahead.wait(), right.wait()) == (0, 0), ahead.said + right.said
    at_rest(project, STEPS)
    with queue_of(project) as queue:
        jobs = queue.jobs()
        assert {(job.attempts, job.lost, job.failures) for job in jobs} == {(1, 0, 0)}
        workers = {attempt.worker for job in jobs for attempt in queue.attempts(job.id)}
    record(
        "a worker's clock an hour off, beside one that is right",
        "no decision changes",
        f"{len(jobs)} jobs by {len(workers)} workers, 1 attempt each, none lost",
    )


def test_four_processes_start_on_an_empty_home(tmp_path):
    project = make_project(tmp_path, fresh=True)
    began = time.monotonic()
    runs = [
        Process(project, "run", "tiny.yaml", "--set", f"name=tiny-{number}", "--set", f"seed={number}")
        for number in range(4)
    ]
    assert [run.wait() for run in runs] == [0] * 4, "\n".join(run.said for run in runs)
    at_rest(project, 6)
    record(
        "4 processes start on an empty home",
        "all run, one migration",
        f"4 sweeps of 2 arms done in {time.monotonic() - began:.0f} s",
    )


def test_a_cancelled_job_leaves_its_running_pack_within_seconds(tmp_path):
    project = submitted(tmp_path, steps=3000, saved=500)
    worker = Process(project, "worker", "--drain", "--max-arms", "2")
    until(lambda: saved_steps(project), what="a checkpoint")
    with queue_of(project) as queue:
        began = time.monotonic()
        queue.cancel([1])
        until(lambda: queue.get(1).state is JobState.CANCELLED, 30)
        took = time.monotonic() - began
        assert queue.get(2).state is JobState.RUNNING
        assert worker.wait() == 0, worker.said
        assert queue.get(2).state is JobState.SUCCEEDED
    assert took < 10
    record(
        "rankwise cancel while a pack trains",
        "the arm leaves within seconds, its mate goes on",
        f"left in {took:.1f} s",
    )

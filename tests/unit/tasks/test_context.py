import json

import pytest
from helpers.arms import small_arms
from helpers.definitions import DEFINITION

from rankwise.exceptions import ConfigError
from rankwise.experiment.experiment import parse_experiment
from rankwise.jobs.job import Job, JobKind, JobState
from rankwise.tasks.context import ArmWork, Experiments


def work(arm, **changes) -> ArmWork:
    values = {
        "arm": arm,
        "experiment": "diamonds",
        "experiment_id": "1",
        "parent_run_id": "p",
        "run_name": "lora.r=2",
        "register_as": "pricer",
        "log_examples": True,
        "definition": "version: 1\n",
    }
    return ArmWork(**{**values, **changes})


def test_a_row_says_all_that_a_worker_needs():
    (arm,) = small_arms((2,))
    new = work(arm).train_job()
    stored = json.loads(json.dumps(new.spec))
    job = Job(id=1, kind=new.kind, experiment="diamonds", spec_hash=new.spec_hash, spec=stored, state=JobState.QUEUED)
    assert ArmWork.of(job) == work(arm)
    assert ArmWork.of(job).arm.spec_hash == arm.spec_hash


def test_arms_over_one_base_are_mates_in_training():
    first, second = (work(arm).train_job() for arm in small_arms())
    assert first.kind is JobKind.TRAIN
    assert first.spec_hash != second.spec_hash
    assert first.pack_key == second.pack_key


def test_adapters_and_the_bare_base_are_evaluated_together():
    arms = small_arms()
    jobs = [work(arm).evaluate_job(after=(7,)) for arm in arms] + [work(arms[0], bare=True).evaluate_job()]
    assert len({job.pack_key for job in jobs}) == 1
    assert len({job.spec_hash for job in jobs}) == 3
    assert [job.after for job in jobs] == [(7,), (7,), ()]


def test_the_bare_base_is_one_job_whatever_arm_names_it():
    assert len({work(arm, bare=True).evaluate_job().spec_hash for arm in small_arms()}) == 1


def test_a_definition_is_checked_once_however_it_is_spelled():
    experiments = Experiments()
    first = experiments.get(DEFINITION, "here")
    assert first == parse_experiment(DEFINITION, "small.yaml", recorded=True)
    assert {arm.rendering for arm in first.arms} == {1}, "stored without a version: there was only one"
    assert first.text != DEFINITION
    assert experiments.get(DEFINITION, "there") is first
    experiments.add(first)
    assert experiments.get(first.text, "there") is first


def test_the_experiments_used_last_are_known_and_a_wrong_definition_never_is():
    experiments = Experiments()
    first = experiments.get(DEFINITION, "here")
    for number in range(40):
        experiments.get(f"{DEFINITION}seed: {number}\n", "here")
        assert experiments.get(DEFINITION, "here") is first
    assert len(experiments._known) <= 16
    for _ in range(2):
        with pytest.raises(ConfigError, match=r"^the definition of small:6: lora\.r"):
            experiments.get(DEFINITION.replace("  r: 8", "  r: 0"), "the definition of small")

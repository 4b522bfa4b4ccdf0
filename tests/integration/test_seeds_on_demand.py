"""Seeds on demand as `rankwise run` and workers train them, in this process."""

from __future__ import annotations

import json

import pytest
from helpers.inline_worker import Listener, inline_worker, run_inline, submission
from helpers.local_store import prepared_home
from helpers.project import write_rows
from helpers.tiny import make_base

from rankwise.jobs.job import JobKind, JobState
from rankwise.jobs.store import JobStore
from rankwise.tracking.query import search_runs
from rankwise.tracking.store import Store
from rankwise.worker.loop import LoopOptions

DEFINITION = """\
version: 1
name: {name}
base_model: {base}
quantization: {{load_in_4bit: false}}
lora: {{r: 4, lora_alpha: 2*r, target_modules: [q_proj]}}
dataset:
  train: {rows}
  eval: {{split_from: train, rows: 30, seed: 0}}
  limit: {{train: 16}}
  prompt: "{{a}} plus {{b}}"
  completion: "{{sum}}"
training: {{max_steps: 2, per_device_train_batch_size: 2, learning_rate: 1e-2, max_length: 64, save_steps: 100}}
evaluation: {{metrics: [loss], primary_metric: eval.loss}}
sweep: {{parameters: {parameters}}}
"""
RANKS = "{lora.r: [1, 4]}"
RATES = "{lora.r: [1, 4], training.learning_rate: [1e-3, 1e-2]}"
# Far below the noise: the first look cannot decide.
UNDECIDED = "answer: {margin: 1e-7, seeds: {first: 2, most: 3}}\n"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    directory = tmp_path_factory.mktemp("files")
    rows = [{"a": n, "b": n % 5, "sum": n + n % 5} for n in range(60)]
    return make_base(directory / "base"), write_rows(directory / "rows.jsonl", rows)


def definition(files, answer: str, *, name: str = "seeds", parameters: str = RANKS) -> str:
    base, rows = files
    return DEFINITION.format(name=name, base=base, rows=rows, parameters=parameters) + answer


def jobs_of(settings, kind=JobKind.TRAIN):
    queue = JobStore(settings.database_url, lock=settings.home / "queue.lock")
    jobs = queue.jobs(kinds=[kind])
    queue.close()
    return jobs


def trained(settings, *keys: str):
    """How often the arms with these settings were trained: their values and attempts."""
    found = {}
    for job in jobs_of(settings):
        arm = json.loads(job.spec["arm"])
        of_key = {"r": arm["lora"]["r"], "seed": arm["seed"], "rate": arm["training"]["learning_rate"]}
        found[tuple(of_key[key] for key in keys)] = job.attempts
    return found


def tags_of(settings, name="seeds"):
    with Store.open(settings) as store:
        (run,) = search_runs(store.client, store.find_experiment(name), kind="sweep")
    return run


def once(ranks, seeds):
    return {(r, seed): 1 for r in ranks for seed in seeds}


def test_an_undecided_first_look_leads_to_more_seeds_and_then_to_the_last_look(files, tmp_path):
    settings = prepared_home(tmp_path / "home")
    text = definition(files, UNDECIDED)
    comparison, told = run_inline(settings, text)
    assert trained(settings, "r", "seed") == once((1, 4), (0, 1, 2))
    planned = (
        "seeds: 2 seeds of each rank, up to 3 if one is undecided (--no-more-seeds: never); now 4 arms of 2 steps;"
    )
    assert any(line.startswith(planned) for line in told), told
    (look,) = (line for line in told if line.startswith("seeds: first look: "))
    assert "seeds: first look: Undecided: it is open whether r = 1 is enough" in look
    assert "times the standard deviation of a difference over seeds." in look
    assert "3 seeds will probably not decide r = 1." in look
    assert look.endswith(
        "Next: seed 2 of 2 configurations: 2 arms of 2 steps; up to 16 share a step, so at least 2 steps instead of 4"
    )
    answer = comparison["answer"]
    assert (answer["look"], answer["looks"], answer["seeds"]) == (2, 2, 3)
    assert tags_of(settings).status == "FINISHED"

    again, told = run_inline(settings, text)
    assert told == ["nothing to do: all 6 arms are trained and evaluated"]
    assert again["answer"] == answer
    assert set(trained(settings, "r", "seed").values()) == {1}


def test_a_decided_first_look_trains_no_more_seeds(files, tmp_path):
    settings = prepared_home(tmp_path / "home")
    comparison, told = run_inline(settings, definition(files, "answer: {margin: 9, seeds: {first: 2, most: 3}}\n"))
    assert trained(settings, "r", "seed") == once((1, 4), (0, 1))
    assert not any("first look:" in line for line in told)
    answer = comparison["answer"]
    assert (answer["status"], answer["rank"], answer["look"]) == ("enough", 1, 1)
    assert "times the standard deviation of a difference over seeds." in answer["hint"]


def test_no_more_seeds_stops_after_the_first_look_and_a_worker_continues_a_later_submission(files, tmp_path):
    settings = prepared_home(tmp_path / "home")
    text = definition(files, UNDECIDED)
    with inline_worker(settings, Listener()) as loop:
        sweep = loop.call({**submission(text), "more_seeds": False})
        jobs = loop.work(LoopOptions(among=frozenset(sweep["jobs"]), fail_on_outage=True))
        loop.call({**sweep, "do": "finish", "jobs": sorted(jobs), "command": "run"})
        compared = loop.call({"do": "compare", "experiment": "seeds", "width": 200, "terminal": False})
    assert trained(settings, "r", "seed") == once((1, 4), (0, 1))
    answer = compared["json"]["answer"]
    assert (answer["status"], answer["look"]) == ("undecided", 1)
    assert answer["hint"].endswith("`rankwise run` trains up to 3 seeds.")

    listener = Listener()
    with inline_worker(settings, listener) as loop:
        loop.call(submission(text))
        loop.work(LoopOptions(drain=True, fail_on_outage=True))
        compared = loop.call({"do": "compare", "experiment": "seeds", "width": 200, "terminal": False})
    assert trained(settings, "r", "seed") == once((1, 4), (0, 1, 2))
    assert compared["json"]["answer"]["look"] == 2
    assert tags_of(settings).tags["rankwise.answer_text"] == compared["json"]["answer"]["text"]


def test_workers_add_seeds_to_a_submitted_sweep_and_a_lost_decision_is_made_again(files, tmp_path):
    settings = prepared_home(tmp_path / "home")
    with inline_worker(settings, Listener()) as loop:
        # What a worker that died after its last evaluation leaves: every job has ended, and the sweep's run is open.
        ids = loop.call(submission(definition(files, UNDECIDED)))["jobs"]
        settle, loop._settle = loop._settle, lambda jobs: None
        loop.work(LoopOptions(among=frozenset(ids), fail_on_outage=True))
        loop._settle = settle
    assert trained(settings, "r", "seed") == once((1, 4), (0, 1))
    with inline_worker(settings, Listener()) as loop:
        loop._settle([])
        loop.work(LoopOptions(drain=True, fail_on_outage=True))
    assert trained(settings, "r", "seed") == once((1, 4), (0, 1, 2))
    assert all(job.state is JobState.SUCCEEDED for kind in (JobKind.TRAIN, JobKind.EVALUATE)
               for job in jobs_of(settings, kind))  # fmt: skip
    assert tags_of(settings).status == "FINISHED"


def test_pilot_seeds_choose_the_values_that_fresh_seeds_are_trained_at(files, tmp_path):
    settings = prepared_home(tmp_path / "home")
    tuned = "answer: {margin: 9, seeds: {pilot: 1, first: 2, most: 3}, tune: [training.learning_rate]}\n"
    comparison, told = run_inline(settings, definition(files, tuned, parameters=RATES))
    assert any("seeds: 1 pilot seed that chooses training.learning_rate, 2 seeds of each rank" in line for line in told)
    assert any("seeds: first look at the ranks: seeds 1 and 2 of 2 configurations: 4 arms" in line for line in told)
    chosen = {each["r"]: each["tuned"]["training.learning_rate"] for each in comparison["answer"]["ranks"]}
    pilots = {(r, rate, 0): 1 for r in (1, 4) for rate in (1e-3, 1e-2)}
    fresh = {(r, rate, seed): 1 for r, rate in chosen.items() for seed in (1, 2)}
    assert trained(settings, "r", "rate", "seed") == pilots | fresh
    best = {
        r: min(
            (arm["metrics"]["eval.loss"]["value"], arm["params"]["training.learning_rate"])
            for arm in comparison["arms"]
            if arm["params"]["lora.r"] == r and arm["params"]["seed"] == 0
        )[1]
        for r in (1, 4)
    }
    assert chosen == best


def test_seeds_that_other_sweeps_have_trained_are_used(files, tmp_path):
    settings = prepared_home(tmp_path / "home")
    axis = "{lora.r: [1, 4], seed: [0, 1, 2]}"
    run_inline(settings, definition(files, "", name="other", parameters=axis))
    comparison, told = run_inline(settings, definition(files, UNDECIDED))
    assert set(trained(settings, "r", "seed").values()) == {1}
    assert any(line.startswith("seeds: first look: ") for line in told)
    assert (comparison["answer"]["look"], comparison["answer"]["seeds"]) == (2, 3)


def test_an_answer_section_that_is_added_later_adds_seeds_to_the_sweep(files, tmp_path):
    settings = prepared_home(tmp_path / "home")
    run_inline(settings, definition(files, ""))
    assert trained(settings, "r", "seed") == once((1, 4), (0,))
    comparison, _ = run_inline(settings, definition(files, UNDECIDED))
    assert trained(settings, "r", "seed") == once((1, 4), (0, 1, 2))
    assert (
        "was changed once after the sweep was first submitted (before, the margin was not set)"
        in comparison["answer"]["hint"]
    )

"""The answer on real trainings: sweeps drawn from a pool of adapters, whose true differences are known.

The pool has two ranks with many seeds each, trained on a tiny base and evaluated on many rows. Its own means are the
truth. A drawn sweep has a few seeds and a few rows of the pool, without replacement.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
from helpers.project import make_project, write_rows
from scipy import stats

from rankwise.evaluation.contrasts import ENOUGH, NOT_ENOUGH, Tails, contrast, limits, outcomes
from rankwise.evaluation.gather import gather
from rankwise.settings import Settings
from rankwise.tracking.query import read_json
from rankwise.tracking.store import Store

POOL, ROWS, SWEEPS, SEEDS, DRAWN = 40, 200, 4000, 5, 60


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    """Losses of (2, POOL, ROWS): ranks 1 and 4, one row per prompt."""
    project = make_project(tmp_path_factory.mktemp("pool"))
    rows = [{"a": n // 30, "b": n % 30, "sum": n // 30 + n % 30} for n in range(ROWS + 200)]
    write_rows(project.directory / "rows.jsonl", rows)
    done = project.run(
        "run", "tiny.yaml", "--set", f"dataset.eval={{split_from: train, rows: {ROWS}}}",
        "--set", "evaluation.metrics=[loss]", "--set", "training={max_steps: 12, learning_rate: 1e-2, "
        "per_device_train_batch_size: 4, max_length: 64}",
        "--set", f"sweep.parameters={{lora.r: [1, 4], seed: {list(range(POOL))}}}", "--set", "register=null",
        "--max-arms", "40", timeout=1800,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    with Store.open(Settings.load({"RANKWISE_HOME": str(project.home)})) as store:
        arms = gather(store, "tiny").arms
        tables = read_json(store.client, {arm.run_id: "" for arm in arms}, "predictions.json")
    losses: dict[int, list[dict[str, float]]] = {1: [], 4: []}
    for arm in arms:
        columns = tables[arm.run_id]["columns"]
        name, loss = columns.index("id"), columns.index("eval.loss")
        losses[arm.params["lora.r"]].append({row[name]: row[loss] for row in tables[arm.run_id]["data"]})
    names = sorted(losses[1][0])
    return np.array([[[each[name] for name in names] for each in losses[rank]] for rank in (1, 4)])


def drawn(pool, margin, ranks, draw):
    """Codes of one sweep; `ranks` are places in the pool, the last one the reference."""
    rows = draw.choice(pool.shape[2], DRAWN, replace=False)
    # Ranks of one configuration share no adapter.
    seeds = {rank: list(draw.permutation(pool.shape[1])) for rank in set(ranks)}
    results = np.array([pool[rank][[seeds[rank].pop() for _ in range(SEEDS)]][:, rows] for rank in ranks])
    values = results.mean(axis=-1)
    made = contrast(values, (results - values[..., None]) / DRAWN, np.full(DRAWN, 1 / DRAWN))
    tails = Tails.of(0.95, len(ranks) - 1, 1)
    return outcomes(*limits(made, tails.upper, tails.lower), margin)


def interval(count):
    """The 95 % interval of a rate of `count` in SWEEPS (Clopper and Pearson)."""
    return tuple(stats.binomtest(int(count), SWEEPS).proportion_ci(0.95))


@pytest.mark.proof
def test_false_claims_on_real_adapters_are_rare(pool):
    draw = np.random.default_rng(0)
    truth = float(pool[0].mean() - pool[1].mean())
    spread = float(pool.mean(axis=-1).std(axis=1, ddof=1).max())
    print(json.dumps({"truth": truth, "seed_sd": spread, "pool": list(pool.shape)}))
    equal = [drawn(pool, 0.1 * spread, (1, 1, 1, 1), draw) for _ in range(SWEEPS)]
    false = sum((codes == NOT_ENOUGH).any() for codes in equal)
    print(json.dumps({"A/A: not enough": int(false), "interval": interval(false)}))
    assert interval(false)[0] <= 0.05
    worse, better = (0, 1) if truth > 0 else (1, 0)
    for name, margin, wrong in (("enough", 0.999, ENOUGH), ("not enough", 1.001, NOT_ENOUGH)):
        codes = [drawn(pool, margin * abs(truth), (worse, better), draw) for _ in range(SWEEPS)]
        false = sum(bool((code == wrong).any()) for code in codes)
        print(json.dumps({f"false {name}": int(false), "interval": interval(false)}))
        assert interval(false)[0] <= 0.05
    clear = [drawn(pool, abs(truth) + 4 * spread, (worse, better), draw) for _ in range(SWEEPS)]
    found = sum(bool((codes == ENOUGH).any()) for codes in clear)
    print(json.dumps({"true enough": int(found)}))
    assert found > SWEEPS / 2, "a rule that says nothing is never wrong"

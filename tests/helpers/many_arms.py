"""A sweep of any size in a real MLflow store, with curves, per-example results and anatomies, of made-up numbers."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from urllib.parse import urlparse

import numpy as np
from mlflow.entities import Metric, Param

from rankwise.evaluation.gather import PRIMARY_METRIC
from rankwise.evaluation.metrics import Sample, to_tracking, weighted_mean
from rankwise.tracking.query import sweep_tags
from rankwise.tracking.run import KIND, PARENT, REASON, SPEC_HASH
from rankwise.tracking.store import Store

EXAMPLES, STEPS, LAYERS = 200, 60, 12
RANKS, RATES, DROPOUTS, FACTORS = (2, 4, 8, 16, 32, 64), (5e-4, 1e-3, 2e-3, 4e-3), (0.0, 0.05, 0.1), (1, 2, 4)
PRUNED = "pruned at step 16: eval.loss 1.61 is not among the best 25 of 100"
FAILED = "CUDA out of memory: 2.1 GB more were needed, 1.4 GB were free"


def fill(store: Store, name: str, arms: int, *, seed: int = 0) -> str:
    """Write an experiment of `arms` arms, one seed each: 80 % finished, 17 % pruned, 3 % failed; its id."""
    draw = np.random.default_rng(seed)
    experiment, client = store.experiment(name), store.client
    tags = {PRIMARY_METRIC: "eval.loss", **sweep_tags([_hash(number) for number in range(arms)])}
    parent = store.start_run(experiment, name, kind="sweep", system_metrics=False, tags=tags)
    weights = draw.integers(3, 9, EXAMPLES)
    hardness = draw.normal(0.0, 0.5, EXAMPLES)
    base = client.create_run(experiment, run_name="base alone", tags={KIND: "base", PARENT: parent.run_id}).info
    _log(client, base.run_id, to_tracking({"eval.loss": _mean(3.1 + hardness, weights)}), STEPS)
    client.set_terminated(base.run_id, "FINISHED")
    for number in range(arms):
        chosen = {"r": draw.choice(RANKS), "rate": draw.choice(RATES), "dropout": draw.choice(DROPOUTS),
                  "factor": draw.choice(FACTORS)}  # fmt: skip
        status = draw.choice(["FINISHED", "KILLED", "FAILED"], p=[0.80, 0.17, 0.03])
        _arm(client, experiment, parent.run_id, number, str(status), chosen, weights, hardness, draw)
    parent.end("FINISHED")
    return experiment


def _hash(number: int) -> str:
    return f"{number * 2654435761 % 2**32:08x}".ljust(64, "0")


def _arm(client, experiment, parent, number, status, chosen, weights, hardness, draw) -> None:
    r, rate, dropout, factor = int(chosen["r"]), float(chosen["rate"]), float(chosen["dropout"]), int(chosen["factor"])
    truth = 1.2 + 0.5 * 2.0 ** -math.log2(min(r, 16)) + 0.06 * abs(math.log2(rate / 2e-3)) + 0.3 * dropout
    truth += draw.normal(0.0, 0.015)
    reason = {"KILLED": PRUNED, "FAILED": FAILED}.get(status)
    name = f"r={r} rate={rate:g}"
    tags = {KIND: "train", PARENT: parent, SPEC_HASH: _hash(number), "mlflow.note.content": "note " * 60,
            "mlflow.user": "somebody", "mlflow.source.name": "rankwise", "rankwise.attempt": "1"}  # fmt: skip
    if status == "FINISHED":
        tags["rankwise.model_uri"] = f"models:/pricer/{number + 1}"
    if reason:
        tags[REASON] = reason
    run = client.create_run(experiment, run_name=name, tags=tags).info
    params = {
        "lora.r": r, "lora.alpha": factor * r, "lora.dropout": dropout, "lora.rslora": False, "seed": 0,
        "lora.target_modules": "k_proj,o_proj,q_proj,v_proj", "training.learning_rate": rate,
        "training.max_steps": STEPS, "base_model": "pypi:some-base==1#model.gguf",
        **{f"training.other_{n}": n for n in range(12)}, **{f"quantization.bnb_{n}": "nf4" for n in range(6)},
    }  # fmt: skip
    steps = STEPS if status == "FINISHED" else 16
    now = int(time.time() * 1000)
    curve = [
        Metric("train.loss", truth + 2 * math.exp(-step / 8) + draw.normal(0, 0.08), now + step, step)
        for step in range(1, steps + 1)
    ]
    curve += [Metric("eval.loss", truth + 2 * math.exp(-step / 8), now + step, step) for step in range(8, steps, 8)]
    curve += [
        Metric(f"system/metric_{n}", draw.random() * 100, now + step, step) for n in range(15) for step in range(3)
    ]
    client.log_batch(run.run_id, curve, [Param(key, str(value)) for key, value in params.items()], [])
    if status == "FINISHED":
        _results(client, run, truth, r, steps, weights, hardness, draw)
    client.set_terminated(run.run_id, status)


def _results(client, run, truth, r, steps, weights, hardness, draw) -> None:
    losses = truth + hardness + draw.normal(0, 0.15, EXAMPLES)
    right = (losses < 1.2).astype(float)
    metrics = {"eval.loss": _mean(losses, weights), "eval.exact_match": _mean(right, np.ones(EXAMPLES))}
    costs = {
        "adapter.parameters": 57_600 * r, "adapter.bytes": 230_400 * r, "train.seconds": 60 + r + 5 * draw.random(),
        "train.peak_memory_bytes": 2.5e9 + 2e6 * r,
    }  # fmt: skip
    _log(client, run.run_id, to_tracking(metrics) | costs, steps)
    folder = Path(urlparse(run.artifact_uri).path)
    folder.mkdir(parents=True, exist_ok=True)
    columns = ["id", "prompt", "reference", "prediction", "finish_reason", "supervised_tokens", *metrics]
    rows = [
        [f"example-{n}", "carat 0.23, Ideal, E, SI2", "$00326", "$00331", "stop", int(weights[n]), losses[n], right[n]]
        for n in range(EXAMPLES)
    ]
    (folder / "predictions.json").write_text(json.dumps({"columns": columns, "data": rows}))
    targets = [
        {
            "module": f"model.layers.{layer}.self_attn.{kind}_proj", "lora_A": [r, 576], "lora_B": [576, r],
            "delta_norm": 1.0, "flags": [], "rank_99": max(1, round(min(r, 6 + layer * 0.8))),
            "effective_rank": min(r, 5 + layer * 0.7) * (0.8 + 0.1 * draw.random()),
        }
        for layer in range(LAYERS) for kind in "qkvo"
    ]  # fmt: skip
    (folder / "anatomy.json").write_text(json.dumps({"adapter": {"targets": targets}}))


def _mean(values, weights):
    return weighted_mean([Sample(total=float(v * w), weight=float(w)) for v, w in zip(values, weights, strict=True)])


def _log(client, run_id, values, step) -> None:
    now = int(time.time() * 1000)
    client.log_batch(run_id, [Metric(key, float(value), now, step) for key, value in values.items()], [], [])

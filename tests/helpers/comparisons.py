"""Made-up arms for tests of tables and plots."""

from __future__ import annotations

from rankwise.evaluation.compare import ArmRecord, Comparison, compare
from rankwise.evaluation.metrics import MetricValue


def values(**numbers: tuple[float | None, float | None]) -> dict[str, MetricValue]:
    return {f"eval.{key}": MetricValue(value=value, stderr=stderr, n=200) for key, (value, stderr) in numbers.items()}


def arm(r: int, loss: float | None, *, seed: int = 0, status: str = "FINISHED", reason=None, stderr=0.02, **params):
    name = f"{r:03d}{seed:03d}" + "".join(f"{value}" for value in params.values())
    return ArmRecord(
        spec_hash=name.encode().hex().ljust(64, "0"),
        run_id=f"run{name}",
        status=status,
        reason=reason,
        params={"lora.r": r, "lora.alpha": 2 * r, "seed": seed, **{k.replace("__", "."): v for k, v in params.items()}},
        model_uri=f"models:/pricer/{r}" if status == "FINISHED" else None,
        adapter_parameters=57600 * r,
        adapter_bytes=57600 * r * 4,
        metrics={}
        if loss is None
        else values(
            loss=(loss, stderr),
            perplexity=(2.718**loss, stderr),
            token_accuracy=(0.9 - loss / 5, 0.01),
            exact_match=(0.02, 0.01),
            mean_absolute_error=(1000 + 1000 * loss, 150.0),
            mean_relative_error=(0.5, 0.04),
            within_20_percent=(0.17, 0.026),
            parse_failures=(0.0, 0.0),
        ),
        seconds=75.2 + r,
        peak_memory_bytes=1_234_567_890,
    )


BASE = values(
    loss=(3.1, 0.05),
    perplexity=(22.2, 1.1),
    token_accuracy=(0.31, 0.01),
    exact_match=(0.0, 0.0),
    mean_absolute_error=(3856.0, 310.0),
    mean_relative_error=(0.97, 0.01),
    within_20_percent=(0.0, 0.0),
    parse_failures=(0.63, 0.034),
)


def ranks(**changes) -> Comparison:
    arms = [
        arm(16, None, status="FAILED", reason="CUDA out of memory"),
        arm(8, 0.71),
        arm(2, 0.93),
        arm(4, 0.78),
    ]
    given = {"primary_metric": "eval.loss", "greater_is_better": False, "base": BASE, **changes}
    return compare("diamonds-rank", given.pop("arms", arms), **given)


def seeds_and_rates() -> Comparison:
    arms = [
        arm(r, 1.2 - 0.1 * r**0.5 + 0.03 * seed - 40 * rate, seed=seed, training__learning_rate=rate)
        for r in (2, 4, 8, 16)
        for seed in (0, 1, 2)
        for rate in (1e-3, 2e-3)
    ]
    return compare("rates <b>&", arms, primary_metric="eval.loss", greater_is_better=False, base=BASE)

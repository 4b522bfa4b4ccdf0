"""The command: `make bench`, or `python -m benchmarks --help` with `tests` on the path."""

from __future__ import annotations

import sys
import time
import warnings
from pathlib import Path

import click

from rankwise.settings import Settings, set_process_defaults

# Before torch is imported: OpenMP reads its variable once. Commands that are measured inherit all of it.
set_process_defaults()

PART_NAMES = ("throughput", "sweep", "tracking", "halving")


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option("--parts", default=",".join(PART_NAMES), help="Parts to measure, separated by commas.")
@click.option("--subject", type=click.Choice(["smollm2", "tiny", "8b"]), default="smollm2", help="Base and rows.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", help="Where.")
@click.option(
    "--micro-batch", "micro_batches", type=int, multiple=True, default=(1, 4), help="Rows of a step of an arm."
)
@click.option("--packs", default="1,2,4,8,16", help="Sizes of packs, separated by commas.")
@click.option("--rounds", default=3, help="Times that the ways alternate.")
@click.option("--steps", default=3, help="Steps of a block; the first is not counted.")
@click.option("--sampled-arms", default=2, help="Arms that P1 trains; the rest is extrapolated, and said so.")
@click.option("--full", is_flag=True, help="All arms of P1, P2 and the plain loop (an hour and a half on 2 cores).")
@click.option("--no-trl", is_flag=True, help="Leave P1 and P2 out: the extra `bench` is not installed.")
@click.option("--minutes", type=float, default=None, help="Begin nothing that would end later.")
@click.option("--threads", type=int, default=None, help="Threads of torch.")
@click.option("--resume", is_flag=True, help="Keep what was measured to its end with the same options.")
@click.option("--halving-steps", default=80, help="Steps of an arm of the sweep with early stopping over the subject.")
@click.option("--halving-seeds", default="0-9", help="Seeds of the sweeps with early stopping over a small base.")
@click.option("--quick", is_flag=True, help="A tiny base, in seconds: whether the benchmark works.")
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path("mlruns/benchmark"), help="Where numbers and report go."
)
def main(
    parts: str,
    subject: str,
    device: str,
    micro_batches: tuple[int, ...],
    packs: str,
    rounds: int,
    steps: int,
    sampled_arms: int,
    full: bool,
    no_trl: bool,
    minutes: float | None,
    threads: int | None,
    resume: bool,
    halving_steps: int,
    halving_seeds: str,
    quick: bool,
    out: Path,
) -> None:
    """Measure the packed engine against a plain peft loop and TRL's SFTTrainer.

    Writes report.md, plot.png and one JSON file a part into --out after each part. Ends with exit code 1 when two ways
    did not compute the same losses, or when a part was not measured.
    """
    chosen = [part.strip() for part in parts.split(",") if part.strip()]
    if unknown := sorted(set(chosen) - set(PART_NAMES)):
        raise click.UsageError(f"--parts: there is no {', '.join(unknown)}; there are {', '.join(PART_NAMES)}")
    if quick:
        subject, rounds, packs, halving_seeds = "tiny", 1, "1,2,4,8", "0-1"
    began = time.monotonic()

    def say(text: str) -> None:
        minute, second = divmod(int(time.monotonic() - began), 60)
        click.echo(f"[{minute:3d}m{second:02d}s] {text}", err=True)

    say("starting ...")
    from benchmarks.bench import Options
    from benchmarks.run import run
    from benchmarks.trl_arms import has_trl

    if not no_trl and not has_trl():
        raise click.UsageError("TRL is not installed: pip install -e '.[bench]' (make bench does), or give --no-trl")
    # Deprecations inside of TRL and peft, again and again.
    warnings.simplefilter("ignore", FutureWarning)
    options = Options(
        subject=subject,
        device=device,
        micro_batches=micro_batches,
        packs=tuple(int(size) for size in packs.split(",")),
        rounds=rounds,
        steps=steps,
        sweep_steps=4 if quick else 16,
        halving_steps=16 if quick else halving_steps,
        small_steps=16 if quick else 128,
        halving_seeds=_seeds(halving_seeds),
        pretraining_steps=30 if quick else 600,
        sampled_arms=sampled_arms,
        trl=not no_trl,
        full=full,
        minutes=minutes,
        threads=threads,
    )
    problems = run(options, chosen, out.absolute(), Settings.load(), say, resume=resume)
    if (out / "report.md").is_file():
        click.echo((out / "report.md").read_text(encoding="utf-8"))
    say(f"written: {out}/report.md, plot.png, parts/")
    for problem in problems:
        say(f"PROBLEM: {problem}")
    sys.exit(1 if problems else 0)


def _seeds(text: str) -> tuple[int, ...]:
    """`0-9`, `3` or nothing."""
    first, _, last = text.strip().partition("-")
    try:
        return tuple(range(int(first), int(last or first) + 1)) if first else ()
    except ValueError as error:
        raise click.UsageError(f"--halving-seeds: must be like 0-9, got {text!r}") from error


if __name__ == "__main__":
    main()

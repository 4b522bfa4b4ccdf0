"""`rankwise validate`, `plan`, `schema` and `submit`: check a definition, show its arms, queue its jobs."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click
from rich.console import Console
from rich.table import Table

from rankwise.cli.output import Bars, note, print_foreign_json, print_json, print_table
from rankwise.exceptions import ConfigError
from rankwise.experiment.editor_schema import editor_schema, reference
from rankwise.experiment.experiment import load_experiment
from rankwise.experiment.plan import Plan, PlannedSeeds, count_rows, make_plan
from rankwise.experiment.rules import rung_advice
from rankwise.experiment.schema import ExperimentSpec
from rankwise.experiment.source import LocalSource, parse_source
from rankwise.files import format_size
from rankwise.jobs.job import MAX_ARMS
from rankwise.settings import Settings

Command = TypeVar("Command", bound=Callable[..., Any])


def definition(command: Command) -> Command:
    """Add the argument FILE and the option --set to a command."""
    option = click.option(
        "--set",
        "overrides",
        multiple=True,
        metavar="KEY=VALUE",
        help="Override a key, such as training.max_steps=5; may be given several times.",
    )
    return click.argument("file", type=click.Path(path_type=Path))(option(command))


def command_line(file: Path | None, overrides: Sequence[str], source: str | None = None) -> str:
    """The equivalent `rankwise run` command, for runs and reports."""
    named = str(file) if file is not None else f"--from={source}"
    return shlex.join(["rankwise", "run", named, *(f"--set={override}" for override in overrides)])


@click.command()
@definition
def validate(file: Path, overrides: tuple[str, ...]) -> None:
    """Check the experiment FILE and summarize it; all problems are reported at once.

    Local data are opened, and their first 100 rows are read. Bases, hub data sets and wheels are not.
    """
    experiment = load_experiment(file, overrides)
    # Late: other commands of this module do not read data.
    from rankwise.data.local_check import check_local_data

    problems = check_local_data(experiment.spec, Settings.load())
    if problems:
        raise ConfigError("\n".join(problems), problems)
    spec, arms = experiment.spec, experiment.arms
    count = sum(experiment.planned_rounds) or len(arms)
    parts = len(experiment.planned_rounds)
    rounds = f" in {parts} {'round' if parts == 1 else 'rounds'} ({spec.sweep.method})" if experiment.is_search else ""
    if stages := make_plan(experiment).stages:
        first, *later = [stage.arms for stage in stages]
        count, rounds = first, f", and up to {sum(later)} with more seeds" if later else ""
    click.echo(f"{file}: valid: {spec.name}, {count} {'arm' if count == 1 else 'arms'}{rounds}")
    for advice in rung_advice(spec.sweep.early_stopping, arms):
        note(advice)


@click.command()
@definition
@click.option(
    "--estimates/--no-estimates", default=True, help="Estimate sizes from the base's configuration (takes seconds)."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def plan(file: Path, overrides: tuple[str, ...], estimates: bool, as_json: bool) -> None:
    """Show the arms of the experiment FILE, their hashes, and their estimated cost."""
    experiment = load_experiment(file, overrides)
    spec = experiment.spec
    made = make_plan(experiment, count_rows(train) if isinstance(train := spec.dataset.train, str) else None)
    if estimates:
        config = base_config(spec)
        if config is None:
            note(f"No estimates: the configuration of {spec.base_model} is not on this machine; set base_model_config.")
        else:
            made, warning = _with_estimates(made, config)
            if warning:
                note(f"Warning: {warning}.")
    if as_json:
        print_json(made.to_json())
        return
    print_table(_table(made))
    if made.provisional:
        note("Hashes are provisional: the base or the data is not pinned yet; the first run resolves and records it.")
    for advice in rung_advice(spec.sweep.early_stopping, [planned.arm for planned in made.arms]):
        note(advice)


@click.command()
@click.option("--markdown", is_flag=True, help="Print a reference in Markdown instead.")
def schema(markdown: bool) -> None:
    """Print the JSON Schema of experiment files, for editors."""
    if markdown:
        click.echo(reference(), nl=False)
    else:
        print_foreign_json(editor_schema())


def base_config(spec: ExperimentSpec) -> Path | None:
    """The local config.json of a definition's base, if any; nothing is downloaded."""
    if spec.base_model_config is not None:
        return Path(spec.base_model_config)
    source = parse_source(spec.base_model)
    if isinstance(source, LocalSource):
        config = Path(os.path.expanduser(source.path)) / "config.json"
        return config if config.is_file() else None
    return None


def _with_estimates(made: Plan, config: Path) -> tuple[Plan, str | None]:
    """The plan with estimates, and a warning if a base in 4 bit is not really."""
    # Late: torch takes seconds to import.
    from rankwise.modeling.estimate import Estimator

    estimator = Estimator(config, towers=any(planned.arm.towers for planned in made.arms))
    for attention in {planned.arm.attn_implementation for planned in made.arms}:
        estimator.check_attention(attention)
    for arm in [planned.arm for planned in made.arms]:
        estimator.check_quantization(arm.quantization, arm.base_model)
    estimates = {
        planned.arm.spec_hash: estimator.arm(planned.arm.lora, planned.arm.quantization).to_dict()
        for planned in made.arms
    }
    in_4_bit = any(planned.arm.quantization.bits == 4 for planned in made.arms)
    return made.with_estimates(estimates), estimator.share.warning if in_4_bit else None


def _table(made: Plan) -> Table:
    title = f"{made.experiment}: {made.trials} {'arm' if made.trials == 1 else 'arms'}"
    table = Table(title=title, caption="\n".join(_captions(made)) or None)
    table.add_column("spec hash", no_wrap=True)
    table.add_column("arm")
    columns = ["steps", "tokens (at most)", "parameters", "adapter, fp32", "memory before\nactivations"]
    for name in columns:
        table.add_column(name, justify="right")
    for planned in made.arms:
        table.add_row(
            planned.arm.short, planned.label or "-", *_cells(planned.steps, planned.tokens, planned.estimates)
        )
    return table


def _captions(made: Plan) -> Iterator[str]:
    """The share in 4 bit, what is not known yet, and the expected effect of early stopping."""
    shares = sorted({planned.estimates["base_share_4bit"] for planned in made.arms if planned.estimates})
    if shares and shares[-1]:
        yield f"In 4 bit: {' to '.join(f'{share:.1%}' for share in shares)} of the weights besides embeddings and head."
    if (proposed := made.trials - len(made.arms)) > 0:
        yield f"The other {proposed:,} arms will be proposed from results ({made.method}, {len(made.rounds)} rounds)."
    yield from map(_stage, made.stages)
    stopping = made.stopping
    if stopping is None:
        return
    if stopping.budget is None:
        yield f"Successive halving by {stopping.metric}; its steps are known once the rows are counted."
        return
    rungs = ", ".join(
        f"{rung.kept:,} of {rung.arms:,} continue at step {rung.step:,}" for rung in stopping.budget.rungs
    )
    steps = f"{stopping.budget.expected:,} steps expected, {stopping.budget.upper:,} without it"
    yield f"Successive halving by {stopping.metric}: {rungs}; {steps}."


_STAGES = {
    "pilot": "Pilot seeds, which choose tuned values",
    "first": "First look at the ranks",
    "most": "If that leaves a rank undecided",
}


def _stage(stage: PlannedSeeds) -> str:
    seeds = f"seed {stage.seeds[0]}" if len(stage.seeds) == 1 else f"seeds {stage.seeds[0]} to {stage.seeds[-1]}"
    steps = "" if stage.steps is None else f", {stage.steps:,} steps, of which up to {MAX_ARMS} arms share one"
    return f"{_STAGES[stage.name]}: {seeds}, {stage.arms:,} arms{steps}."


def _cells(steps: int | None, tokens: int | None, estimates: Any) -> Iterator[str]:
    yield "?" if steps is None else f"{steps:,}"
    yield "?" if tokens is None else f"{tokens:,}"
    yield f"{estimates['adapter_parameters']:,}" if estimates else "?"
    yield format_size(estimates["adapter_bytes_fp32"]) if estimates else "?"
    yield format_size(estimates["memory_bytes"]) if estimates else "?"


@click.command()
@definition
@click.option(
    "--priority", type=int, default=0, show_default=True, help="Jobs with a higher priority are claimed first."
)
@click.option(
    "--after", multiple=True, type=int, metavar="JOB", help="Start only after this job has succeeded; repeatable."
)
@click.option("--preflight/--no-preflight", default=True, help="Check the rows before queueing.")
@click.option(
    "--no-more-seeds", is_flag=True, help="Train no more seeds after the first look, even if a rank is undecided."
)
@click.option("--json", "as_json", is_flag=True, help="Print the jobs as JSON.")
def submit(
    file: Path,
    overrides: tuple[str, ...],
    priority: int,
    after: tuple[int, ...],
    preflight: bool,
    no_more_seeds: bool,
    as_json: bool,
) -> None:
    """Queue all jobs of the experiment FILE that have not been done yet.

    Submitting again adds nothing. `rankwise worker` does the jobs, `rankwise status` shows their progress.
    """
    settings = Settings.load()
    # Report errors in the file before slow imports.
    experiment = load_experiment(file, overrides)
    experiment.require_known_arms()
    console = Console(stderr=True, highlight=False)
    with Bars(console) as bars:
        from rankwise.tasks.arm_rows import RowsCache
        from rankwise.tasks.context import open_context
        from rankwise.tasks.submit import prepare
        from rankwise.tasks.submit import submit as submit_prepared

        with open_context(settings, bars) as context:
            prepared = prepare(
                context, experiment, RowsCache(settings, bars), preflight=preflight, more_seeds=not no_more_seeds
            )
            # Also if all jobs are done: completes an interrupted submission.
            command = command_line(file, overrides)
            submitted = submit_prepared(context, prepared, command=command, priority=priority, after=after)
        pending = sum(not job.ended for job in submitted.jobs)
        bars.say(
            f"{len(submitted.jobs)} jobs, {pending} pending; rankwise worker does them, rankwise status shows progress"
        )
    if as_json:
        print_json({"jobs": [job.to_json() for job in submitted.jobs]})
        return
    table = Table(box=None, pad_edge=False)
    for column in ("id", "kind", "arm", "state"):
        table.add_column(column)
    for job in submitted.jobs:
        table.add_row(str(job.id), str(job.kind), str(job.spec.get("run_name", job.spec_hash[:12])), str(job.state))
    print_table(table)

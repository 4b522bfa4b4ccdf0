"""`rankwise evaluate`, `promote` and `rollback`: compare stored adapters, and move aliases by the result."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.table import Table
from rich.text import Text

from rankwise.cli.output import note, print_json, print_table
from rankwise.settings import Settings

if TYPE_CHECKING:
    from rankwise.experiment.schema import QuantizationSpec
    from rankwise.tasks.evaluate import Assessment


@click.command()
@click.argument("uris", nargs=-1, required=True, metavar="URI...")
@click.option("--data", metavar="SOURCE", help="Rows to evaluate. Default: the definition's evaluation rows.")
@click.option("--split", help="Split of a hub data set given by --data. Default: test.")
@click.option("--metrics", metavar="NAMES", help="Separated by commas. Default: those of the definition.")
@click.option("--limit", type=click.IntRange(min=1), help="Maximum number of rows.")
@click.option(
    "--experiment",
    "file",
    type=click.Path(path_type=Path),
    help="Definition with the base and the row format. Default: the one recorded with the first URI.",
)
@click.option(
    "--quantization",
    "quantizations",
    metavar="NAMES",
    help="Compare results across quantizations of the base: nf4, fp4, int8, none, separated by commas.",
)
@click.option("--no-tracking", is_flag=True, help="Do not log to MLflow.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def evaluate(
    uris: tuple[str, ...],
    data: str | None,
    split: str | None,
    metrics: str | None,
    limit: int | None,
    file: Path | None,
    quantizations: str | None,
    no_tracking: bool,
    as_json: bool,
) -> None:
    """Evaluate stored adapters and the bare base on the same rows; adapters over one base share batches.

    A URI is models:/NAME@ALIAS, models:/NAME/VERSION, models:/m-..., a directory of rankwise.flavor.save_model, or a
    PEFT directory; `base` is the bare base, which is always evaluated. If no URI is a registered model, --experiment
    must define the base and the row format. Results go to MLflow, linked to the model and the rows.
    """
    if split is not None and data is None:
        raise click.UsageError("--split needs --data: it is a split of that data set")
    from rich.console import Console

    from rankwise.cli.output import Bars

    with Bars(Console(stderr=True, highlight=False)) as bars:
        bars.say("starting ...")
        from rankwise.evaluation.evaluate import quantization_of
        from rankwise.tasks.context import open_context
        from rankwise.tasks.evaluate import Evaluator, publish_assessment
        from rankwise.tasks.evaluation_setup import recorded_setup, without_aliases

        loadings: dict[str, QuantizationSpec | None] = {name: quantization_of(name) for name in _names(quantizations)}
        with open_context(Settings.load(), bars) as context:
            versions = without_aliases(context, uris)
            for uri, version in versions.items():
                if uri != version:
                    bars.say(f"{uri} is {version}")
            names = list(versions.values())
            # The first URI with a recorded definition.
            source = next((uri for uri in names if uri.startswith(("models:", "runs:"))), names[0])
            setting = recorded_setup(context, source, file).changed(
                data=data, split=split, metrics=_names(metrics), limit=limit
            )
            evaluator = Evaluator(context)
            assessments: dict[str, Assessment] = {}
            runs: dict[str, dict[str, str]] = {}
            for name, quantization in (loadings or {"": None}).items():
                assessments[name] = evaluator.assess(setting, names, quantization=quantization)
                if not no_tracking:
                    runs[name] = publish_assessment(context, assessments[name], note=f" ({name})" if name else "")
    document = _document(assessments, runs)
    if as_json:
        print_json(document)
    else:
        print_table(_table(document))
        for line in document["meter"]:
            note(line["text"])
        fingerprints = {row["base"]["fingerprint"]: row["base"]["source"] for row in document["models"]}
        if len(fingerprints) > 1:
            note("Each model was evaluated over its own base:")
            for fingerprint, source in fingerprints.items():
                models = [row["model"] for row in document["models"] if row["base"]["fingerprint"] == fingerprint]
                note(f"  {source} ({fingerprint}): {', '.join(models)}")


def _names(text: str | None) -> list[str]:
    return [name.strip() for name in (text or "").split(",") if name.strip()]


def _document(assessments: dict[str, Assessment], runs: dict[str, dict[str, str]]) -> dict[str, Any]:
    from rankwise.evaluation.evaluate import compare_quantizations

    rows = []
    for quantization, assessment in assessments.items():
        for name, model in assessment.models.items():
            records = [{"source": record.source, "digest": record.digest} for record in model.rows.evaluation_inputs]
            rows.append(
                {
                    "model": model.uri or name,
                    "quantization": quantization or None,
                    "run_id": runs.get(quantization, {}).get(name),
                    "data": records[0] if len(records) == 1 else records,
                    "base": asdict(model.base),
                    "metrics": {key: value.to_json() for key, value in model.evaluation.metrics.items()},
                }
            )
    names = list(next(iter(assessments.values())).setting.arm.evaluation.metrics)
    results = {quantization: assessment.results for quantization, assessment in assessments.items()}
    return {"models": rows, "meter": compare_quantizations(results, names) if len(assessments) > 1 else []}


def _table(document: dict[str, Any]) -> Table:
    from rankwise.evaluation.compare import title, with_error

    rows = document["models"]
    keys = list(rows[0]["metrics"])
    metered = rows[0]["quantization"] is not None
    shown = Table("model", *(["quantization"] if metered else []), *(title(key) for key in keys), "examples", box=None)
    for row in rows:
        cells = [with_error(key, row["metrics"][key]["value"], row["metrics"][key]["stderr"]) for key in keys]
        most = max(row["metrics"][key]["n"] for key in keys)
        shown.add_row(row["model"], *([row["quantization"]] if metered else []), *cells, str(most))
    return shown


ALIAS = "champion"


@click.command()
@click.argument("name")
@click.option(
    "--candidate",
    type=click.IntRange(min=1),
    required=True,
    metavar="VERSION",
    help="Version that should get the alias.",
)
@click.option("--alias", default=ALIAS, show_default=True, help="Alias to move.")
@click.option("--data", metavar="SOURCE", help="Rows to compare on. Default: the definition's evaluation rows.")
@click.option("--limit", type=click.IntRange(min=1), help="Maximum number of rows to compare on.")
@click.option(
    "--experiment",
    "file",
    type=click.Path(path_type=Path),
    help="Definition with the rows and `promotion:` to apply. Default: the recorded one.",
)
@click.option("--force", is_flag=True, help="Move the alias even if the gate refuses; needs --reason.")
@click.option("--reason", help="Reason to record.")
@click.option("--json", "as_json", is_flag=True, help="Print the decision as JSON.")
def promote(
    name: str,
    candidate: int,
    alias: str,
    data: str | None,
    limit: int | None,
    file: Path | None,
    force: bool,
    reason: str | None,
    as_json: bool,
) -> int:
    """Give a version of the registered model NAME the alias, if it is better beyond noise.

    The version is compared, example by example on the same rows, with the version that has the alias and with the bare
    base. `promotion:` in the definition sets how much better it must be and what must not get worse. Rows that it was
    trained on are excluded. Exits with 1 if the gate refuses.
    """
    if force != (reason is not None):
        raise click.UsageError("--force and --reason go together")
    from rich.console import Console

    from rankwise.cli.output import Bars

    with Bars(Console(stderr=True, highlight=False)) as bars:
        bars.say("starting ...")
        from rankwise.tasks.context import open_context
        from rankwise.tasks.evaluation_setup import recorded_setup
        from rankwise.tasks.promote import promote as through_the_gate

        with open_context(Settings.load(), bars) as context:
            version = context.store.registry.resolve(f"models:/{name}/{candidate}").version
            assert version is not None, "a URI with a version names one"
            setting = recorded_setup(context, version.uri, file)
            done = through_the_gate(
                context, setting, version, alias=alias, data=data, limit=limit, force=reason if force else None
            )
    if as_json:
        print_json(done.to_json())
    elif done.decision is not None:
        shown = Table("", "condition", box=None)
        for check in done.decision.checks:
            shown.add_row(Text("holds", "green") if check.ok else Text("fails", "red"), Text(check.text))
        print_table(shown)
    if done.decision is None:
        note(f"models:/{name}@{alias} is already {version.uri}")
        return 0
    if done.stored:
        note("this is the stored verdict of an earlier, equal comparison; nothing was computed or spent")
    holder = "unset" if done.champion is None else f"version {done.champion.version}"
    if done.moved:
        how = "by force" if done.forced else "through the gate"
        note(f"models:/{name}@{alias} is now version {candidate} ({how}; it was {holder}); evidence: run {done.run_id}")
        return 0
    note(f"refused: models:/{name}@{alias} stays {holder}; evidence: run {done.run_id}")
    return 1


@click.command()
@click.argument("name")
@click.option("--alias", default=ALIAS, show_default=True, help="Alias to move.")
@click.option("--reason", default="rolled back", show_default=True, help="Reason to record.")
@click.option("--json", "as_json", is_flag=True, help="Print the move as JSON.")
def rollback(name: str, alias: str, reason: str, as_json: bool) -> None:
    """Undo the last move of an alias of the registered model NAME; repeat to undo earlier moves."""
    from rich.console import Console

    from rankwise.cli.output import Bars

    with Bars(Console(stderr=True, highlight=False)) as bars:
        from rankwise.tasks.context import open_context
        from rankwise.tasks.promote import rollback as undo

        with open_context(Settings.load(), bars) as context:
            before, after = undo(context, name, alias, reason=reason)
    if as_json:
        print_json({"name": name, "alias": alias, "from": before, "to": after})
    note(f"models:/{name}@{alias} is {'unset' if after is None else f'version {after}'} again; it was version {before}")

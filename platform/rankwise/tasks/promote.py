"""Move an alias: only through the gate, or by force with a reason; and back again.

The evidence is a run of its own that the version links to. The alias is moved while its row in the queue's database is
locked, after a look whether somebody else has moved it since the comparison began.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rankwise.evaluation.evaluator import Evaluation
from rankwise.evaluation.gate import Decision, decide
from rankwise.evaluation.observation import Observation
from rankwise.evaluation.predictions import prediction_rows
from rankwise.evaluation.summary import to_tracking
from rankwise.exceptions import ConfigError, GateError
from rankwise.jobs.aliases import AliasMove
from rankwise.tasks.assess import Assessed, Assessment, Assessor
from rankwise.tasks.contenders import contenders
from rankwise.tasks.context import Context
from rankwise.tasks.seen import seen_by
from rankwise.tasks.setting import Setting
from rankwise.tracking.descriptions import table
from rankwise.tracking.provenance import collect, user_name
from rankwise.tracking.registry import ModelVersion

EVIDENCE = "rankwise.promotion_run"


@dataclass(frozen=True, kw_only=True)
class Promotion:
    """How a promotion ended.

    Attributes:
        candidate: The version that wants the alias.
        champion: The version that had it; None for nobody.
        alias: Which.
        decision: What the gate said; None where nothing had to be decided.
        moved: Whether the alias points to the candidate now.
        forced: Whether it was moved although the gate refused.
        run_id: The run with the evidence.
    """

    candidate: ModelVersion
    champion: ModelVersion | None
    alias: str
    decision: Decision | None
    moved: bool
    forced: bool
    run_id: str | None

    def to_json(self) -> dict[str, Any]:
        """As `promote --json` prints it."""
        return {
            "candidate": self.candidate.uri,
            "champion": None if self.champion is None else self.champion.uri,
            "alias": self.alias,
            "moved": self.moved,
            "forced": self.forced,
            "run_id": self.run_id,
            **({} if self.decision is None else self.decision.to_json()),
        }


def promote(
    context: Context,
    setting: Setting,
    candidate: ModelVersion,
    *,
    alias: str,
    data: str | None = None,
    limit: int | None = None,
    force: str | None = None,
) -> Promotion:
    """Compare a version with the holder of an alias and with the bare base, and give it the alias if it passes.

    Args:
        context: The stores.
        setting: The candidate's own rows, metrics and limits.
        candidate: The version.
        alias: Which alias.
        data: Rows to compare on, in place of the definition's evaluation rows.
        limit: Compare on no more rows than this.
        force: Why it is to be moved whatever the gate says.

    Raises:
        ConfigError: There is nothing to compare on, or the limits name metrics that are not computed.
        GateError: Somebody else has moved the alias in the meantime; or it is not known which rows the candidate was
            trained on, and `force` is not given.
        AssetError: A base or the rows cannot be had.
        JobStoreError: The queue's database cannot be reached.
    """
    registry = context.store.registry
    champion = registry.get_alias(candidate.name, alias)
    if champion is not None and champion.version == candidate.version:
        return Promotion(
            candidate=candidate, champion=champion, alias=alias, decision=None, moved=False, forced=False, run_id=None
        )
    # Who may not move the alias learns it before the comparison.
    registry.put_forward(candidate, alias)
    assessor = Assessor(context)
    on = setting.changed(data=data, limit=limit)
    seen = None
    try:
        seen = seen_by(context, candidate, setting, assessor)
    except GateError as error:
        if force is None:
            raise
        context.voice.warn(str(error))
    compared = [candidate.uri, *([champion.uri] if champion is not None else [])]
    assessment = assessor.assess(on, compared, leave_out=seen)
    overlapping = None if seen is None else assessment.left_out
    # Rows of one's own took no part in the choice of the candidate.
    chosen_on = (setting.arm.dataset.eval, setting.arm.dataset.eval_split)
    among = contenders(context.store, candidate) if (on.arm.dataset.eval, on.arm.dataset.eval_split) == chosen_on else 1
    decision = _decide(assessment, candidate, champion, overlapping, among)
    moving = decision.passed or force is not None
    run_id = _write_evidence(context, assessment, candidate, champion, alias, decision, force)
    registry.tag_version(candidate.name, candidate.version, {EVIDENCE: run_id})
    if moving:
        reason = force if not decision.passed and force is not None else "passed the gate"
        _move(context, candidate, champion, alias, run_id, reason)
    return Promotion(
        candidate=candidate,
        champion=champion,
        alias=alias,
        decision=decision,
        moved=moving,
        forced=moving and not decision.passed,
        run_id=run_id,
    )


def rollback(context: Context, name: str, alias: str, *, reason: str) -> tuple[int, int | None]:
    """Undo the last move of an alias that was made here and still stands; the next call undoes the one before it.

    Returns:
        The version that had it, and the one that has it now.

    Raises:
        ConfigError: No move is left, or somebody else has moved the alias since.
        JobStoreError: The queue's database cannot be reached.
    """
    registry = context.store.registry
    with context.queue.aliases.moving(name, alias) as moving:
        moves = moving.history()
        if not moves:
            raise ConfigError(f"no move of models:/{name}@{alias} is known here; `rankwise promote` writes them down")
        standing = _standing(moves)
        if not standing:
            raise ConfigError(f"every move of models:/{name}@{alias} that is known here has been undone")
        last = standing[-1]
        holder = registry.get_alias(name, alias)
        if (holder.version if holder else None) != last.to_version or last.to_version is None:
            raise ConfigError(
                f"models:/{name}@{alias} is version {holder.version if holder else 'none'} and not {last.to_version}, "
                "to which it was moved last: somebody has moved it by other means; set it by hand"
            )
        if last.from_version is None:
            registry.delete_alias(name, alias)
        else:
            registry.set_alias(name, alias, last.from_version)
        moving.note(last.to_version, last.from_version, run_id=None, reason=reason, moved_by=_who())
    return last.to_version, last.from_version


def _standing(moves: Sequence[AliasMove]) -> list[AliasMove]:
    """The moves that have not been undone. A roll back is written down as a move without evidence."""
    standing: list[AliasMove] = []
    for move in moves:
        undone = standing[-1] if standing and move.run_id is None else None
        if undone is not None and (undone.from_version, undone.to_version) == (move.to_version, move.from_version):
            standing.pop()
        else:
            standing.append(move)
    return standing


def _decide(
    assessment: Assessment,
    candidate: ModelVersion,
    champion: ModelVersion | None,
    overlapping: int | None,
    among: int,
) -> Decision:
    spec, evaluation = assessment.setting.spec, assessment.setting.arm.evaluation
    mine = assessment.models[candidate.uri]
    theirs = None if champion is None else assessment.models[champion.uri]
    # A row may be too long for the tokenizer of one base only.
    paired = {each.id for each in mine.evaluation.observations}
    if theirs is not None:
        paired &= {each.id for each in theirs.evaluation.observations}

    def observations(result: Evaluation) -> list[Observation]:
        return [each for each in result.observations if each.id in paired]

    return decide(
        observations(mine.evaluation),
        None if theirs is None else observations(theirs.evaluation),
        observations(assessment.results[mine.bare]),
        spec.promotion,
        metrics=evaluation.metrics,
        primary_metric=evaluation.primary_metric,
        overlapping=overlapping,
        same_tokens=theirs is None or _form(theirs) == _form(mine),
        contenders=among,
    )


def _form(model: Assessed) -> tuple[str, str]:
    """What decides the tokens of a row: the tokenizer and the chat template."""
    return model.base.tokenizer, model.rows.renderer.template


def _write_evidence(
    context: Context,
    assessment: Assessment,
    candidate: ModelVersion,
    champion: ModelVersion | None,
    alias: str,
    decision: Decision,
    force: str | None,
) -> str:
    spec = assessment.setting.spec
    verdict = "passed" if decision.passed else ("refused, forced" if force is not None else "refused")
    run = context.store.start_run(
        context.store.experiment(spec.name, spec),
        f"promotion of {candidate.name} {candidate.version} to {alias}: {verdict}",
        params={
            "candidate": candidate.uri,
            "champion": champion.uri if champion else "none",
            "alias": alias,
            "candidate.base_fingerprint": assessment.models[candidate.uri].base.fingerprint,
            **({"champion.base_fingerprint": assessment.models[champion.uri].base.fingerprint} if champion else {}),
        },
        tags={**collect().tags(), "rankwise.gate": verdict, "rankwise.reason": force or ""},
        description=_note(assessment, candidate, champion, alias, decision, force),
        kind="promote",
        system_metrics=False,
    )
    mine = assessment.models[candidate.uri]
    run.input(mine.rows.inputs[-1])
    run.metrics(to_tracking(mine.evaluation.metrics), 0)
    bases = {name: asdict(model.base) for name, model in assessment.models.items()}
    run.json({**decision.to_json(), "bases": bases}, "gate.json")
    names = list(assessment.setting.arm.evaluation.metrics)
    roles = {"candidate": candidate.uri, "champion": champion.uri if champion else None, "base": mine.bare}
    for role, name in roles.items():
        if name is not None:
            rows = prediction_rows(assessment.results[name], names, log_examples=spec.tracking.log_examples)
            run.table(rows, f"{role}.json")
    run.end("FINISHED")
    return run.run_id


def _note(
    assessment: Assessment,
    candidate: ModelVersion,
    champion: ModelVersion | None,
    alias: str,
    decision: Decision,
    force: str | None,
) -> str:
    rows = [["yes" if check.ok else "**no**", check.text] for check in decision.checks]
    against = f"against {champion.uri}" if champion is not None else "with no holder of the alias to beat"
    parts = [f"# May {candidate.uri} be @{alias}?", f"Compared {against}.", table(["holds", "condition"], rows)]
    if champion is not None and len(assessment.bases) > 1:
        ours, theirs = assessment.models[candidate.uri].base, assessment.models[champion.uri].base
        parts.append(f"Each over its own base. {candidate.uri}: {ours}. {champion.uri}: {theirs}.")
    if force is not None and not decision.passed:
        parts.append(f"Moved all the same: {force}")
    return "\n\n".join(parts) + "\n"


def _move(
    context: Context, candidate: ModelVersion, champion: ModelVersion | None, alias: str, run_id: str, reason: str
) -> None:
    registry = context.store.registry
    before = None if champion is None else champion.version
    with context.queue.aliases.moving(candidate.name, alias) as moving:
        holder = registry.get_alias(candidate.name, alias)
        now = None if holder is None else holder.version
        if now != before:
            raise GateError(
                f"models:/{candidate.name}@{alias} was version {before or 'none'} when the comparison began and is "
                f"{now or 'none'} now: somebody else has moved it; compare with that one (run the command again)"
            )
        registry.set_alias(candidate.name, alias, candidate.version)
        moving.note(before, candidate.version, run_id=run_id, reason=reason, moved_by=_who())


def _who() -> str:
    return f"{user_name()}@{socket.gethostname()}"

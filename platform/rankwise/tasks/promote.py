"""Move an alias: only through the gate, or by force with a reason; and back again.

The evidence is a run of its own that the version links to. The alias is moved while its row in the queue's database is
locked, after a look whether somebody else has moved it since the comparison began.

- Among how many arms a version was chosen: those that were compared with it on the same evaluation rows.
- Which rows an adapter was trained on: from what its training has left in MLflow, or else from the training data.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rankwise.data.preflight import RowDigests, row_key
from rankwise.data.rows import Example
from rankwise.digests import content_digest
from rankwise.evaluation.evaluate import Evaluation, prediction_rows
from rankwise.evaluation.gate import GateDecision, decide
from rankwise.evaluation.metrics import PREFIX, Observation, to_tracking
from rankwise.exceptions import AssetError, ConfigError, DatasetError, GateError
from rankwise.experiment.arm import ArmSpec
from rankwise.jobs.aliases import AliasMove
from rankwise.tasks.context import Context
from rankwise.tasks.evaluate import Assessed, Assessment, Evaluator
from rankwise.tasks.setting import Setting, read_artifact
from rankwise.tracking.notes import table
from rankwise.tracking.provenance import collect, user_name
from rankwise.tracking.query import get_run, membership
from rankwise.tracking.registry import ModelVersion
from rankwise.tracking.store import Store


def contenders(store: Store, version: ModelVersion) -> int:
    """The evaluated arms of the sweeps that a version's arm belongs to, itself included; 1 where it belongs to none.

    Raises:
        TrackingError: The store cannot be reached.
    """
    if version.run_id is None:
        return 1
    own = get_run(store.client, version.run_id)
    sweeps = [membership(sweep) for sweep in store.runs(own.experiment_id, kind="sweep")]
    of_own = [belongs for belongs in sweeps if belongs(own.parent, own.spec_hash or "")]
    evaluated = {
        run.spec_hash
        for run in store.runs(own.experiment_id, kind="train")
        if any(belongs(run.parent, run.spec_hash or "") for belongs in of_own)
        and any(key.startswith(PREFIX) for key in run.metrics)
    }
    return len({*evaluated, own.spec_hash})


FILE = "row_digests.bin"
"""The artifact of the run that trained; the format is that of `data.row_digests`."""
FILE_TAG = "rankwise.row_digests"
"""SHA-256 of the artifact, on the LoggedModel and on the version from their creation on."""

Seen = Callable[[Example], bool]


def digests_of(arm: ArmSpec, examples: Sequence[Example]) -> bytes:
    """The content of an arm's artifact; the same arm and rows give the same bytes."""
    keys = (row_key(example, arm.dataset.system) for example in examples)
    return RowDigests.of(keys, name=arm.spec_hash, init_from=arm.init_from).to_bytes()


def seen_by(context: Context, candidate: ModelVersion, setting: Setting, evaluator: Evaluator) -> Seen:
    """Whether a row was in the training data of a version, or of an adapter that its training went on from.

    Args:
        context: The stores.
        candidate: The version.
        setting: What it was trained on, for versions whose training has left no digests.
        evaluator: Reads the training data then.

    Raises:
        GateError: It is not known, and the message says what to do.
        TrackingError: MLflow cannot be reached.
    """
    system = setting.arm.dataset.system
    found: list[RowDigests] = []
    version: ModelVersion | None = candidate
    while version is not None:
        digests = _stored(context, version)
        if digests is None:
            if version is not candidate:
                raise GateError(
                    f"{candidate.uri} goes on from {version.uri}, and which rows that was trained on is not known: its "
                    f"run has no {FILE}. {_BY_FORCE}"
                )
            digests = _from_data(candidate, setting, evaluator)
        found.append(digests)
        before = digests.init_from
        version = None if before is None else context.store.registry.resolve(before).version

    def seen(example: Example) -> bool:
        key = row_key(example, system)
        return any(key in digests for digests in found)

    return seen


_BY_FORCE = 'The alias can be moved without knowing it: --force --reason "..."'
_WAYS_OUT = (
    "Name a definition whose dataset.train is the training data and on this machine (--experiment FILE), or move the "
    'alias without knowing it (--force --reason "...")'
)


def _stored(context: Context, version: ModelVersion) -> RowDigests | None:
    """What a version's run has left; None where it has left nothing."""
    expected = version.tags.get(FILE_TAG)
    content = None if version.run_id is None else read_artifact(context, version.run_id, FILE)
    if content is None:
        return None
    where = f"the artifact {FILE} of run {version.run_id}"
    if expected is not None and content_digest(content) != expected:
        raise GateError(
            f"{where} is not what was stored: the tag {FILE_TAG} of {version.uri} says {expected}, found "
            f"{content_digest(content)}. {_BY_FORCE}"
        )
    try:
        return RowDigests.from_bytes(content, where)
    except AssetError as error:
        raise GateError(f"{error}. {_BY_FORCE}") from error


def _from_data(candidate: ModelVersion, setting: Setting, evaluator: Evaluator) -> RowDigests:
    try:
        examples = evaluator.training_rows(setting)
    except (AssetError, DatasetError) as error:
        raise GateError(
            f"which rows {candidate.uri} was trained on is not known: its run has no {FILE}, and the training data "
            f"cannot be read here ({error}). {_WAYS_OUT}"
        ) from error
    arm = setting.arm
    keys = (row_key(example, arm.dataset.system) for example in examples)
    return RowDigests.of(keys, name=arm.spec_hash, init_from=arm.init_from)


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
    decision: GateDecision | None
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
    registry.mark_candidate(candidate, alias)
    evaluator = Evaluator(context)
    on = setting.changed(data=data, limit=limit)
    seen = None
    try:
        seen = seen_by(context, candidate, setting, evaluator)
    except GateError as error:
        if force is None:
            raise
        context.voice.warn(str(error))
    compared = [candidate.uri, *([champion.uri] if champion is not None else [])]
    assessment = evaluator.assess(on, compared, leave_out=seen)
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
) -> GateDecision:
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
    decision: GateDecision,
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
    decision: GateDecision,
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

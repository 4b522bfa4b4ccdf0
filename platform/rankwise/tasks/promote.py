"""Promotion: moves an alias to a version that passes the gate, or by force with a reason; and rolls moves back.

The evidence is a run of its own, linked from the version. The alias moves while its row in the queue's database is
locked, and only if nobody else has moved it since the comparison began.

Every comparison is recorded there too, before its verdict is computed. Later ones for the same alias that share more
than a tenth of their prompts with it have wider intervals (see `evaluation.gate`). The same comparison again returns
the stored verdict.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rankwise.data.row_digests import RowDigests
from rankwise.data.rows import Example, row_keys
from rankwise.digests import content_digest
from rankwise.evaluation.evaluate import Evaluation, prediction_rows
from rankwise.evaluation.gate import GateDecision, decide
from rankwise.evaluation.metrics import PREFIX, Observation, to_tracking
from rankwise.exceptions import AssetError, ConfigError, DatasetError, GateError
from rankwise.experiment.arm import ArmSpec
from rankwise.experiment.hashing import digest
from rankwise.jobs.aliases import AliasMove, PromotionAttempt
from rankwise.tasks.arm_rows import find_sources
from rankwise.tasks.context import Context
from rankwise.tasks.evaluate import Assessment, Evaluator, ModelEvaluation
from rankwise.tasks.evaluation_setup import EvaluationSetup, read_artifact
from rankwise.tracking.notes import table
from rankwise.tracking.provenance import collect, user_name
from rankwise.tracking.query import get_run, membership
from rankwise.tracking.registry import ModelVersion
from rankwise.tracking.store import Store


def count_candidates(store: Store, version: ModelVersion) -> int:
    """Number of evaluated arms in the sweeps of a version's arm, itself included; 1 if it has no sweep."""
    if version.run_id is None:
        return 1
    own = get_run(store.client, version.run_id)
    sweeps = [membership(sweep) for sweep in store.runs(own.experiment_id, kind="sweep")]
    own_sweeps = [is_member for is_member in sweeps if is_member(own.parent, own.spec_hash or "")]
    evaluated = {
        run.spec_hash
        for run in store.runs(own.experiment_id, kind="train")
        if any(is_member(run.parent, run.spec_hash or "") for is_member in own_sweeps)
        and any(key.startswith(PREFIX) for key in run.metrics)
    }
    return len({*evaluated, own.spec_hash})


ROW_DIGESTS_FILE = "row_digests.bin"
"""Artifact of the training run; see `rankwise.data.row_digests.RowDigests` for the format."""
ROW_DIGESTS_TAG = "rankwise.row_digests"
"""SHA-256 of the artifact; a tag of the LoggedModel and of the version."""

RowFilter = Callable[[Example], bool]


def row_digests_of(arm: ArmSpec, examples: Sequence[Example]) -> bytes:
    """Content of an arm's `ROW_DIGESTS_FILE`; equal arms and rows give equal bytes."""
    keys = (row_keys(example, arm.dataset.systems, arm.dataset.supervise) for example in examples)
    return RowDigests.of(keys, name=arm.spec_hash, init_from=arm.init_from).to_bytes()


def training_row_filter(
    context: Context, candidate: ModelVersion, setting: EvaluationSetup, evaluator: Evaluator
) -> RowFilter:
    """Return a function that tells whether a version, or an adapter that it continued from, was trained on a row.

    `setting` locates the training data of a version whose run has no digests.

    Raises:
        GateError: The training rows are unknown; the message says what to do.
    """
    systems = setting.arm.dataset.systems
    known: list[RowDigests] = []
    version: ModelVersion | None = candidate
    while version is not None:
        digests = _stored(context, version)
        if digests is None:
            if version is not candidate:
                raise GateError(
                    f"{candidate.uri} was trained further from {version.uri}, whose training rows are unknown: its run "
                    f"has no {ROW_DIGESTS_FILE}. {_BY_FORCE}"
                )
            digests = _from_data(candidate, setting, evaluator)
        known.append(digests)
        init_from = digests.init_from
        version = None if init_from is None else context.store.registry.resolve(init_from).version

    def is_training_row(example: Example) -> bool:
        keys = row_keys(example, systems, setting.arm.dataset.supervise)
        return any(key in digests for digests in known for key in keys)

    return is_training_row


_BY_FORCE = 'To move the alias without this check: --force --reason "..."'
_WAYS_OUT = (
    "Name a definition whose dataset.train is the training data on this machine (--experiment FILE), or move the alias "
    'without this check (--force --reason "...")'
)


def _stored(context: Context, version: ModelVersion) -> RowDigests | None:
    expected = version.tags.get(ROW_DIGESTS_TAG)
    content = None if version.run_id is None else read_artifact(context, version.run_id, ROW_DIGESTS_FILE)
    if content is None:
        return None
    location = f"the artifact {ROW_DIGESTS_FILE} of run {version.run_id}"
    if expected is not None and content_digest(content) != expected:
        raise GateError(
            f"{location} is not what was stored: the tag {ROW_DIGESTS_TAG} of {version.uri} says {expected}, found "
            f"{content_digest(content)}. {_BY_FORCE}"
        )
    try:
        return RowDigests.from_bytes(content, location)
    except AssetError as error:
        raise GateError(f"{error}. {_BY_FORCE}") from error


def _from_data(candidate: ModelVersion, setting: EvaluationSetup, evaluator: Evaluator) -> RowDigests:
    try:
        examples = evaluator.training_rows(setting)
    except (AssetError, DatasetError) as error:
        raise GateError(
            f"the training rows of {candidate.uri} are unknown: its run has no {ROW_DIGESTS_FILE}, and the training "
            f"data cannot be read here ({error}). {_WAYS_OUT}"
        ) from error
    arm = setting.arm
    keys = (row_keys(example, arm.dataset.systems, arm.dataset.supervise) for example in examples)
    return RowDigests.of(keys, name=arm.spec_hash, init_from=arm.init_from)


EVIDENCE = "rankwise.promotion_run"


@dataclass(frozen=True, kw_only=True)
class Promotion:
    """Result of a promotion.

    `decision` is None if the candidate already had the alias. `run_id` is the evidence. `stored` says that the verdict
    is that of an earlier, equal comparison.
    """

    candidate: ModelVersion
    champion: ModelVersion | None
    alias: str
    decision: GateDecision | None
    moved: bool
    forced: bool
    run_id: str | None
    stored: bool = False

    def to_json(self) -> dict[str, Any]:
        """The result as `promote --json` prints it."""
        return {
            "candidate": self.candidate.uri,
            "champion": None if self.champion is None else self.champion.uri,
            "alias": self.alias,
            "moved": self.moved,
            "forced": self.forced,
            "run_id": self.run_id,
            "stored": self.stored,
            **({} if self.decision is None else self.decision.to_json()),
        }


def promote(
    context: Context,
    setting: EvaluationSetup,
    candidate: ModelVersion,
    *,
    alias: str,
    data: str | None = None,
    limit: int | None = None,
    force: str | None = None,
) -> Promotion:
    """Compare a version with the alias's holder and with the bare base; move the alias if the version passes the gate.

    `data` replaces the definition's evaluation rows. `force` is a reason to move the alias even if the gate refuses.

    Raises:
        ConfigError: There are no rows, or the limits name metrics that are not computed.
        GateError: The alias was moved meanwhile; or the candidate's training rows are unknown and `force` is None.
    """
    registry = context.store.registry
    champion = registry.get_alias(candidate.name, alias)
    if champion is not None and champion.version == candidate.version:
        return Promotion(
            candidate=candidate, champion=champion, alias=alias, decision=None, moved=False, forced=False, run_id=None
        )
    # Fail before the comparison if this user may not move the alias.
    registry.mark_candidate(candidate, alias)
    evaluator = Evaluator(context)
    used = setting.changed(data=data, limit=limit)
    is_training_row = None
    try:
        is_training_row = training_row_filter(context, candidate, setting, evaluator)
    except GateError as error:
        if force is None:
            raise
        context.reporter.warn(str(error))
    key = _comparison_key(context, used, candidate, champion, excluding=is_training_row is not None)
    earlier = next(
        (each for each in context.queue.aliases.attempts(candidate.name, alias) if each.key == key and each.verdict),
        None,
    )
    if earlier is not None and earlier.verdict is not None and earlier.run_id is not None:
        decision = GateDecision.from_json(earlier.verdict)
        return _settle(context, candidate, champion, alias, decision, earlier.run_id, force, stored=True)
    uris = [candidate.uri, *([champion.uri] if champion is not None else [])]
    assessment = evaluator.assess(used, uris, exclude=is_training_row)
    overlapping = None if is_training_row is None else assessment.excluded
    # Other rows had no influence on which candidate was chosen.
    chosen_on = (setting.arm.dataset.eval, setting.arm.dataset.eval_split)
    candidates = (
        count_candidates(context.store, candidate)
        if (used.arm.dataset.eval, used.arm.dataset.eval_split) == chosen_on
        else 1
    )
    compared = _compared(assessment, candidate, champion)
    with context.queue.aliases.moving(candidate.name, alias) as locked:
        attempt = 1 + sum(_shares_rows(compared.prompts, each) for each in locked.attempts())
        attempt_id = locked.record_attempt(
            key,
            candidate=candidate.version,
            champion=None if champion is None else champion.version,
            prompts=compared.prompts,
            attempted_by=_who(),
        )
    decision = _decide(assessment, compared, candidate, champion, overlapping, candidates, attempt, alias)
    run_id = _write_evidence(context, assessment, candidate, champion, alias, decision, force)
    context.queue.aliases.record_verdict(attempt_id, decision.to_json(), run_id)
    registry.tag_version(candidate.name, candidate.version, {EVIDENCE: run_id})
    return _settle(context, candidate, champion, alias, decision, run_id, force)


def _settle(
    context: Context,
    candidate: ModelVersion,
    champion: ModelVersion | None,
    alias: str,
    decision: GateDecision,
    run_id: str,
    force: str | None,
    *,
    stored: bool = False,
) -> Promotion:
    """Move the alias if the verdict, or the reason to force it, says so."""
    moving = decision.passed or force is not None
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
        stored=stored,
    )


_SHARED_ROWS = 0.1
"""Comparisons that share at most this part of their prompts do not count as repeated."""


def _shares_rows(prompts: frozenset[str], earlier: PromotionAttempt) -> bool:
    return len(prompts & earlier.prompts) > _SHARED_ROWS * min(len(prompts), len(earlier.prompts))


def _comparison_key(
    context: Context,
    used: EvaluationSetup,
    candidate: ModelVersion,
    champion: ModelVersion | None,
    *,
    excluding: bool,
) -> str:
    """Digest of everything that decides a comparison: both versions, rows by content, metrics and limits.

    `excluding` says whether training rows are known, and thus left out.
    """
    sources = find_sources(used.arm, context.settings, context.reporter, training=False)
    dataset = used.arm.dataset.with_revisions(sources.revisions(used.arm.dataset))
    return digest(
        {
            "candidate": candidate.uri,
            "champion": None if champion is None else champion.uri,
            "excluding": excluding,
            "promotion": used.spec.promotion.model_dump(),
            "primary_metric": used.arm.evaluation.primary_metric,
            "evaluation": used.arm.model_copy(update={"dataset": dataset}).eval_hash(),
        }
    )


def rollback(context: Context, name: str, alias: str, *, reason: str) -> tuple[int, int | None]:
    """Undo the latest recorded move of an alias that still stands; returns the previous and the new version.

    Raises:
        ConfigError: There is no move left, or the alias was moved by other means since.
    """
    registry = context.store.registry
    with context.queue.aliases.moving(name, alias) as moving:
        moves = moving.history()
        if not moves:
            raise ConfigError(f"no move of models:/{name}@{alias} is recorded here; `rankwise promote` records moves")
        standing = _standing(moves)
        if not standing:
            raise ConfigError(f"every recorded move of models:/{name}@{alias} has been undone")
        last = standing[-1]
        holder = registry.get_alias(name, alias)
        if (holder.version if holder else None) != last.to_version or last.to_version is None:
            raise ConfigError(
                f"models:/{name}@{alias} is version {holder.version if holder else 'none'} and not {last.to_version}, "
                "to which rankwise last moved it: it was moved by other means; set it by hand"
            )
        if last.from_version is None:
            registry.delete_alias(name, alias)
        else:
            registry.set_alias(name, alias, last.from_version)
        moving.note(last.to_version, last.from_version, run_id=None, reason=reason, moved_by=_who())
    return last.to_version, last.from_version


def _standing(moves: Sequence[AliasMove]) -> list[AliasMove]:
    """Moves that were not undone. A rollback is recorded as a move without evidence."""
    standing: list[AliasMove] = []
    for move in moves:
        undone = standing[-1] if standing and move.run_id is None else None
        if undone is not None and (undone.from_version, undone.to_version) == (move.to_version, move.from_version):
            standing.pop()
        else:
            standing.append(move)
    return standing


@dataclass(frozen=True, kw_only=True)
class _Compared:
    """Observations of all models on the rows that they have in common, and digests of these rows' prompts."""

    candidate: list[Observation]
    champion: list[Observation] | None
    base: list[Observation]
    prompts: frozenset[str]


def _compared(assessment: Assessment, candidate: ModelVersion, champion: ModelVersion | None) -> _Compared:
    candidate_result = assessment.models[candidate.uri]
    champion_result = None if champion is None else assessment.models[champion.uri]
    # A row may be too long for only one base's tokenizer.
    paired = {observation.id for observation in candidate_result.evaluation.observations}
    if champion_result is not None:
        paired &= {observation.id for observation in champion_result.evaluation.observations}

    def observations(result: Evaluation) -> list[Observation]:
        return [observation for observation in result.observations if observation.id in paired]

    # The keys do not depend on a base's chat template, so rows are recognized across bases.
    dataset = assessment.setting.arm.dataset
    keys = (
        key
        for example in candidate_result.rows.examples.eval
        if example.id in paired
        for key in row_keys(example, dataset.systems, dataset.supervise)
    )
    return _Compared(
        candidate=observations(candidate_result.evaluation),
        champion=None if champion_result is None else observations(champion_result.evaluation),
        base=observations(assessment.results[candidate_result.bare]),
        prompts=frozenset(key[:16] for key in keys),
    )


def _decide(
    assessment: Assessment,
    compared: _Compared,
    candidate: ModelVersion,
    champion: ModelVersion | None,
    overlapping: int | None,
    among: int,
    attempt: int,
    alias: str,
) -> GateDecision:
    spec, evaluation = assessment.setting.spec, assessment.setting.arm.evaluation
    form = _form(assessment.models[candidate.uri])
    return decide(
        compared.candidate,
        compared.champion,
        compared.base,
        spec.promotion,
        metrics=evaluation.metrics,
        primary_metric=evaluation.primary_metric,
        overlapping=overlapping,
        same_tokens=champion is None or _form(assessment.models[champion.uri]) == form,
        contenders=among,
        attempt=attempt,
        alias=alias,
    )


def _form(model: ModelEvaluation) -> tuple[str, str]:
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
    candidate_result = assessment.models[candidate.uri]
    for record in candidate_result.rows.evaluation_inputs:
        run.input(record)
    run.metrics(to_tracking(candidate_result.evaluation.metrics), 0)
    bases = {name: asdict(model.base) for name, model in assessment.models.items()}
    run.json({**decision.to_json(), "bases": bases}, "gate.json")
    names = list(assessment.setting.arm.evaluation.metrics)
    roles = {"candidate": candidate.uri, "champion": champion.uri if champion else None, "base": candidate_result.bare}
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
    against = f"with {champion.uri}" if champion is not None else "with the bare base only; the alias has no holder"
    parts = [f"# May {candidate.uri} be @{alias}?", f"Compared {against}.", table(["holds", "condition"], rows)]
    if champion is not None and len(assessment.bases) > 1:
        ours, theirs = assessment.models[candidate.uri].base, assessment.models[champion.uri].base
        parts.append(f"Each was evaluated over its own base. {candidate.uri}: {ours}. {champion.uri}: {theirs}.")
    if force is not None and not decision.passed:
        parts.append(f"Moved by force: {force}")
    return "\n\n".join(parts) + "\n"


def _move(
    context: Context, candidate: ModelVersion, champion: ModelVersion | None, alias: str, run_id: str, reason: str
) -> None:
    registry = context.store.registry
    expected = None if champion is None else champion.version
    with context.queue.aliases.moving(candidate.name, alias) as moving:
        holder = registry.get_alias(candidate.name, alias)
        current = None if holder is None else holder.version
        if current != expected:
            raise GateError(
                f"models:/{candidate.name}@{alias} was version {expected or 'none'} when the comparison began and is "
                f"{current or 'none'} now: it was moved meanwhile; run the command again to compare with that version"
            )
        registry.set_alias(candidate.name, alias, candidate.version)
        moving.note(expected, candidate.version, run_id=run_id, reason=reason, moved_by=_who())


def _who() -> str:
    return f"{user_name()}@{socket.gethostname()}"

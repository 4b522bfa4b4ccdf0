"""The answer in words: the headline, what to do next, and the notes that a reader needs to trust it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from rankwise.evaluation.answer import LEAST_CLUSTERS, MAX_FAILED_SHARE, Decision, RankOutcome
from rankwise.evaluation.answer_arms import Arms
from rankwise.evaluation.compare import RANK, SHARES, Comparison, format_param, title
from rankwise.experiment.answer_plan import PROPOSED_MARGIN, AnswerPlan
from rankwise.experiment.arm import param_name

AnswerStatus = Literal["enough", "undecided", "no_statement"]
LEARNING_RATE = "training.learning_rate"
METHOD = (
    "paired over seeds and clusters of rows; enough: from the largest rank down (Hsu and Berger 1999); not enough: "
    "Bonferroni over ranks"
)
_NUMBERS = ["No", "One", "Two", "Three", "Four", "Five", "Six", "Seven", "Eight", "Nine", "Ten", "Eleven", "Twelve"]


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a sweep says about ranks.

    Attributes:
        status: `no_statement` where nothing can be said; then `decision` is None.
        text: The headline.
        key: The metric.
        plan: What was planned; None without an `answer` section.
        decision: The tests.
        rank: The smallest rank that is enough; None while that is open.
        limit: By how much it can be worse than the largest rank; None for the largest itself.
        seeds: Fewest seeds of a rank.
        rows: Number of evaluation rows.
        clusters: Their effective number of clusters.
        arms: The arms that were compared.
        hint: What to do next, or None.
        notes: How the answer was found, sentence by sentence.
    """

    status: AnswerStatus
    text: str
    key: str
    plan: AnswerPlan | None
    decision: Decision | None = None
    rank: float | None = None
    limit: float | None = None
    seeds: int = 0
    rows: int | None = None
    clusters: float | None = None
    arms: Arms | None = None
    hint: str | None = None
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, object]:
        """The answer as `compare --json` has it."""
        plan, decision, arms = self.plan, self.decision, self.arms
        ranks = [] if decision is None else [each.to_json() for each in decision.outcomes]
        for each, outcome in zip(ranks, () if decision is None else decision.outcomes, strict=True):
            each["tuned"] = dict(arms.chosen.get(outcome.rank, ())) if arms is not None else {}
        return {
            "status": self.status,
            "rank": None if self.rank is None else _whole(self.rank),
            "limit": self.limit,
            "margin": None if plan is None else plan.margin,
            "confidence": 0.95 if plan is None else plan.confidence,
            "seeds": self.seeds,
            "text": self.text,
            "ranks": ranks,
            "metric": self.key,
            "rows": self.rows,
            "clusters": self.clusters,
            "look": None if decision is None else decision.look,
            "looks": None if plan is None else len(plan.looks),
            "seed_sd": None if decision is None else decision.seed_sd,
            "hint": self.hint,
            "method": METHOD,
        }


def no_statement(comparison: Comparison, reason: str = "") -> Answer:
    """An answer without a statement: `reason`, or that there is one seed, no margin or no result."""
    plan, key = comparison.plan, comparison.primary_metric
    ranked = [each for each in comparison.ranking if isinstance(each.params.get(RANK), int | float)]
    seeds = min((len(each.finished) for each in ranked), default=0)
    hint = None
    if not ranked:
        ended = all(arm.status in {"FAILED", "KILLED"} for arm in comparison.arms)
        end = "no arm has finished" if ended else "no arm has a result yet"
        return Answer(status="no_statement", text=f"No statement about ranks: {end}.", key=key, plan=plan)
    ranks = {each.params.get(RANK) for each in comparison.configurations}
    best = ranked[0]
    lowest = (
        f"{'Highest' if comparison.greater_is_better else 'Lowest'} {'mean ' if seeds > 1 else ''}{title(key)}: "
        f"r = {format_param(best.params.get(RANK))}."
    )
    count = sum(len(each.finished) for each in ranked)
    adapters = f"{_NUMBERS[count] if count < len(_NUMBERS) else f'{count:,}'} {'adapter' if count == 1 else 'adapters'}"
    if len(ranks) == 1:
        only = format_param(best.params.get(RANK))
        return Answer(
            status="no_statement",
            text=f"r = {only} is the only rank, so there is nothing to compare it with.",
            key=key,
            plan=plan,
            seeds=seeds,
        )
    if reason:
        text = f"No statement about ranks: {reason}. {lowest}"
    elif max(len(each.finished) for each in ranked) < 2:
        text = f"{adapters}, one seed each: no statement about ranks. {lowest}"
        hint = "Another seed can change the order. "
        if plan is None:
            hint += add_section()
        elif plan.fixed:
            hint += "Give sweep.parameters.seed at least two values."
        else:
            hint += f"The definition plans {len(plan.looks[0])} seeds for each rank."
    else:
        text = f"{adapters}, and no margin is set: no statement about ranks. {lowest}"
    if plan is None and hint is None:
        hint = add_section()
    return Answer(status="no_statement", text=text, key=key, plan=plan, seeds=seeds, hint=hint)


def add_section() -> str:
    """The line that names the key to add."""
    return f"To test which rank is enough, add `answer: {{margin: {PROPOSED_MARGIN}}}` to the definition."


def statement(
    comparison: Comparison,
    plan: AnswerPlan,
    arms: Arms,
    decision: Decision,
    rows: int,
    n: float,
    *,
    coming: int = 0,
) -> Answer:
    """The answer of a decision.

    `n` is the effective number of clusters of the rows, `coming` how many results of the next look are being trained.
    """
    named = decision.named
    seeds = min((each.seeds for each in decision.outcomes if each.seeds), default=0)
    words = _Words(
        key=comparison.primary_metric, plan=plan, arms=arms, decision=decision, seeds=seeds, rows=rows, coming=coming
    )
    return Answer(
        status="undecided" if named is None else "enough",
        text=words.headline(named),
        key=comparison.primary_metric,
        plan=plan,
        decision=decision,
        rank=None if named is None else named.rank,
        limit=None if named is None else named.upper,
        seeds=seeds,
        rows=rows,
        clusters=n,
        arms=arms,
        hint=" ".join([*words.hint(), *_changes(comparison)]) or None,
        notes=(*words.notes(), *_changes(comparison)),
    )


def outlook(plan: AnswerPlan, decision: Decision) -> list[str]:
    """The margin in units of the noise over seeds, and what the planned seeds will probably not decide."""
    if decision.seed_sd == 0:
        return []
    ratio = f"{plan.margin / decision.seed_sd:.2g}"
    found = [f"The margin is {ratio} times the standard deviation of a difference over seeds."]
    if decision.beyond_most and decision.look < decision.looks:
        found.append(f"{len(plan.seeds)} seeds will probably not decide {_ranks(decision.beyond_most)}.")
    return found


@dataclass(frozen=True, kw_only=True)
class _Words:
    key: str
    plan: AnswerPlan
    arms: Arms
    decision: Decision
    seeds: int
    rows: int
    coming: int

    def headline(self, named: RankOutcome | None) -> str:
        decision, margin = self.decision, amount(self.key, self.plan.margin)
        largest = f"r = {decision.reference.rank:g}"
        basis = f"({self.basis()})"
        if named is None:
            return f"Undecided: {self._open()} {basis}."
        if named is decision.reference:
            only = f"Only {largest} is enough: no smaller rank is shown to be within {margin} of it {basis}."
            worse = [each for each in decision.outcomes if each.status == "not_enough"]
            if len(worse) == len(decision.outcomes) - 1:
                only = f"Only {largest} is enough: every smaller rank is more than {margin} worse {basis}."
            return f"{only} A larger rank may be better still: try r = {2 * decision.reference.rank:g}."
        assert named.upper is not None, "a rank that is enough has a limit"
        if named.upper > 0:
            by = f"at most {amount(self.key, named.upper, up=True)} worse than {largest}"
        else:
            by = f"at least {amount(self.key, -named.upper, up=False)} better than {largest}"
        text = f"r = {named.rank:g} is enough: {by} {basis}."
        failed = [
            f"{each.failed} of {each.failed + each.seeds} seeds of r = {each.rank:g} failed."
            for each in (named, decision.reference)
            if each.failed
        ]
        return " ".join(filter(None, [text, *failed, self._better_than(named)]))

    def _open(self) -> str:
        if not self.decision.undecided:
            failed = [each for each in self.decision.outcomes if each.reason]
            return "; ".join(f"r = {each.rank:g}: {each.reason}" for each in failed)
        names = _join([f"r = {each.rank:g}" for each in self.decision.undecided])
        verb = "is" if len(self.decision.undecided) == 1 else "are"
        return f"it is open whether {names} {verb} enough, compared with r = {self.decision.reference.rank:g}"

    def basis(self) -> str:
        plan = self.plan
        parts = [f"{self.seeds} seeds", f"{self.rows:,} rows", f"margin {plan.margin:g}"]
        if rate := self._rates():
            parts.append(rate)
        parts += [
            f"averaged over {_name(name)} {_join([format_param(value) for value in values])}"
            for name, values in self.arms.averaged.items()
        ]
        return f"{100 * plan.confidence:g} % confidence; {parts[0]}, {'; '.join(parts[1:])}"

    def _rates(self) -> str:
        """At which values of the tuned fields, or at which learning rate."""
        tuned = [param_name(path) for path in self.plan.tune]
        if self.arms.candidates > 1:
            return "each rank at its own best " + _join([_name(name) for name in tuned])
        if LEARNING_RATE in self.arms.averaged:
            return ""
        rates = {arm.params.get(LEARNING_RATE) for cell in self.arms.cells.values() for arm in cell}
        return f"learning rate {_rate(rates.pop())}" if len(rates) == 1 and None not in rates else ""

    def _better_than(self, named: RankOutcome) -> str:
        """Another rank whose mean is better than that of the named one by more than the margin."""
        others = [each for each in self.decision.outcomes if each is not named and each.difference is not None]
        best = min(others, key=lambda each: each.difference or 0.0, default=None)
        if best is None or named.difference is None or best.difference is None:
            return ""
        gap = named.difference - best.difference
        if gap <= self.plan.margin:
            return ""
        return f"On average r = {best.rank:g} was {amount(self.key, gap, up=False)} better than r = {named.rank:g}."

    def hint(self) -> list[str]:
        """What would decide the undecided ranks."""
        plan, parts = self.plan, list[str]()
        for each in self.decision.outcomes:
            if each.status != "undecided":
                continue
            if each.reason is not None:
                parts.append(f"r = {each.rank:g} is undecided: {each.reason}.")
            elif each.more_seeds is None:
                parts.append(f"r = {each.rank:g}: more seeds alone will hardly decide; more evaluation rows may.")
            else:
                parts.append(f"r = {each.rank:g}: about {each.more_seeds} seeds would decide.")
        if self.decision.undecided:
            parts += outlook(plan, self.decision)
            if self.coming:
                parts.append(f"{self.coming} results of the last look, at {len(plan.seeds)} seeds, are still to come.")
            elif self.decision.look < self.decision.looks:
                parts.append(f"`rankwise run` trains up to {len(plan.seeds)} seeds.")
            else:
                new = "other values of sweep.parameters.seed" if plan.fixed else f"seed: {max(plan.seeds) + 1}"
                parts.append(f"This was the last planned look; a new test needs new seeds ({new}).")
        elif self.decision.look < self.decision.looks:
            parts += outlook(plan, self.decision)
        return parts

    def notes(self) -> list[str]:
        plan, decision, arms = self.plan, self.decision, self.arms
        largest = f"r = {decision.reference.rank:g}"
        looks = (
            f", in equal parts for {decision.looks} looks; this is look {decision.look}" if decision.looks > 1 else ""
        )
        variance = ", and their variance is pooled over ranks" if decision.pooled else ", and each has its own variance"
        notes = [
            f"The difference of a rank is its mean {title(self.key)} minus that of {largest}, the largest rank; "
            "positive is worse. It is enough if the upper limit is within the margin, and not enough if the lower "
            "limit is beyond it. Ranks are tested from large to small, up to the first that is not enough.",
            f"With {100 * plan.confidence:g} % confidence all of these statements are true together. Half of the error "
            f"is for either kind of statement{looks}.",
            f"Noise over seeds: differences are paired by seed{variance}. Noise over rows: differences are taken row "
            "by row, and rows with equal prompts count once.",
        ]
        notes += outlook(plan, self.decision)
        if arms.candidates > 1:
            chosen = "; ".join(
                f"r = {rank:g}: " + ", ".join(f"{_name(name)} {_rate(value)}" for name, value in values)
                for rank, values in arms.chosen.items()
            )
            notes.append(
                f"Chosen by the pilot seeds {_join([str(seed) for seed in plan.pilot])}, which take no part in the "
                f"answer: {chosen}. These values are compared, not the best that there may be."
            )
        failed = [each for each in decision.outcomes if each.failed]
        for each in failed:
            notes.append(
                f"r = {each.rank:g}: {each.failed} of {each.failed + each.seeds} seeds failed and are not in its mean."
            )
        if any(each is decision.reference for each in failed):
            notes.append(
                f"With more than {100 * MAX_FAILED_SHARE:g} % failed seeds of {largest}, no rank is called not enough."
            )
        if arms.stopped:
            at = ", ".join(f"{count} {rung}" for rung, count in arms.stopped.items())
            whole = f" Nothing is said about {_ranks(arms.pruned)}." if arms.pruned else ""
            notes.append(
                f"Early stopping ended arms by their evaluation on the same rows ({at}); the answer is about arms that "
                f"were trained to the end.{whole}"
            )
        if arms.left_out:
            notes.append(f"{arms.left_out} combinations of other settings are left out: not every rank has them.")
        return notes


def _changes(comparison: Comparison) -> list[str]:
    """Whether the plan was changed after training had begun."""
    earlier = comparison.earlier_plans
    if not earlier:
        return []
    before = "not set" if earlier[-1] is None else f"{earlier[-1].margin:g}"
    times = "once" if len(earlier) == 1 else f"{len(earlier)} times"
    return [
        f"The plan of the answer was changed {times} after the sweep was first submitted (before, the margin was "
        f"{before}). A margin that was chosen after looking at results is no test."
    ]


def too_few_clusters(clusters: float, rows: int) -> str:
    """Why few rows allow no statement."""
    return (
        f"{rows:,} rows count as {clusters:.1f} independent ones (rows with equal prompts count once); at least "
        f"{LEAST_CLUSTERS} are needed"
    )


def amount(key: str, value: float, *, up: bool | None = None) -> str:
    """A difference with two digits and its unit: `0.05 nats`, `1.2 points`; `up` rounds up or down."""
    scale, unit = (100.0, " points") if key in SHARES else (1.0, " nats" if key == "eval.loss" else "")
    shown = value * scale
    digits = 0 if shown == 0 else max(0, 1 - math.floor(math.log10(abs(shown))))
    if up is not None:
        step = 10.0**-digits
        shown = (math.ceil(shown / step - 1e-9) if up else math.floor(shown / step + 1e-9)) * step
    text = f"{shown:.{digits}f}"
    return f"{text.rstrip('0').rstrip('.') if '.' in text else text}{unit}"


def _rate(value: object) -> str:
    if isinstance(value, float) and 0 < value < 0.01:
        mantissa, _, exponent = f"{value:.3e}".partition("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    return format_param(value)


def _name(key: str) -> str:
    return key.rpartition(".")[2].replace("_", " ")


def _ranks(ranks: Sequence[float]) -> str:
    return _join([f"r = {rank:g}" for rank in ranks])


def _join(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _whole(rank: float) -> float | int:
    return int(rank) if rank == int(rank) else rank

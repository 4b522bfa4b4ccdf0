"""The loop over the steps of a pack: who joins, steps, is evaluated and saved, pauses and leaves."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence

from rankwise.exceptions import JobError
from rankwise.experiment.metric_names import GREATER_IS_BETTER
from rankwise.logs import bound
from rankwise.modeling.base import LoadedBase
from rankwise.modeling.packed_lora import delete_adapter, install
from rankwise.training.assess import Assessor
from rankwise.training.checkpoint import Checkpoints
from rankwise.training.living import LivingArm
from rankwise.training.memory import PeakMemory, is_out_of_memory
from rankwise.training.passes import Passes
from rankwise.training.step import Nonfinite, Stepper
from rankwise.training.values import ArmOutcome, ArmTask, PackObserver, StepRecord

logger = logging.getLogger(__name__)

Evaluate = Callable[[Sequence[str]], Mapping[str, Mapping[str, float]]]
"""Given names of adapters in the base's model, the metrics of each under its name."""
UNFINISHED = ("paused", "stopped")
"""How arms end that can go on."""


class PackLoop:
    """The arms of a pack, and the loop over their steps."""

    def __init__(
        self,
        base: LoadedBase,
        tasks: Sequence[ArmTask],
        checkpoints: Checkpoints,
        observer: PackObserver,
        evaluate: Evaluate | None,
        passes: Passes,
    ) -> None:
        """Inject the arms' adapters, and put the arms into the states that they have on disk.

        Raises:
            ConfigError: An arm does not fit the base.
            JobError: Out of memory with what the arms keep for the whole training.
        """
        self._base = base
        self._checkpoints = checkpoints
        self._observer = observer
        self._evaluate = evaluate
        self._memory = PeakMemory(base.device)
        self._arms: list[LivingArm] = []
        self._outcomes: dict[str, ArmOutcome] = {}
        self._pack_step = 0
        self._passes = passes
        pad = base.tokenizer.pad_token_id
        # Any token pads as well as another: padding is neither attended to nor supervised.
        self._pad_token_id = 0 if pad is None else int(pad)
        try:
            self._begin(tasks)
        except BaseException as error:
            self.close()
            if is_out_of_memory(error):
                raise JobError(
                    f"out of memory with the adapters and optimizers of {len(tasks)} arms on {base.device}: train "
                    f"fewer together (--max-arms), lower lora.r, or set training.optim to adamw_bnb_8bit: {error}"
                ) from error
            raise

    def close(self) -> None:
        """Take the adapters out of the base."""
        for arm in self._arms:
            delete_adapter(self._base.model, arm.name)
        self._arms = []

    def run(self, should_stop: Callable[[], bool], should_leave: Callable[[str], bool]) -> dict[str, ArmOutcome]:
        """Step until no arm is left or a stop is asked for."""
        stepper = Stepper(self._base.model, install(self._base.model), self._pad_token_id, self._memory, self._passes)
        assessor = Assessor(self._base.model, install(self._base.model), stepper.logits, self._pad_token_id)
        self._leave_done()
        self._pause(assessor)
        while self._arms:
            leaving = [arm for arm in self._arms if should_leave(arm.spec_hash)]
            if should_stop() or len(leaving) == len(self._arms):
                self._stop()
                return self._outcomes
            for arm in leaving:
                if self._is_sound(arm):
                    self._checkpoints.put_aside(arm)
                    self._part_with(arm, self._stopped(arm))
            self._pack_step += 1
            results = stepper.step(self._arms)
            self._passes = stepper.passes
            for spec_hash, result in results.items():
                if isinstance(result, StepRecord):
                    self._observer.on_step(spec_hash, result)
                else:
                    self._fail(next(arm for arm in self._arms if arm.spec_hash == spec_hash), result)
            self._assess(assessor, [arm for arm in self._arms if arm.is_due])
            self._leave_done()
            self._pause(assessor)
            if self._arms and self._pack_step % min(arm.task.spec.training.save_steps for arm in self._arms) == 0:
                self._save()
        if any(outcome.status in UNFINISHED for outcome in self._outcomes.values()):
            self._checkpoints.save(self._pack_step, [], self._outcomes, self._passes)
        else:
            self._checkpoints.drop_generations()
        return self._outcomes

    def _begin(self, tasks: Sequence[ArmTask]) -> None:
        generation = self._checkpoints.newest()
        if generation is None:
            self._passes = self._checkpoints.first_passes(self._passes)
        else:
            self._passes = generation.passes
            self._pack_step = generation.pack_step
            ended = generation.ended.items()
            self._outcomes.update({each: outcome for each, outcome in ended if outcome.status not in UNFINISHED})
        for task in tasks:
            spec_hash = task.spec.spec_hash
            if spec_hash in self._outcomes:
                continue
            arm = LivingArm(task, self._base.model)
            self._arms.append(arm)
            state = None if generation is None else generation.states.get(spec_hash)
            if generation is None or spec_hash in generation.ended:
                state = self._checkpoints.newest_of(spec_hash)
            if state is not None:
                state.restore(arm)
                with bound(arm=task.spec.short):
                    logger.info("arm %s goes on from step %d of %d", task.spec.short, arm.step, arm.total_steps)
            self._observer.on_start(spec_hash, arm.step, arm.total_steps)

    def _save(self) -> None:
        for arm in list(self._arms):
            self._is_sound(arm)
        directory = self._checkpoints.save(self._pack_step, self._arms, self._outcomes, self._passes)
        self._observer.on_checkpoint(self._pack_step, directory)

    def _stop(self) -> None:
        self._save()
        for arm in list(self._arms):
            self._part_with(arm, self._stopped(arm))

    def _stopped(self, arm: LivingArm) -> ArmOutcome:
        return self._outcome(arm, "stopped", f"stopped on request after step {arm.step} of {arm.total_steps}")

    def _pause(self, assessor: Assessor) -> None:
        """Part with the arms that have come to their `stop_at`, now or in another pack."""
        pausing = [arm for arm in self._arms if arm.pauses and self._is_sound(arm)]
        self._assess(assessor, [arm for arm in pausing if arm.evaluated != arm.step])
        for arm in pausing:
            self._checkpoints.put_aside(arm)
            reason = f"paused after step {arm.step} of {arm.total_steps}"
            self._part_with(arm, self._outcome(arm, "paused", reason))

    def _assess(self, assessor: Assessor, due: Sequence[LivingArm]) -> None:
        if not due:
            return
        if self._evaluate is None:
            found: Mapping[str, Mapping[str, float]] = assessor.assess(due)
        else:
            by_name = self._evaluate([arm.name for arm in due])
            found = {arm.spec_hash: by_name[arm.name] for arm in due}
        for arm in due:
            metrics = dict(found[arm.spec_hash])
            arm.metrics.update(metrics)
            arm.evaluated = arm.step
            self._observer.on_evaluation(arm.spec_hash, arm.step, metrics)
            primary = arm.task.spec.evaluation.primary_metric
            if primary in metrics and _is_better(metrics[primary], arm, primary):
                self._checkpoints.save_best(arm, metrics[primary])

    def _leave_done(self) -> None:
        for arm in [arm for arm in self._arms if arm.done]:
            if self._is_sound(arm):
                self._leave(arm, self._outcome(arm, "finished", None))

    def _is_sound(self, arm: LivingArm) -> bool:
        """Whether an arm's weights may be stored; if not it leaves, before anything takes them for good ones."""
        if arm.is_finite():
            return True
        ids = tuple(row.id for rows in arm.window(arm.step - 1) for row in rows)
        self._fail(arm, Nonfinite(what="weights", step=arm.step, number=math.nan, example_ids=ids))
        return False

    def _fail(self, arm: LivingArm, problem: Nonfinite) -> None:
        shown = ", ".join(problem.example_ids[:5]) + (" ..." if len(problem.example_ids) > 5 else "")
        reason = f"nonfinite_{problem.what}: {problem.number} at step {problem.step}, rows {shown}"
        with bound(arm=arm.task.spec.short):
            logger.warning("arm %s stops: %s", arm.task.spec.short, reason)
        self._leave(arm, self._outcome(arm, "nonfinite", reason, problem.example_ids))

    def _leave(self, arm: LivingArm, outcome: ArmOutcome) -> None:
        self._part_with(arm, self._checkpoints.finish(arm, outcome))

    def _part_with(self, arm: LivingArm, outcome: ArmOutcome) -> None:
        self._arms.remove(arm)
        delete_adapter(self._base.model, arm.name)
        self._outcomes[arm.spec_hash] = outcome
        self._observer.on_end(outcome)

    def _outcome(
        self, arm: LivingArm, status: str, reason: str | None, example_ids: tuple[str, ...] = ()
    ) -> ArmOutcome:
        best = arm.best
        return ArmOutcome(
            spec_hash=arm.spec_hash,
            status=status,  # type: ignore[arg-type]
            steps=arm.step,
            adapter=None,
            reason=reason,
            metrics=dict(arm.metrics),
            seconds=arm.seconds,
            peak_memory_bytes=self._memory.bytes,
            best=best.directory if best else None,
            best_step=best.step if best else None,
            best_value=best.value if best else None,
            example_ids=example_ids,
        )


def _is_better(value: float, arm: LivingArm, primary: str) -> bool:
    if value != value:
        return False
    if arm.best is None:
        return True
    return value > arm.best.value if primary in GREATER_IS_BETTER else value < arm.best.value

"""Rules that involve several fields or the disk: invalid combinations, sources, pins, module names, sweeps.

A rule reads fields through a `FieldView`. It is skipped if a field that it needs is invalid, so all other rules still
report their problems.
"""

from __future__ import annotations

import os
import re
import string
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rankwise.digests import content_digest
from rankwise.exceptions import ConfigError
from rankwise.experiment.arm import ArmSpec
from rankwise.experiment.document import Problem
from rankwise.experiment.fields import did_you_mean, get, is_source, show
from rankwise.experiment.hashing import plain
from rankwise.experiment.metric_names import (
    METRIC_KEYS,
    TOKENIZER_DEPENDENT,
    depends_on_tokenizer,
    keys_of,
    known_names,
    means_of,
    metric_facts,
    source_keys,
)
from rankwise.experiment.module_names import NOT_TARGETS, known_modules, read_config
from rankwise.experiment.paths import KeyPath, as_path
from rankwise.experiment.schema import (
    READING,
    DatasetSpec,
    DataSource,
    EarlyStoppingSpec,
    ExperimentSpec,
    LrSchedulerSpec,
)
from rankwise.experiment.search import SEARCHES
from rankwise.experiment.source import HubSource, LocalSource, PypiSource, Source, check_revision, parse_source

BUILT_IN_TEMPLATES = ("chatml", "plain")


class UnusableField(Exception):
    """Raised when a field that a rule needs is missing or invalid, which is reported elsewhere."""


class FieldView:
    """The fields of a definition with defaults; access to an invalid one raises `UnusableField`.

    `elsewhere`: the definition comes from another machine, so that its files need not exist on this one.
    """

    def __init__(self, data: dict[str, Any], wrong: Collection[KeyPath] = (), *, elsewhere: bool = False) -> None:
        self.elsewhere = elsewhere
        self._data = data
        self._wrong = wrong

    def __getitem__(self, path: str) -> Any:
        key = as_path(path)
        if any(key[: len(bad)] == bad or bad[: len(key)] == key for bad in self._wrong):
            raise UnusableField
        try:
            return get(self._data, key)
        except KeyError as error:
            raise UnusableField from error

    def given(self, path: str) -> bool:
        """Whether a section or field is set; its content may be invalid."""
        key = as_path(path)
        if any(key[: len(bad)] == bad for bad in self._wrong):
            raise UnusableField
        try:
            return get(self._data, key) is not None
        except KeyError as error:
            raise UnusableField from error


Rule = Callable[[FieldView], Iterator[Problem]]
_RULES: list[Rule] = []


def find_problems(view: FieldView, rules: Iterable[Rule] = _RULES) -> list[Problem]:
    """The problems that rules report; by default, the rules of this module."""
    problems: list[Problem] = []
    for rule in rules:
        try:
            problems.extend(rule(view))
        except UnusableField:
            continue
    return problems


def _rule(function: Rule) -> Rule:
    _RULES.append(function)
    return function


def _at(path: str, text: str) -> Problem:
    return Problem(path=as_path(path), text=text)


@_rule
def _one_quantization(view: FieldView) -> Iterator[Problem]:
    if view["quantization.load_in_4bit"] and view["quantization.load_in_8bit"]:
        yield _at("quantization.load_in_8bit", "is true, but load_in_4bit is true too (its default); set one to false")


@_rule
def _steps_or_epochs(view: FieldView) -> Iterator[Problem]:
    steps, epochs = view["training.max_steps"], view["training.num_train_epochs"]
    if steps is None and epochs is None:
        yield _at("training", "must have max_steps or num_train_epochs, has neither")
    elif steps is not None and epochs is not None:
        text = f"is {show(epochs)}, but max_steps is {show(steps)}; give one of the two"
        yield _at("training.num_train_epochs", text)


@_rule
def _warmup_within_steps(view: FieldView) -> Iterator[Problem]:
    steps, warmup = view["training.max_steps"], view["training.warmup_steps"]
    if steps is not None and warmup > steps:
        text = f"must be at most max_steps ({show(steps)}), got {show(warmup)}; below 1 it is a share of all steps"
        yield _at("training.warmup_steps", text)


_SCHEDULE_ARGUMENTS = {
    "cosine": {"num_cycles"},
    "cosine_with_min_lr": {"min_lr", "min_lr_rate", "num_cycles"},
    "warmup_stable_decay": {
        "num_decay_steps", "num_stable_steps", "min_lr_ratio", "warmup_type", "decay_type", "num_cycles",
    },
}  # fmt: skip


@_rule
def _schedule_arguments(view: FieldView) -> Iterator[Problem]:
    kind, section = view["training.lr_scheduler_type"], "training.lr_scheduler_kwargs"
    given = {name for name in LrSchedulerSpec.model_fields if view[f"{section}.{name}"] is not None}
    allowed = _SCHEDULE_ARGUMENTS.get(kind, set())
    for name in sorted(given - allowed):
        what = f"has {', '.join(sorted(allowed))}" if allowed else "has no arguments"
        yield _at(f"{section}.{name}", f"is no argument of lr_scheduler_type: {kind}, which {what}")
    if kind == "cosine_with_min_lr" and len(given & {"min_lr", "min_lr_rate"}) != 1:
        yield _at("training.lr_scheduler_type", f"is {kind}: give {section} either min_lr or min_lr_rate")
    if kind == "warmup_stable_decay" and "num_decay_steps" not in given:
        yield _at("training.lr_scheduler_type", f"is {kind}: give {section}.num_decay_steps")
    peak, least = view["training.learning_rate"], view[f"{section}.min_lr"]
    if least is not None and least > peak:
        yield _at(f"{section}.min_lr", f"must be at most learning_rate ({show(peak)}), got {show(least)}")


@_rule
def _best_needs_evaluations(view: FieldView) -> Iterator[Problem]:
    if not view.given("register") or view["register.checkpoint"] != "best":
        return
    yield from _needs_evaluations(view, "register.checkpoint", "is best", "or last")


@_rule
def _patience_needs_evaluations(view: FieldView) -> Iterator[Problem]:
    if view["training.early_stopping_patience"] is not None:
        yield from _needs_evaluations(view, "training.early_stopping_patience", "is set", "or null")
    elif view["training.early_stopping_threshold"] > 0:
        text = "has no effect without training.early_stopping_patience; give that too, or remove it"
        yield _at("training.early_stopping_threshold", text)


def _needs_evaluations(view: FieldView, path: str, given: str, otherwise: str) -> Iterator[Problem]:
    """The problems of a setting that uses evaluations during training."""
    every, steps = view["training.eval_steps"], view["training.max_steps"]
    if not view.given("dataset.eval"):
        yield _at(path, f"{given}, which needs evaluation rows: give dataset.eval")
    primary = view["evaluation.primary_metric"]
    if primary in keys_of(_usable_metrics(view)) and not depends_on_tokenizer(primary):
        yield _at(
            path,
            f"{given}, but during training only {', '.join(sorted(TOKENIZER_DEPENDENT))} are measured, not {primary}: "
            f"use one of these as evaluation.primary_metric, {otherwise}",
        )
    if every is None:
        yield _at(path, f"{given}, which needs evaluations during training: give training.eval_steps")
    elif steps is not None and every > steps:
        yield _at("training.eval_steps", f"must be at most max_steps ({show(steps)}), got {show(every)}")


@_rule
def _alias_is_free(view: FieldView) -> Iterator[Problem]:
    if not view.given("register") or (alias := view["register.alias"]) is None:
        return
    if alias.lower() == "latest" or re.fullmatch(r"[vV]\d+", alias):
        yield _at("register.alias", f"must not be latest or v1, v2, ..., which MLflow reserves, got {show(alias)}")
    if not view.given("dataset.eval"):
        yield _at("register.alias", "goes to the best arm, which needs evaluation rows: give dataset.eval")


@_rule
def _metrics_are_known(view: FieldView) -> Iterator[Problem]:
    for index, metric in enumerate(view["evaluation.metrics"]):
        if metric in METRIC_KEYS:
            continue
        place: KeyPath = ("evaluation", "metrics", index)
        names = known_names()
        if metric not in names:
            hint = did_you_mean(metric, names) or "; to use a metric of another package, install that package"
            yield Problem(path=place, text=f"must be {_or(names)}, got {show(metric)}{hint}")
            continue
        try:
            metric_facts(metric)
        except ConfigError as error:
            yield Problem(path=place, text=f"cannot be used: {error}")


def _usable_metrics(view: FieldView) -> Sequence[str]:
    """The listed metrics, if all of them are known and usable."""
    metrics: Sequence[str] = view["evaluation.metrics"]
    if any(True for _ in _metrics_are_known(view)):
        raise UnusableField
    return metrics


def _or(names: Sequence[str]) -> str:
    return f"{', '.join(names[:-1])} or {names[-1]}"


def _eval_labels(view: FieldView) -> list[str]:
    """The labels of the sources that evaluation rows are from."""
    listed = view["dataset.eval"]
    if isinstance(listed, dict):
        listed = view["dataset.train"]
    return [_label_of(source) for source in listed] if isinstance(listed, list | tuple) else []


def _label_of(source: dict[str, Any]) -> str:
    return DataSource.model_validate(source).named


@_rule
def _primary_metric_is_produced(view: FieldView) -> Iterator[Problem]:
    metrics = _usable_metrics(view)
    key, produced = view["evaluation.primary_metric"], (*keys_of(metrics), *source_keys(metrics, _eval_labels(view)))
    if key not in produced:
        text = f"must be a key that evaluation.metrics produce ({', '.join(produced)}), got {show(key)}"
        yield _at("evaluation.primary_metric", text + did_you_mean(key, produced))


@_rule
def _promotion_reads_means(view: FieldView) -> Iterator[Problem]:
    # Promotion compares means over examples; perplexity is not one.
    metrics = _usable_metrics(view)
    produced = (*means_of(metrics), *source_keys(metrics, _eval_labels(view)))
    wanted = [("promotion.metric", view["promotion.metric"])] if view.given("promotion.metric") else []
    wanted += [("promotion.max_regression", key) for key in view["promotion.max_regression"]]
    for path, key in wanted:
        if key not in produced:
            text = f"must be a mean that evaluation.metrics produce ({', '.join(produced)}), got {show(key)}"
            yield _at(path, text + did_you_mean(key, produced))


@_rule
def _answer_reads_a_mean(view: FieldView) -> Iterator[Problem]:
    if not view.given("answer"):
        return
    if not view.given("dataset.eval"):
        yield _at("answer", "compares ranks on evaluation rows: give dataset.eval")
    # The margin is in the unit of what is tested, a mean over rows; perplexity is not one.
    key, means = view["evaluation.primary_metric"], means_of(_usable_metrics(view))
    if key in keys_of(view["evaluation.metrics"]) and key not in means:
        text = f"must be a mean over rows for an answer ({', '.join(means)}), got {show(key)}"
        yield _at("evaluation.primary_metric", text)


@_rule
def _looks_in_order(view: FieldView) -> Iterator[Problem]:
    if not view.given("answer"):
        return
    first, most = view["answer.seeds.first"], view["answer.seeds.most"]
    if most < first:
        yield _at("answer.seeds.most", f"must be at least first ({show(first)}), got {show(most)}")


@_rule
def _metrics_are_different(view: FieldView) -> Iterator[Problem]:
    seen: set[str] = set()
    for index, metric in enumerate(view["evaluation.metrics"]):
        if metric in seen:
            yield Problem(path=("evaluation", "metrics", index), text=f"{show(metric)} is listed twice; remove one")
        seen.add(metric)


@_rule
def _rows_become_text(view: FieldView) -> Iterator[Problem]:
    messages, prompt, completion = view["dataset.messages"], view["dataset.prompt"], view["dataset.completion"]
    if messages is not None:
        for key, value in (("prompt", prompt), ("completion", completion)):
            if value is not None:
                yield _at(
                    f"dataset.{key}",
                    f"cannot be combined with messages ({show(messages)}); give messages, or both templates",
                )
    elif prompt is not None and completion is None:
        yield _at("dataset.completion", "is missing; prompt needs it")
    elif completion is not None and prompt is None and view["dataset.format"] != "text":
        yield _at("dataset.prompt", "is missing; completion needs it")


@_rule
def _rendering_1_has_no_later_settings(view: FieldView) -> Iterator[Problem]:
    if view["dataset.rendering"] != 1:
        return
    for name in READING:
        path = f"dataset.{name}"
        if plain(view[path]) != plain(DatasetSpec.model_fields[name].get_default(call_default_factory=True)):
            yield _at(path, "needs dataset.rendering: 2; with 1 rows are read as releases up to 0.2 did")


@_rule
def _encoding_is_known(view: FieldView) -> Iterator[Problem]:
    encoding = view["dataset.encoding"]
    try:
        "".encode(encoding)
    except (LookupError, ValueError):
        text = f"must be a text encoding that Python knows (utf-8, cp1252, utf-16, ...), got {show(encoding)}"
        yield _at("dataset.encoding", text + did_you_mean(encoding, ("utf-8", "utf-16", "latin-1", "cp1252")))


@_rule
def _delimiter_separates(view: FieldView) -> Iterator[Problem]:
    delimiter = view["dataset.delimiter"]
    if delimiter is not None and delimiter in '"\r\n\0':
        yield _at("dataset.delimiter", f"must not be a quote or a line break, got {show(delimiter)}")


@_rule
def _prompt_is_a_template(view: FieldView) -> Iterator[Problem]:
    yield from _template("dataset.prompt", view["dataset.prompt"])


@_rule
def _completion_is_a_template(view: FieldView) -> Iterator[Problem]:
    yield from _template("dataset.completion", view["dataset.completion"])


def _template(path: str, text: str | None) -> Iterator[Problem]:
    """Check the syntax of a template; its columns are checked when the data is read."""
    try:
        fields = list(string.Formatter().parse(text or ""))
    except ValueError as error:
        yield _at(path, f"is not a template ({error}), got {show(text)}; write a literal brace twice")
        return
    for _, name, spec, conversion in fields:
        if name is not None and (not name or name.isdigit() or conversion or "{" in (spec or "")):
            yield _at(path, f"must have fields such as {{column}} or {{column:.2f}} only, got {show(text)}")
            return


@_rule
def _chat_template_is_there(view: FieldView) -> Iterator[Problem]:
    template = view["dataset.chat_template"]
    pin = view["dataset.chat_template_revision"]
    if template is None or template in BUILT_IN_TEMPLATES:
        if pin is not None:
            yield _at("dataset.chat_template_revision", "is the pin of a template file, but chat_template names none")
        return
    if not os.path.isfile(template):
        hint = did_you_mean(os.path.basename(template), BUILT_IN_TEMPLATES)
        text = f"must be chatml, plain, or a Jinja file; there is no file {template}{hint}"
        yield _at("dataset.chat_template", text)
        return
    try:
        actual = file_pin(template)
    except OSError as error:
        yield _at("dataset.chat_template", f"{template} cannot be read: {error.strerror}")
        return
    if pin is not None and actual != pin:
        text = f"does not match {template}, which has {actual}; remove the pin or restore the file"
        yield _at("dataset.chat_template_revision", text)


def file_pin(path: str) -> str:
    """The pin of a small file: the digest of its content.

    Raises:
        OSError: The file cannot be read.
    """
    return content_digest(Path(path).read_bytes())


def _source(path: str, text: str) -> tuple[Source | None, list[Problem]]:
    try:
        return parse_source(text), []
    except ValueError as error:
        return None, [_at(path, str(error))]


def _pin(path: str, source: Source | None, revision: str | None) -> Iterator[Problem]:
    if source is None or revision is None:
        return
    try:
        check_revision(source, revision)
    except ValueError as error:
        yield _at(path, str(error))


@_rule
def _base_is_a_source(view: FieldView) -> Iterator[Problem]:
    text = view["base_model"]
    source, problems = _source("base_model", text)
    yield from problems
    yield from _pin("base_model_revision", source, view["base_model_revision"])
    if isinstance(source, PypiSource) and not source.member.lower().endswith(".gguf"):
        yield _at("base_model", f"must name a .gguf file of the wheel, got {show(source.member)}")
    if isinstance(source, LocalSource):
        path = os.path.expanduser(source.path)
        if os.path.isfile(path) and not path.lower().endswith(".gguf"):
            yield _at("base_model", f"must be a directory or a .gguf file, got the file {show(text)}")
        elif os.path.isdir(path) and not os.path.isfile(os.path.join(path, "config.json")):
            yield _at("base_model", f"must be a directory with a model's config.json, {show(text)} has none")
        elif not view.elsewhere and not os.path.exists(path) and view["base_model_config"] is None:
            yield _at("base_model", f"there is no file or directory {text}; to plan without it, set base_model_config")


@_rule
def _base_config_is_there(view: FieldView) -> Iterator[Problem]:
    config = view["base_model_config"]
    if config is None:
        return
    if not os.path.isfile(config):
        yield _at("base_model_config", f"must be a config.json; there is no file {config}")
        return
    try:
        content = read_config(Path(config))
    except ValueError as error:
        yield _at("base_model_config", str(error))
        return
    if "model_type" not in content:
        yield _at("base_model_config", f"must be a model's config.json; {config} has no model_type")


@_rule
def _training_rows_have_a_source(view: FieldView) -> Iterator[Problem]:
    train = view["dataset.train"]
    if isinstance(train, str):
        yield from _data(view, "dataset.train", train)
        return
    yield from _listed_sources(view, "train", train)
    yield from _weights(train)


def _weights(sources: list[dict[str, Any]]) -> Iterator[Problem]:
    weighted = [source.get("weight") is not None for source in sources]
    for place, source in enumerate(sources):
        here: KeyPath = ("dataset", "train", place)
        if weighted[place] and source.get("rows") is not None:
            yield Problem(path=(*here, "rows"), text=f"is {show(source['rows'])}, but weight is given too; remove one")
        elif any(weighted) and not weighted[place] and source.get("rows") is None:
            text = "has no weight, but other sources have one; give it weight, or rows (a fixed number)"
            yield Problem(path=here, text=text)


def _listed_sources(view: FieldView, side: str, sources: list[dict[str, Any]]) -> Iterator[Problem]:
    """Problems of the sources of a list."""
    if (pin := view[f"dataset.{side}_revision"]) is not None:
        text = f"is {show(pin)}, but dataset.{side} is a list; give each of its sources a revision"
        yield _at(f"dataset.{side}_revision", text)
    if view["dataset.rendering"] == 1:
        yield _at(f"dataset.{side}", "is a list of sources, which needs rendering 2; remove dataset.rendering")
    labels: dict[str, int] = {}
    for place, source in enumerate(sources):
        here: KeyPath = ("dataset", side, place)
        parsed, problems = _source(f"dataset.{side}", source["source"])
        yield from (Problem(path=(*here, "source"), text=problem.text) for problem in problems)
        for problem in _pin(f"dataset.{side}_revision", parsed, source.get("revision")):
            yield Problem(path=(*here, "revision"), text=problem.text)
        for problem in _table(view, f"dataset.{side}", source["source"], parsed):
            yield Problem(path=(*here, "source"), text=problem.text)
        if source.get("name") is not None and parsed is not None and not isinstance(parsed, HubSource):
            text = f"is a configuration of a hub dataset, got {show(source['name'])} for a file"
            yield Problem(path=(*here, "name"), text=text)
        if source.get("messages") is not None and (source.get("prompt") or source.get("completion")) is not None:
            text = f"is {show(source['messages'])}, but prompt or completion is given too; give one form"
            yield Problem(path=(*here, "messages"), text=text)
        if (source.get("prompt") is None) != (source.get("completion") is None):
            yield Problem(path=here, text="has one of prompt and completion; give both, or neither")
        label = _label_of(source)
        if label in {"n", "stderr"}:
            text = f"must not be {label}, which ends the names of other metrics; give another label"
            yield Problem(path=(*here, "label"), text=text)
        if (first := labels.setdefault(label, place)) != place:
            text = f"is {label}, like that of dataset.{side}[{first}]; give each source a label of its own"
            yield Problem(path=(*here, "label"), text=text)


@_rule
def _evaluation_rows_have_a_source(view: FieldView) -> Iterator[Problem]:
    source, revision = view["dataset.eval"], view["dataset.eval_revision"]
    if isinstance(source, str):
        yield from _data(view, "dataset.eval", source)
    elif isinstance(source, list | tuple):
        yield from _listed_sources(view, "eval", list(source))
        for place, each in enumerate(source):
            if each.get("weight") is not None:
                text = "is for training; evaluation rows count once each: remove it, or choose some of them with rows"
                yield Problem(path=("dataset", "eval", place, "weight"), text=text)
    elif revision is not None:
        reason = "is null" if source is None else "is split from train, which has its own pin"
        yield _at("dataset.eval_revision", f"has no source to pin: dataset.eval {reason}; remove it")


def _data(view: FieldView, path: str, text: str) -> Iterator[Problem]:
    source, problems = _source(path, text)
    yield from problems
    yield from _pin(f"{path}_revision", source, view[f"{path}_revision"])
    yield from _table(view, path, text, source)


def _table(view: FieldView, path: str, text: str, source: Source | None) -> Iterator[Problem]:
    if text.lower().endswith(".gguf"):
        yield _at(path, f"must be a table of rows, got the model file {show(text)}")
    elif view.elsewhere:
        return
    elif isinstance(source, LocalSource) and not os.path.exists(os.path.expanduser(source.path)):
        yield _at(path, f"there is no file or directory {text}")


@_rule
def _configuration_name_is_for_the_hub(view: FieldView) -> Iterator[Problem]:
    if view["dataset.name"] is None:
        return
    texts: list[str] = []
    for value in (view["dataset.train"], view["dataset.eval"]):
        if isinstance(value, str):
            texts.append(value)
        elif isinstance(value, list | tuple):
            texts += [source["source"] for source in value]
    kinds = [_source("dataset.train", text)[0] for text in texts]
    if all(kind is not None and not isinstance(kind, HubSource) for kind in kinds):
        yield _at("dataset.name", f"is a configuration of a hub dataset, got {show(view['dataset.name'])} for a file")


@_rule
def _targets_are_linear_modules(view: FieldView) -> Iterator[Problem]:
    modules = view["lora.target_modules"]
    if isinstance(modules, str):
        return
    usable = []
    for name in modules:
        if name.rpartition(".")[2] in NOT_TARGETS:
            text = (
                f"must not have embeddings or the output layer, got {show(name)}; use linear layers inside the blocks"
            )
            yield _at("lora.target_modules", text)
        else:
            usable.append(name)
    yield from _known_targets(view, usable)


def _known_targets(view: FieldView, names: list[str]) -> Iterator[Problem]:
    source, _ = _source("base_model", view["base_model"])
    config = view["base_model_config"]
    base = Path(os.path.expanduser(source.path)) if isinstance(source, LocalSource) else None
    try:
        known = known_modules(base if base and os.path.isdir(base) else None, Path(config) if config else None)
    except ValueError as error:
        # Another rule reports an invalid base_model_config.
        if config is None:
            yield _at("base_model", str(error))
        return
    if known is None:
        return
    modules, origin = known
    for name in names:
        # peft matches whole name parts from the end, so the last part decides: self_attn.q_proj is a q_proj.
        last = name.rpartition(".")[2]
        if last not in modules:
            text = (
                f"has the unknown module {show(name)}{did_you_mean(last, modules)}; {origin} has {', '.join(modules)}"
            )
            yield _at("lora.target_modules", text)


def sweep_problems(view: FieldView) -> list[Problem]:
    """The problems of a sweep section in relation to the rest of the definition."""
    return find_problems(view, _SWEEP_RULES)


def _results_need_rows(view: FieldView) -> Iterator[Problem]:
    if view["sweep.method"] == "tpe" and not view.given("dataset.eval"):
        text = "is tpe, which proposes arms from results on evaluation rows: give dataset.eval"
        yield Problem(path=("sweep", "method"), text=text)


def _rungs_need_rows(view: FieldView) -> Iterator[Problem]:
    if view.given("sweep.early_stopping") and not view.given("dataset.eval"):
        text = "compares arms on evaluation rows: give dataset.eval"
        yield Problem(path=("sweep", "early_stopping"), text=text)


def _rungs_choose_nothing(view: FieldView) -> Iterator[Problem]:
    """Rungs must not add evaluations that choose the best checkpoint: the spec hash does not cover rungs."""
    if not view.given("sweep.early_stopping") or not view.given("register") or view["register.checkpoint"] != "best":
        return
    first, every = view["sweep.early_stopping.min_steps"], view["training.eval_steps"]
    if every is not None and first % every:
        text = f"must be a multiple of training.eval_steps ({show(every)}) with register.checkpoint: best, "
        text += f"got {show(first)}; otherwise the rung would be an additional candidate for the best checkpoint"
        yield Problem(path=("sweep", "early_stopping", "min_steps"), text=text)


def _evaluation_is_the_same(view: FieldView) -> Iterator[Problem]:
    """Arms with other sources need evaluation rows that are not split off these."""
    if not isinstance(view["dataset.eval"], dict):
        return
    axes: list[tuple[KeyPath, str]] = [(("sweep", "parameters", path), path) for path in view["sweep.parameters"]]
    axes += [(("sweep", "arms", place, path), path) for place, arm in enumerate(view["sweep.arms"]) for path in arm]
    for place, path in axes:
        if path == "dataset.train" or is_source(path):
            text = "needs evaluation rows that are the same for all arms: set dataset.eval to a source of its own, "
            yield Problem(path=place, text=text + "instead of a split of train")


def _tuned_fields_are_swept(view: FieldView) -> Iterator[Problem]:
    if not view.given("answer"):
        return
    swept = [*view["sweep.parameters"], *(path for arm in view["sweep.arms"] for path in arm)]
    axes = [path for path in dict.fromkeys(swept) if path not in {"lora.r", "seed"}]
    listed: set[str] = set()
    for index, path in enumerate(view["answer.tune"]):
        place: KeyPath = ("answer", "tune", index)
        if path in {"lora.r", "seed"}:
            text = f"must not have {path}: ranks are what is compared, and seeds are what repeats it"
            yield Problem(path=place, text=text)
        elif path not in swept:
            known = f"; the sweep has {', '.join(axes)}" if axes else ""
            text = f"must be a field that the sweep varies, got {show(path)}{did_you_mean(path, axes)}{known}"
            yield Problem(path=place, text=text)
        elif path in listed:
            yield Problem(path=place, text=f"{show(path)} is listed twice; remove one")
        listed.add(path)


_SWEEP_RULES: tuple[Callable[[FieldView], Iterator[Problem]], ...] = (
    _results_need_rows,
    _rungs_need_rows,
    _rungs_choose_nothing,
    _evaluation_is_the_same,
    _tuned_fields_are_swept,
)


def rung_problems(stopping: EarlyStoppingSpec | None, arms: Sequence[ArmSpec]) -> list[Problem]:
    """Problems if no rung prunes an arm, or no arm reaches a rung; with epochs that depends on the rows."""
    if stopping is None or not arms:
        return []
    problems = []
    place = ("sweep", "early_stopping")
    configurations = len({arm.configuration for arm in arms})
    if configurations == 1 and len(arms) > 1:
        text = "compares means over seeds, but the arms differ only in the seed; remove it, or sweep another field"
        problems.append(Problem(path=place, text=text))
    elif configurations <= stopping.finalists and stopping.finalists > 1:
        text = f"must be less than the number of configurations ({configurations:,}), or no arm is pruned, "
        problems.append(Problem(path=(*place, "finalists"), text=f"{text}got {show(stopping.finalists)}"))
    known = [arm.training.max_steps for arm in arms if arm.training.max_steps is not None]
    if len(known) == len(arms) and stopping.min_steps >= max(known):
        text = f"must be less than max_steps ({show(max(known))}), or no arm reaches a rung, "
        problems.append(Problem(path=(*place, "min_steps"), text=f"{text}got {show(stopping.min_steps)}"))
    return problems


def rung_advice(stopping: EarlyStoppingSpec | None, arms: Sequence[ArmSpec]) -> list[str]:
    """Advice on settings that are valid but hardly useful, one sentence each."""
    if stopping is None:
        return []
    warming = [warmup for arm in arms if (warmup := _warmup(arm)) is not None and warmup >= stopping.min_steps]
    if not warming:
        return []
    which = "all arms" if len(warming) == len(arms) else f"{len(warming):,} of {len(arms):,} arms"
    return [
        f"sweep.early_stopping.min_steps: the first rung, at step {stopping.min_steps:,}, is within the warmup of "
        f"{which} ({max(warming):,} steps), when arms have hardly learned anything; choose a later step"
    ]


def _warmup(arm: ArmSpec) -> int | None:
    """Warmup steps; None if they are a share of epochs, which depend on the rows."""
    training = arm.training
    if training.max_steps is None and training.warmup_steps < 1:
        return None
    return training.warmup(training.max_steps or 0)


def adds_seeds(spec: ExperimentSpec, arms: Sequence[ArmSpec]) -> bool:
    """Whether seeds are trained on demand: there is an `answer` section, several ranks, and nothing else sets seeds."""
    sweep = spec.sweep
    swept = {*sweep.parameters, *(path for arm in sweep.arms for path in arm)}
    return (
        spec.answer is not None
        and "seed" not in swept
        and sweep.method not in SEARCHES
        and sweep.early_stopping is None
        and len({arm.lora.r for arm in arms}) > 1
    )

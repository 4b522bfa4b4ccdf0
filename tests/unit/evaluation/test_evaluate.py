"""Mixed batches against each row alone, through peft's own forward and all logits."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.adapted import attach, load_tiny

from rankwise.data.rows import Example
from rankwise.data.template import Renderer
from rankwise.data.tokens import Encoded, encode
from rankwise.evaluation import evaluate as module
from rankwise.evaluation.evaluate import evaluate, prediction_rows
from rankwise.experiment.schema import EvaluationSpec
from rankwise.modeling.lora.logits import SupervisedLogits
from rankwise.modeling.lora.packed import install, uninstall

ADAPTERS = ["a", None, "b"]
ROWS = [
    ("How much is this diamond? carat 0.23, cut Ideal", "Price is $326"),
    ("carat 0.23", "Price is $1000"),
    ("How much?", "5"),
    ("color E, clarity SI2, 0 1 2 3 4 5", "Price is $20"),
    ("E", "Price is $9, or $10, or $100, or $1000 is it"),
]


@pytest.fixture(scope="module", params=["llama", "gpt_neox", "llama-4bit"])
def base(request, tmp_path_factory):
    architecture, _, bits = request.param.partition("-")
    loaded = load_tiny(tmp_path_factory.mktemp("base"), architecture, load_in_4bit=bits == "4bit")
    attach(loaded.model, "a", r=4, seed=1, scale=0.2)
    attach(loaded.model, "b", r=2, seed=2, scale=0.2)
    return loaded


@pytest.fixture(scope="module")
def renderer(base):
    return Renderer.create(base.tokenizer)


@pytest.fixture(scope="module")
def examples(renderer):
    made = []
    for index, (prompt, completion) in enumerate(ROWS):
        user = {"role": "user", "content": prompt}
        (text,) = renderer.texts([(user,)], add_generation_prompt=True)
        messages = (user, {"role": "assistant", "content": completion})
        made.append(Example(id=f"row-{index}", messages=messages, prompt=text, completion=completion))
    return made


@pytest.fixture(scope="module")
def encoded(examples, renderer):
    return encode(examples, renderer, 128)


def echo(token_ids, adapters):
    """A generator that says which adapter was asked, and with how many tokens."""
    return [
        SimpleNamespace(text=f"{adapter} ${len(ids)}", finish_reason="stop")
        for ids, adapter in zip(token_ids, adapters, strict=True)
    ]


def alone(base, adapter, row):
    """Loss sum, count and hits of one row from all of the model's logits, without routing."""
    from peft.tuners.lora import LoraLayer

    uninstall(base.model)
    layers = [each for each in base.model.modules() if isinstance(each, LoraLayer)]
    for layer in layers:
        layer.enable_adapters(adapter is not None)
        if adapter is not None:
            layer.set_adapter(adapter)
    ids = torch.from_numpy(row.input_ids.astype("int64"))
    with torch.no_grad():
        predicted = base.model(ids.unsqueeze(0)).logits[0, :-1].double().log_softmax(-1)
    wanted = torch.from_numpy(row.supervised[1:].copy())
    targets = ids[1:][wanted]
    losses = -predicted[wanted].gather(1, targets.unsqueeze(1))
    hits = (predicted[wanted].argmax(-1) == targets).sum()
    base.model.requires_grad_(False)
    for layer in layers:
        layer.enable_adapters(True)
    install(base.model)
    return float(losses.sum()), len(targets), int(hits)


SPEC = EvaluationSpec(metrics=("loss", "token_accuracy"), per_device_eval_batch_size=2)


def test_every_row_of_a_mixed_batch_gets_what_it_gets_alone(base, examples, encoded):
    evaluations = evaluate(base, ADAPTERS, examples, encoded, SPEC)
    assert list(evaluations) == ADAPTERS
    for adapter, evaluation in evaluations.items():
        expected = [alone(base, adapter, row) for row in encoded]
        for observation, (loss_sum, tokens, hits) in zip(evaluation.observations, expected, strict=True):
            assert observation.loss_sum == pytest.approx(loss_sum, rel=1e-4)
            assert (observation.tokens, observation.correct_tokens) == (tokens, hits)
        total = sum(loss_sum for loss_sum, _, _ in expected) / sum(tokens for _, tokens, _ in expected)
        assert evaluation.metrics["eval.loss"].value == pytest.approx(total, rel=1e-4)
        assert evaluation.metrics["eval.loss"].n == len(examples)
    assert len({round(evaluation.metrics["eval.loss"].value, 3) for evaluation in evaluations.values()}) == 3


def sizes_of_batches(monkeypatch):
    sizes = []
    forward = module._forward
    monkeypatch.setattr(module, "_forward", lambda *args: sizes.append(len(args[3])) or forward(*args))
    return sizes


@pytest.mark.parametrize(("name", "limit"), [("MAX_ROWS", 1), ("MAX_LOGITS", 1)])
def test_limits_on_memory_change_the_batches_and_not_the_result(base, examples, encoded, monkeypatch, name, limit):
    sizes = sizes_of_batches(monkeypatch)
    free = evaluate(base, ADAPTERS, examples, encoded, SPEC)
    assert sizes == [6, 6, 3], "two rows of each adapter"
    sizes.clear()
    monkeypatch.setattr(module, name, limit)
    bound = evaluate(base, ADAPTERS, examples, encoded, SPEC)
    assert sizes == [1] * len(ADAPTERS) * len(examples)
    for adapter in ADAPTERS:
        assert bound[adapter].metrics["eval.loss"].value == pytest.approx(
            free[adapter].metrics["eval.loss"].value, rel=1e-4
        )


def test_a_base_that_needs_all_logits_computed_gives_the_same_loss(base, examples, encoded, monkeypatch):
    longest = max(len(row.input_ids) for row in encoded)
    monkeypatch.setattr(module, "MAX_LOGITS", 2 * longest * base.model.get_input_embeddings().weight.shape[0])
    sizes = sizes_of_batches(monkeypatch)
    expected = evaluate(base, ADAPTERS, examples, encoded, SPEC)
    assert sizes[0] > 2, "only the logits of supervised tokens count"
    sizes.clear()
    monkeypatch.setattr(SupervisedLogits, "_is_direct", lambda self: False)
    got = evaluate(base, ADAPTERS, examples, encoded, SPEC)
    assert sizes[0] == 2, "the logits of all tokens count"
    for adapter in ADAPTERS:
        value = expected[adapter].metrics["eval.loss"].value
        assert got[adapter].metrics["eval.loss"].value == pytest.approx(value, rel=1e-5)


def test_generations_go_to_the_row_and_the_adapter_that_they_were_made_for(base, examples, encoded):
    spec = EvaluationSpec(metrics=("exact_match", "number"))
    evaluations = evaluate(base, ADAPTERS, examples, encoded, spec, generate=echo)
    for adapter, evaluation in evaluations.items():
        lengths = [len(base.tokenizer(each.prompt, add_special_tokens=False)["input_ids"]) for each in examples]
        assert [each.prediction for each in evaluation.observations] == [f"{adapter} ${length}" for length in lengths]
        assert {each.finish_reason for each in evaluation.observations} == {"stop"}
    assert evaluations["a"].metrics["eval.exact_match"].value == 0.0


def test_generations_are_asked_for_only_if_a_metric_needs_them(base, examples, encoded):
    def never(token_ids, adapters):
        raise AssertionError("asked")

    evaluation = evaluate(base, [None], examples, encoded, SPEC, generate=never)[None]
    assert {each.prediction for each in evaluation.observations} == {None}


def test_metrics_that_need_generations_ask_for_a_generator(base, examples, encoded):
    with pytest.raises(ValueError, match="metrics exact_match need generations: pass generate="):
        evaluate(base, [None], examples, encoded, EvaluationSpec(metrics=("loss", "exact_match")))


def test_an_example_that_did_not_fit_counts_for_generations_only(base, examples, encoded):
    spec = EvaluationSpec(metrics=("loss", "exact_match"))
    evaluation = evaluate(base, ["a"], examples, encoded[1:], spec, generate=echo)["a"]
    assert evaluation.metrics["eval.loss"].n == len(examples) - 1
    assert evaluation.metrics["eval.exact_match"].n == len(examples)


def test_rows_without_a_supervised_token_have_no_loss(base, examples, encoded):
    silent = [Encoded(id=row.id, input_ids=row.input_ids, supervised=np.zeros_like(row.supervised)) for row in encoded]
    evaluation = evaluate(base, ["a"], examples, silent, SPEC)["a"]
    assert evaluation.metrics["eval.loss"].value is None
    assert evaluation.metrics["eval.loss"].n == 0


def test_no_examples_give_metrics_without_values(base):
    spec = EvaluationSpec(metrics=("loss", "number"))
    evaluation = evaluate(base, ["a", None], [], [], spec, generate=echo)["a"]
    assert {metric.n for metric in evaluation.metrics.values()} == {0}


def test_tokens_of_foreign_examples_are_refused(base, examples, encoded):
    with pytest.raises(ValueError, match="1 encoded rows belong to none of the 4 examples, row-0 first"):
        evaluate(base, [None], examples[1:], encoded, SPEC)


def test_an_adapter_that_is_not_attached_is_refused(base, examples, encoded):
    with pytest.raises(ValueError, match="the model has no adapter c; it has a, b"):
        evaluate(base, ["c"], examples, encoded, SPEC)


def test_a_diverged_adapter_has_no_loss_and_harms_no_neighbour(base, examples, encoded):
    expected = evaluate(base, ["b"], examples, encoded, SPEC)["b"]
    attach(base.model, "broken", seed=3)
    with torch.no_grad():
        for name, parameter in base.model.named_parameters():
            if ".broken." in name:
                parameter.fill_(float("nan"))
    evaluations = evaluate(base, ["b", "broken"], examples, encoded, SPEC)
    assert evaluations["broken"].metrics["eval.loss"].value is None
    assert evaluations["broken"].metrics["eval.loss"].n == len(examples)
    assert evaluations["b"].metrics["eval.loss"].value == pytest.approx(expected.metrics["eval.loss"].value, rel=1e-4)


def test_the_table_of_predictions_has_a_row_per_example_and_can_leave_texts_out(base, examples, encoded):
    names = ("loss", "number")
    evaluation = evaluate(base, ["a"], examples, encoded, EvaluationSpec(metrics=names), generate=echo)["a"]
    rows = prediction_rows(evaluation, names)
    assert [row["id"] for row in rows] == [example.id for example in examples]
    assert rows[0]["reference"] == "Price is $326"
    assert rows[0]["prediction"].startswith("a $")
    assert rows[0]["eval.loss"] == pytest.approx(
        evaluation.observations[0].loss_sum / evaluation.observations[0].tokens
    )
    bare = prediction_rows(evaluation, names, log_examples=False)
    assert not {"prompt", "reference", "prediction"} & set(bare[0])
    assert not any(text in str(bare) for pair in ROWS for text in pair if len(text) > 3)
    assert [row["eval.mean_absolute_error"] for row in bare] == [row["eval.mean_absolute_error"] for row in rows]


def test_a_user_column_reaches_the_observation(base, examples, encoded):
    tagged = [replace(example, columns={"carat": index}) for index, example in enumerate(examples)]
    observations = evaluate(base, [None], tagged, encoded, SPEC)[None].observations
    assert [observation.columns["carat"] for observation in observations] == list(range(len(examples)))


def test_a_conversation_in_several_rows_is_one_measurement(base, examples, encoded):
    first, second = encoded[0], encoded[1]
    merged = [replace(second, id=first.id), *encoded[2:], first]
    rest = [example for example in examples if example.id != second.id]
    alone = evaluate(base, ["a"], examples, encoded, SPEC)["a"].observations
    observations = evaluate(base, ["a"], rest, merged, SPEC)["a"].observations
    assert len(observations) == len(rest)
    assert observations[0].tokens == alone[0].tokens + alone[1].tokens
    assert observations[0].loss_sum == pytest.approx(alone[0].loss_sum + alone[1].loss_sum, rel=1e-4)
    assert observations[0].correct_tokens == alone[0].correct_tokens + alone[1].correct_tokens


def test_metrics_compare_what_follows_a_thought(base, examples, encoded):
    thoughtful = [replace(example, completion=f"<think>\n7\n</think>\n\n{example.completion}") for example in examples]

    def think(token_ids, adapters):
        texts = [f"\n</think>\n\n{example.completion}" for example in examples]
        return [SimpleNamespace(text=text, finish_reason="stop") for text in texts]

    spec = EvaluationSpec(metrics=("exact_match",))
    result = evaluate(base, ["a"], thoughtful, encoded, spec, generate=think)["a"]
    assert result.metrics["eval.exact_match"].value == 1.0
    assert [each.reference for each in result.observations] == [example.completion for example in examples]


def test_documents_are_measurements_of_their_own(base, examples, encoded):
    documents = [Example(id=each.id, messages=(), prompt="", completion="x") for each in examples]
    result = evaluate(base, ["a"], documents, encoded, SPEC)["a"]
    assert len({each.cluster for each in result.observations}) == len(documents)
    assert result.metrics["eval.loss"].stderr is not None

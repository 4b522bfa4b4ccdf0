"""Training, scores and answers the way they go on a CUDA GPU, without one: see `helpers.pretend_gpu`."""

from __future__ import annotations

from dataclasses import replace

import bitsandbytes as bnb
import pytest
import torch
from helpers.packs import ROWS, distance, load_tiny, make_arm, read_weights, train
from helpers.pretend_gpu import GPU, pretend_gpu, to_gpu

from rankwise.data.chat import Message
from rankwise.data.rows import Example
from rankwise.evaluation.evaluate import evaluate
from rankwise.experiment.schema import EvaluationSpec
from rankwise.modeling.adapter import load_adapter
from rankwise.modeling.decoding.generation import Decoding
from rankwise.modeling.decoding.scheduler import Prompt, generate
from rankwise.modeling.lora.packed import delete_adapter

pytestmark = pytest.mark.filterwarnings("ignore:User provided device_type of 'cuda', but CUDA is not available")
BASES = {
    "not quantized": {"load_in_4bit": False},
    "4 bit": {},
    "8 bit": {"load_in_4bit": False, "load_in_8bit": True},
}


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """Gives the base of a kind on the CPU and on the pretended GPU; each is loaded once."""
    loaded = {}

    def load(kind, architecture="llama"):
        if (kind, architecture) not in loaded:
            on = tmp_path_factory.mktemp("base")
            cpu, other = (load_tiny(on, architecture, quantization=BASES[kind]) for _ in range(2))
            with pretend_gpu():
                loaded[kind, architecture] = cpu, replace(other, model=to_gpu(other.model), device=GPU)
        return loaded[kind, architecture]

    return load


def arm(seed, kind, *, dropout=0.0, **training):
    return make_arm(
        seed=seed,
        quantization=BASES[kind],
        lora={"r": 4 + 2 * seed, "lora_dropout": dropout, "target_modules": ["q_proj", "down_proj"]},
        training={
            "max_steps": 2,
            "eval_steps": 2,
            "per_device_train_batch_size": 1 + seed,
            "gradient_accumulation_steps": seed,
            **training,
        },
    )


def assert_same(arm, first, second, *, losses=1e-5, weights=1e-4):
    (outcomes, recorder), (others, other) = first, second
    assert recorder.losses(arm.spec_hash) == pytest.approx(other.losses(arm.spec_hash), rel=losses)
    mine, theirs = (each[arm.spec_hash] for each in (outcomes, others))
    assert dict(mine.metrics)["eval.loss"] == pytest.approx(dict(theirs.metrics)["eval.loss"], rel=losses)
    assert distance(read_weights(mine.adapter), read_weights(theirs.adapter)) < weights


@pytest.mark.parametrize(("kind", "checkpointing"), [("not quantized", False), ("4 bit", True)])
def test_a_pack_on_a_gpu_gets_what_it_gets_on_a_cpu(load, tmp_path, kind, checkpointing):
    cpu, gpu = load(kind)
    arms = [arm(seed, kind, gradient_checkpointing=checkpointing) for seed in (1, 2)]
    expected = train(cpu, arms, tmp_path / "cpu")
    with pretend_gpu():
        found = train(gpu, arms, tmp_path / "gpu")
    for each in arms:
        assert_same(each, found, expected)


@pytest.mark.parametrize("kind", ["4 bit", "8 bit"])
def test_masks_that_are_drawn_again_on_a_gpu_are_the_same_alone_and_after_a_stop(load, tmp_path, kind, monkeypatch):
    _, gpu = load(kind)
    for module in gpu.model.modules():
        if isinstance(module, bnb.nn.Linear8bitLt):
            # Outliers of all rows together decide which columns are not rounded to 8 bit.
            monkeypatch.setattr(module.state, "threshold", 0.0)
    arms = [arm(seed, kind, dropout=0.3) for seed in (1, 2)]
    with pretend_gpu():
        together = train(gpu, arms, tmp_path / "together")
        asked = iter(range(100))
        train(gpu, arms, tmp_path / "stopped", should_stop=lambda: next(asked) == 1)
        stopped, _ = train(gpu, arms, tmp_path / "stopped")
        for each in arms:
            assert_same(each, together, train(gpu, [each], tmp_path / "alone"))
            weights = [read_weights(outcomes[each.spec_hash].adapter) for outcomes in (together[0], stopped)]
            assert distance(*weights) == 0


def test_moments_in_8_bit_are_kept_on_the_gpu_and_come_back(load, tmp_path):
    _, gpu = load("4 bit")
    spec = arm(1, "4 bit", optim="paged_adamw_8bit").model_copy(
        update={"lora": arm(1, "4 bit").lora.model_copy(update={"r": 64})}
    )
    with pretend_gpu():
        whole, _ = train(gpu, [spec], tmp_path / "whole")
        asked = iter(range(100))
        train(gpu, [spec], tmp_path / "cut", should_stop=lambda: next(asked) == 1)
        cut, _ = train(gpu, [spec], tmp_path / "cut")
    assert distance(*(read_weights(each[spec.spec_hash].adapter) for each in (whole, cut))) == 0


@pytest.mark.parametrize("kind", BASES)
def test_stored_adapters_score_and_answer_on_a_gpu_as_on_a_cpu(load, tmp_path, kind):
    cpu, gpu = load(kind)
    arms = [arm(seed, kind, learning_rate=0.1) for seed in (1, 2)]
    outcomes, _ = train(cpu, arms, tmp_path)
    stored = {each.adapter_name: outcomes[each.spec_hash].adapter for each in arms}
    wanted = [*stored, None]
    examples = [
        Example(id=row.id, messages=(Message(role="assistant", content="x"),), prompt="x", completion="x")
        for row in ROWS
    ]
    spec = EvaluationSpec(metrics=("loss", "token_accuracy"), per_device_eval_batch_size=4)

    def found(base):
        for name, directory in stored.items():
            load_adapter(base.model, directory, name)
        try:
            scores = evaluate(base, wanted, examples, ROWS, spec)
            prompts = [
                Prompt(token_ids=tuple(row.input_ids[:5].tolist()), adapter=wanted[at % 3], seed=at)
                for at, row in enumerate(ROWS[:6])
            ]
            answers = [
                [row.token_ids for row in generate(base, prompts, decoding, batch_size=4)]
                for decoding in (Decoding(max_new_tokens=5), Decoding(max_new_tokens=5, temperature=1.0, top_k=20))
            ]
            return [scores[name].metrics["eval.loss"].value for name in wanted], answers
        finally:
            for name in stored:
                delete_adapter(base.model, name)

    losses, answers = found(cpu)
    assert len(set(losses)) == 3
    with pretend_gpu():
        assert found(gpu) == (pytest.approx(losses, rel=1e-5), answers)


def test_the_pretended_gpu_refuses_what_a_gpu_refuses():
    with pretend_gpu():
        there = torch.ones(2, 3, device="cuda")
        with pytest.raises(RuntimeError, match=r"same device.*aten::add"):
            there + torch.ones(2, 3)
        with pytest.raises(RuntimeError, match=r"same device.*aten::mm"):
            torch.ones(4, 2) @ there
        assert (there + torch.tensor(1.0)).sum().tolist() == 12
        assert (there.cpu() + torch.ones(2, 3)).sum() == 12
        assert there[torch.tensor([0])].device == GPU

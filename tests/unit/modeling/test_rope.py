"""Rotary scaling that depends on lengths, computed for each row as if it were alone."""

import copy
import logging

import pytest
import torch
from helpers.architectures import ARCHITECTURES, LONGROPE, Architecture, make_architecture
from helpers.bases import resolved, settings_in
from helpers.matrix import Subject, alone, peft_loop, predict, resume
from transformers import AutoModelForCausalLM

from rankwise.experiment.schema import QuantizationSpec
from rankwise.modeling.base import load_base
from rankwise.modeling.decoding.engine import engine_of
from rankwise.modeling.decoding.generation import Decoding, generate_batch
from rankwise.modeling.length_limits import length_limits, probe_lengths
from rankwise.modeling.lora.logits import SupervisedLogits
from rankwise.modeling.rope import per_row, position_limit, rope_scaling, row_lengths

SCALED = ["phi3_longrope", "llama_dynamic"]
LIMIT = 16
TOLERANCE = 1e-5


@pytest.fixture(scope="module", params=SCALED)
def pair(request, tmp_path_factory):
    """A model that rankwise loaded, and how to get logits of a row from a fresh plain model."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp(request.param)
    path = make_architecture(root / "base", request.param)
    spec = QuantizationSpec(load_in_4bit=False, bnb_4bit_compute_dtype="float32")
    base = load_base(resolved(path), spec, settings_in(root), device="cpu")
    plain = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()

    def of_one_row(tokens):
        # Dynamic scaling remembers earlier rows, so each row gets a model of its own.
        return copy.deepcopy(plain)(input_ids=torch.tensor([tokens]), use_cache=False).logits[0]

    return base, of_one_row


def rows(*lengths):
    return [[(7 * row + 13 * at) % 300 + 4 for at in range(length)] for row, length in enumerate(lengths)]


def padded(contents):
    width = max(map(len, contents))
    return torch.tensor([[*row, *[0] * (width - len(row))] for row in contents])


@torch.no_grad()
def test_every_row_of_a_batch_is_computed_as_if_alone(pair):
    base, of_one_row = pair
    contents = rows(5, LIMIT, LIMIT + 1, 40, 9, 23)
    with row_lengths(base.model, [len(row) for row in contents]):
        logits = base.model(input_ids=padded(contents), use_cache=False).logits
    for row, own in zip(contents, logits, strict=True):
        assert (own[: len(row)] - of_one_row(row)).abs().max() < TOLERANCE


@torch.no_grad()
def test_a_row_does_not_remember_an_earlier_longer_one(pair):
    base, of_one_row = pair
    for row in rows(60, 20, 8, 33):
        logits = base.model(input_ids=torch.tensor([row]), use_cache=False).logits[0]
        assert (logits - of_one_row(row)).abs().max() < TOLERANCE


@torch.no_grad()
def test_positions_of_each_row_tell_its_length_where_nothing_else_does(pair):
    base, of_one_row = pair
    contents = rows(6, 30)
    width = max(map(len, contents))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in contents])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in contents])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits = base.model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
    for row, own in zip(contents, logits, strict=True):
        assert (own[width - len(row) :] - of_one_row(row)).abs().max() < TOLERANCE


def test_greedy_answers_do_not_depend_on_the_batch_and_are_right_across_the_limit(pair):
    base, of_one_row = pair
    contents = rows(5, LIMIT - 3, LIMIT, LIMIT + 2, 30)

    def answer(row):
        tokens = list(row)
        for _ in range(6):
            tokens.append(int(of_one_row(tokens)[-1].argmax()))
            if tokens[-1] == tokenizer.eos_token_id:
                break
        return tuple(tokens[len(row) :])

    decoding = Decoding(max_new_tokens=6)
    tokenizer = copy.deepcopy(base.tokenizer)
    tokenizer.eos_token = "<|pad|>"
    base.model.generation_config.eos_token_id = None
    with torch.no_grad():
        expected = [answer(row) for row in contents]
        for batch in (contents, contents[:1], contents[1:2], contents[2:4]):
            mine = generate_batch(base.model, tokenizer, batch, decoding)
            assert [row.token_ids for row in mine] == [expected[contents.index(row)] for row in batch]


@pytest.mark.parametrize("name", SCALED)
def test_arms_train_and_answer_as_if_alone(name, tmp_path, caplog):
    torch.set_num_threads(1)
    subject = Subject(name, tmp_path)
    with caplog.at_level(logging.INFO, logger="rankwise"):
        peft_loop(subject)
        alone(subject)
        predict(subject)
        resume(subject)
    assert "rotary frequencies depend on length, and are chosen for each row" in caplog.text
    assert "is decoded by transformers' generate" not in caplog.text
    assert "separate passes" not in caplog.text


def test_gradient_checkpointing_sees_the_same_lengths(tmp_path):
    torch.set_num_threads(1)
    subject = Subject("phi3_longrope", tmp_path)
    losses = {}
    for checkpointing in (False, True):
        subject.__dict__.pop("arms", None)
        subject.arms = [
            arm.model_copy(
                update={"training": arm.training.model_copy(update={"gradient_checkpointing": checkpointing})}
            )
            for arm in subject.arms
        ]
        _, recorder = subject.train(subject.base, [0, 1], tmp_path / str(checkpointing))
        losses[checkpointing] = [recorder.losses(arm.spec_hash) for arm in subject.arms]
    assert losses[True] == losses[False]


def test_models_with_other_scalings_are_left_alone(tmp_path):
    from transformers import AutoModelForCausalLM

    for name in ("llama", "llama_yarn", "llama_llama3", "mamba"):
        model = AutoModelForCausalLM.from_config(ARCHITECTURES[name].config())
        assert per_row(model) == 0
        assert rope_scaling(model).key(3) == rope_scaling(model).key(300) == ()


def test_limits_and_lengths_to_try():
    def limits(name):
        return length_limits(ARCHITECTURES[name].config())

    assert limits("phi3_longrope") == (16,)
    assert limits("llama_dynamic") == (16,)
    assert limits("llama") == ()
    assert limits("gpt_neo") == (8,)
    assert position_limit(ARCHITECTURES["llama_dynamic"].config()) == 64
    assert position_limit(ARCHITECTURES["llama"].config()) == 512
    model = AutoModelForCausalLM.from_config(ARCHITECTURES["phi3_longrope"].config())
    assert probe_lengths(model, (16, 1 << 30)) == [4, 7, 15, 19]


def test_a_limit_that_is_too_long_to_try_is_lowered_and_put_back(tmp_path):
    model = AutoModelForCausalLM.from_config(ARCHITECTURES["phi3_longrope"].config()).eval()
    per_row(model)
    scaling = rope_scaling(model)
    with scaling.lowered(8):
        assert scaling.limits == (8,)
        assert scaling.key(8) != scaling.key(9)
    assert scaling.limits == (16,)
    assert model.config.rope_parameters["original_max_position_embeddings"] == 16


def test_the_decoding_engine_takes_a_window_that_no_row_reaches(tmp_path):
    """Phi-3.5 has a sliding window of 262,144 tokens, and 131,072 positions."""
    torch.set_num_threads(1)
    windowed = Architecture(
        model_type="phi3",
        targets=("qkv_proj",),
        settings={"rope_parameters": LONGROPE, "original_max_position_embeddings": 16, "sliding_window": 1024},
    )
    subject = Subject("phi3", tmp_path, windowed)
    assert engine_of(subject.base.model) is not None
    predict(subject)


def test_the_decoding_engine_is_tried_beyond_the_window_of_local_attention(tmp_path, caplog):
    """GPT-Neo's local layers count from the end of the batch, which nine tokens did not show."""
    subject = Subject("gpt_neo", tmp_path)
    assert engine_of(subject.base.model) is None
    assert "is decoded by transformers' generate, which is slower, because logits differ" in caplog.text
    predict(subject)


def test_rows_do_not_share_sequences_where_frequencies_depend_on_their_lengths(tmp_path, caplog):
    model = Subject("phi3_longrope", tmp_path).base.model
    with caplog.at_level(logging.INFO):
        assert not SupervisedLogits(model).packs
    assert "do not share sequences: rotary frequencies that depend on a row's length cannot keep" in caplog.text

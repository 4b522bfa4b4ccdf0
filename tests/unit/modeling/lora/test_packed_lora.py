"""Adapters on their own rows of one batch, against peft's own forward."""

import threading

import pytest
import torch
from helpers.packs import load_tiny, make_arm
from peft import LoraConfig, get_peft_model, inject_adapter_in_model

from rankwise.compat.peft import SEVERAL_ADAPTERS
from rankwise.exceptions import ConfigError
from rankwise.modeling.base import expected_warning
from rankwise.modeling.lora.draws import DropoutKey
from rankwise.modeling.lora.packed import (
    Segment,
    adapter_parameters,
    create_adapter,
    delete_adapter,
    install,
    uninstall,
)

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return load_tiny(tmp_path_factory.mktemp("packed"))


@pytest.fixture
def model(base):
    """The tiny base's model, given back without adapters."""
    yield base.model
    for name in list(getattr(base.model, "peft_config", {})):
        delete_adapter(base.model, name)


def tokens(rows, length=7, seed=0):
    return torch.randint(4, 300, (rows, length), generator=torch.Generator().manual_seed(seed))


def add(model, **settings):
    """An adapter whose B is not zero, so that it changes something."""
    name = create_adapter(model, make_arm(**settings))
    generator = torch.Generator().manual_seed(settings.get("seed", 0))
    with torch.no_grad():
        for key, parameter in adapter_parameters(model, name).items():
            if "lora_B" in key:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return name


def peft_logits(model, name, input_ids):
    """Logits by peft's own forward with one active adapter."""
    uninstall(model)
    try:
        for module in model.modules():
            if hasattr(module, "_active_adapter"):
                module._active_adapter = [name]
        with torch.no_grad():
            return model(input_ids=input_ids).logits
    finally:
        install(model)


def test_each_row_gets_what_peft_gives_it_alone(model):
    first = add(model, seed=1, lora={"r": 4, "target_modules": ["q_proj", "v_proj"]})
    second = add(model, seed=2, lora={"r": 16, "lora_alpha": 5, "use_rslora": True, "target_modules": "all-linear"})
    ids = tokens(6)
    with torch.no_grad():
        bare = model(input_ids=ids).logits
    segments = [Segment(adapter=first, start=0, stop=2), Segment(adapter=None, start=2, stop=3)]
    segments += [Segment(adapter=second, start=3, stop=6)]
    with install(model).segments(segments), torch.no_grad():
        packed = model(input_ids=ids).logits
    torch.testing.assert_close(packed[:2], peft_logits(model, first, ids[:2]), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(packed[3:], peft_logits(model, second, ids[3:]), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(packed[2], bare[2], rtol=1e-5, atol=1e-5)
    assert (packed[0] - bare[0]).abs().max() > 0.01


def test_outside_of_segments_the_model_is_the_bare_base(model):
    ids = tokens(2)
    with torch.no_grad():
        before = model(input_ids=ids).logits
        name = add(model)
        with install(model).adapter(name, 2):
            inside = model(input_ids=ids).logits
        after = model(input_ids=ids).logits
    assert torch.equal(before, after)
    assert not torch.equal(before, inside)


def test_rows_beyond_the_last_segment_get_the_bare_base(model):
    name = add(model)
    ids = tokens(4)
    with torch.no_grad():
        before = model(input_ids=ids).logits
        with install(model).segments([Segment(adapter=name, start=0, stop=2)]):
            after = model(input_ids=ids).logits
    assert torch.equal(before[2:], after[2:])


def test_generation_with_a_cache_keeps_rows_apart(model):
    first, second = add(model, seed=1, lora={"r": 4}), add(model, seed=2, lora={"r": 8})
    ids = tokens(3)
    arguments = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 3, "eos_token_id": None}
    routing = install(model)
    with routing.segments(
        [Segment(adapter=first, start=0, stop=1), Segment(adapter=second, start=1, stop=2, length=None)]
    ):
        together = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **arguments)
    for row, name in enumerate([first, second, None]):
        own = ids[row : row + 1]
        with routing.adapter(name, 1):
            alone = model.generate(input_ids=own, attention_mask=torch.ones_like(own), **arguments)
        assert together[row].tolist() == alone[0].tolist()


def test_start_values_are_a_pure_function_of_seed_and_module(model):
    first = create_adapter(model, make_arm(seed=5, lora={"r": 4}))
    start = {key: value.detach().clone() for key, value in adapter_parameters(model, first).items()}
    torch.rand(100)
    second = create_adapter(model, make_arm(seed=5, lora={"r": 4, "lora_alpha": 9}))
    third = create_adapter(model, make_arm(seed=6, lora={"r": 4}))
    again, other = adapter_parameters(model, second), adapter_parameters(model, third)
    for key, value in start.items():
        assert torch.equal(value, again[key])
        assert value.dtype == torch.float32
        if "lora_B" in key:
            assert not value.any()
        else:
            assert not torch.equal(value, other[key])
            assert value.abs().max() <= value.shape[1] ** -0.5
    assert len({float(value[0, 0]) for key, value in start.items() if "lora_A" in key}) == len(start) / 2


def test_adding_and_deleting_neighbours_leaves_weights_and_gradients_switches_alone(model):
    first, second, third = (create_adapter(model, make_arm(seed=seed)) for seed in (1, 2, 3))
    kept = adapter_parameters(model, first) | {}
    values = {key: value.detach().clone() for key, value in kept.items()}
    delete_adapter(model, second)
    delete_adapter(model, third)
    create_adapter(model, make_arm(seed=4))
    assert all(parameter.requires_grad for parameter in kept.values())
    assert all(kept[key] is value for key, value in adapter_parameters(model, first).items())
    assert all(torch.equal(values[key], value) for key, value in kept.items())
    living = {id(value) for value in model.parameters() if value.requires_grad}
    assert len(living) == 2 * len(kept)
    assert second not in model.peft_config


def test_creating_an_adapter_does_not_touch_the_global_generator(model):
    state = torch.get_rng_state()
    create_adapter(model, make_arm())
    assert torch.equal(torch.get_rng_state(), state)


def test_the_same_arm_twice_is_refused(model):
    create_adapter(model, make_arm())
    with pytest.raises(ConfigError, match=r"already has an adapter arm-[0-9a-f]{12}"):
        create_adapter(model, make_arm())


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["q_proj", "query"], "query: no linear layer has that name.*it has down_proj, gate_proj"),
        (["lm_head"], "lm_head: it is the output head"),
        (["embed_tokens"], "embed_tokens: no linear layer"),
    ],
)
def test_targets_that_the_base_does_not_have_are_named(model, targets, message):
    with pytest.raises(ConfigError, match=message):
        create_adapter(model, make_arm(lora={"target_modules": targets}))
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_all_linear_means_every_linear_layer_but_the_head(model):
    narrow = create_adapter(model, make_arm(seed=1))
    name = create_adapter(model, make_arm(seed=2, lora={"target_modules": "all-linear"}))
    modules = {key.split(".")[-3] for key in adapter_parameters(model, name)}
    assert modules == set(ALL)
    assert set(model.peft_config[name].target_modules) == set(ALL), "short names, as peft's own files have them"
    assert len(adapter_parameters(model, name)) == 2 * 7 * 2
    assert len(adapter_parameters(model, narrow)) == 2 * 2 * 2


def test_segments_that_overlap_or_are_out_of_order_are_refused(model):
    routing = install(model)
    with (
        pytest.raises(ValueError, match="overlap or are out of order"),
        routing.segments([Segment(adapter="a", start=0, stop=3), Segment(adapter="b", start=2, stop=4)]),
    ):
        pass


@pytest.mark.parametrize(
    "values", [{"start": 2, "stop": 2}, {"start": -1, "stop": 1}, {"start": 0, "stop": 1, "length": 0}]
)
def test_a_segment_without_rows_or_tokens_is_refused(values):
    with pytest.raises(ValueError, match="segment"):
        Segment(adapter="a", **values)


def test_the_former_routing_comes_back_after_an_error(model):
    routing = install(model)
    outer = [Segment(adapter=None, start=0, stop=1)]
    with routing.segments(outer):
        with pytest.raises(RuntimeError), routing.segments([Segment(adapter=None, start=0, stop=9)]):
            raise RuntimeError
        assert routing.current == tuple(outer)
    assert routing.current == ()


@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed but the targeted layer")
@pytest.mark.parametrize("settings", [{"use_dora": True}, {"lora_bias": True}], ids=["dora", "bias"])
def test_an_adapter_that_is_not_plain_lora_is_refused_in_a_batch(base, settings):
    config = LoraConfig(r=2, target_modules=["q_proj"], **settings)
    with expected_warning(SEVERAL_ADAPTERS):
        inject_adapter_in_model(config, base.model, "other")
    try:
        with install(base.model).adapter("other", 2), pytest.raises(ConfigError, match="not plain LoRA"):
            base.model(input_ids=tokens(2))
    finally:
        delete_adapter(base.model, "other")


def test_an_adapter_of_an_embedding_is_refused(tmp_path):
    model = load_tiny(tmp_path).model
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["embed_tokens"]), model, "other")
    with pytest.raises(
        ConfigError, match=r"module model\.embed_tokens is a Embedding, but only adapters of linear layers"
    ):
        install(model)


def test_inputs_whose_rows_cannot_be_told_apart_are_refused(model):
    name = add(model)
    layer = model.model.layers[0].self_attn.q_proj
    with install(model).adapter(name, 2), pytest.raises(ConfigError, match=r"layers.0.self_attn.q_proj is called"):
        layer(torch.zeros(13, 64))  # No batch of two rows has 13 tokens.


def test_a_peft_model_is_served_too(tmp_path):
    plain = load_tiny(tmp_path, quantization={"load_in_4bit": False}).model
    wrapped = get_peft_model(plain, LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    wrapped.eval()
    ids = tokens(2)
    with torch.no_grad():
        own = wrapped(input_ids=ids).logits
        with wrapped.disable_adapter():
            bare = wrapped(input_ids=ids).logits
        routing = install(wrapped)
        assert install(wrapped) is routing
        assert install(plain) is routing
        with routing.segments([Segment(adapter="default", start=0, stop=1)]):
            packed = wrapped(input_ids=ids).logits
        uninstall(wrapped)
        again = wrapped(input_ids=ids).logits
    torch.testing.assert_close(packed[0], own[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(packed[1], bare[1], rtol=1e-4, atol=1e-4)
    assert torch.equal(own, again)


def gradients(model, names, ids, *, checkpointing=False, thread=False):
    """Gradients of all adapters for one loss over all rows, with dropout."""
    from rankwise.training.loop import training_mode

    half = len(ids) // 2
    segments = [
        Segment(adapter=name, start=start, stop=start + half, dropout=DropoutKey(seed=index, step=0, micro_step=0))
        for index, (name, start) in enumerate(zip(names, (0, half), strict=True))
    ]
    for parameter in model.parameters():
        parameter.grad = None
    with training_mode(model, gradient_checkpointing=checkpointing), install(model).segments(segments):
        logits = model(input_ids=ids, use_cache=False).logits
        loss = torch.logsumexp(logits, dim=-1).mean()
        if thread:
            worker = threading.Thread(target=loss.backward)
            worker.start()
            worker.join()
        else:
            loss.backward()
    return {(name, key): value.grad.clone() for name in names for key, value in adapter_parameters(model, name).items()}


@pytest.mark.parametrize("thread", [False, True])
def test_recomputation_sees_the_same_rows_and_masks_from_any_thread(model, thread):
    names = [
        add(model, seed=1, lora={"lora_dropout": 0.3, "target_modules": ALL}),
        add(model, seed=2, lora={"r": 2, "lora_dropout": 0.1}),
    ]
    ids = tokens(4)
    plain = gradients(model, names, ids)
    again = gradients(model, names, ids, checkpointing=True, thread=thread)
    assert all(torch.equal(plain[key], again[key]) for key in plain)
    assert all(value.any() for value in plain.values())


def test_dropout_is_that_of_the_arms_own_longest_row(model):
    """A longer neighbour pads the rows; what is dropped must not change."""
    name = add(model, lora={"lora_dropout": 0.5, "target_modules": ALL})
    short = tokens(2, length=5)
    long = torch.cat([torch.cat([short, torch.full((2, 4), 3)], dim=1), tokens(1, length=9)])
    key = DropoutKey(seed=1, step=0, micro_step=0)
    routing = install(model)
    with torch.no_grad():
        with routing.segments([Segment(adapter=name, start=0, stop=2, dropout=key, length=5)]):
            alone = model(input_ids=short).logits
        with routing.segments([Segment(adapter=name, start=0, stop=2, dropout=key, length=5)]):
            packed = model(input_ids=long).logits
        with routing.adapter(name, 2):
            undropped = model(input_ids=short).logits
    torch.testing.assert_close(packed[:2, :5], alone, rtol=1e-4, atol=1e-4)
    assert (undropped - alone).abs().max() > 0.01


@pytest.mark.parametrize("architecture", ["qwen2", "gpt_neox"])
def test_other_architectures(tmp_path, architecture):
    model = load_tiny(tmp_path, architecture).model
    name = add(model, lora={"target_modules": "all-linear"})
    ids = tokens(2)
    with install(model).adapter(name, 2), torch.no_grad():
        packed = model(input_ids=ids).logits
    torch.testing.assert_close(packed, peft_logits(model, name, ids), rtol=1e-4, atol=1e-4)

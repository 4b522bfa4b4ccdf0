from __future__ import annotations

import pytest
import torch
from helpers.bases import inject, logits
from helpers.tiny import make_base

import rankwise.flavor as flavor
from rankwise.exceptions import BaseMismatchError, ConfigError, QuantizationMismatchError


@pytest.fixture(scope="module")
def three(world, tmp_path_factory):
    """Three stored adapters of different ranks and targets over one base, with the logits of each."""
    root = tmp_path_factory.mktemp("three")
    saved, wanted = [], []
    for index, lora in enumerate(
        [
            {"r": 2, "target_modules": ["q_proj"]},
            {"r": 8, "lora_alpha": 16, "use_rslora": True, "target_modules": ["q_proj", "down_proj"]},
            {"r": 4, "target_modules": ["k_proj", "o_proj"]},
        ]
    ):
        base = world.load_base()
        inject(base.model, "x", seed=index, **lora)
        flavor.save_model(base.model, root / str(index), base.tokenizer, base=base)
        saved.append(root / str(index))
        wanted.append(logits(base.model))
    return saved, wanted


def test_several_adapters_lie_over_one_base_and_each_computes_what_it_did(world, three):
    saved, wanted = three
    loaded = flavor.load_models(saved, settings=world.settings)
    assert len({id(adapter.model) for adapter in loaded}) == 1
    assert len({adapter.adapter_name for adapter in loaded}) == 3
    assert torch.equal(logits(loaded[0].model), wanted[0])
    for adapter, expected in zip(loaded, wanted, strict=True):
        adapter.activate()
        assert torch.equal(logits(adapter.model), expected)
    assert not [name for name, parameter in loaded[0].model.named_parameters() if parameter.requires_grad]


def test_rows_of_one_batch_go_through_different_adapters(world, three):
    from rankwise.modeling.lora.packed import Segment, install

    saved, wanted = three
    first, second, _ = flavor.load_models(saved, settings=world.settings)
    routing = install(first.model)
    segments = [
        Segment(adapter=first.adapter_name, start=0, stop=1),
        Segment(adapter=second.adapter_name, start=1, stop=2),
    ]
    with routing.segments(segments):
        mixed = logits(first.model)
    assert torch.allclose(mixed[0], wanted[0][0], atol=1e-4)
    assert torch.allclose(mixed[1], wanted[1][1], atol=1e-4)
    second.activate()
    assert torch.equal(logits(second.model), wanted[1])


def test_a_model_that_lies_over_the_base_already_is_not_attached_twice(world, three):
    saved, wanted = three
    base = world.load_base()
    first = flavor.load_model(saved[0], base=base, settings=world.settings)
    again, other = flavor.load_models([saved[0], saved[1]], base=base, settings=world.settings)
    assert again.adapter_name == first.adapter_name
    assert list(base.model.peft_config) == [first.adapter_name, other.adapter_name]
    again.activate()
    assert torch.equal(logits(base.model), wanted[0])


def test_an_adapter_that_brings_rows_lies_over_a_base_of_its_own(world, tmp_path, three):
    base = world.load_base()
    base.model.resize_token_embeddings(322, mean_resizing=False)
    inject(base.model, "x", trainable_token_indices={"embed_tokens": [320, 321], "lm_head": [320, 321]})
    base.tokenizer.add_tokens([f"<|more-{index}|>" for index in range(322 - len(base.tokenizer))])
    flavor.save_model(base.model, tmp_path / "resized", base.tokenizer, base=base)
    wanted = logits(base.model)
    assert wanted.shape[-1] == 322
    state = torch.get_rng_state()
    loaded = flavor.load_model(tmp_path / "resized", settings=world.settings)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(logits(loaded.model), wanted)
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    with pytest.raises(BaseMismatchError, match="trained with 322 rows in the embedding, the base in memory has 320"):
        flavor.load_models([three[0][0], tmp_path / "resized"], settings=world.settings)
    with pytest.raises(BaseMismatchError, match="trained with 320 rows in the embedding, the base in memory has 322"):
        flavor.load_model(three[0][0], base=loaded.base, settings=world.settings)


def test_rows_of_an_embedding_that_is_the_head_too_come_back_and_merge(world, tmp_path):
    from rankwise.assets.base import resolve_base
    from rankwise.experiment.schema import QuantizationSpec
    from rankwise.flavor.export import export_merged
    from rankwise.modeling.base import load_base

    resolved = resolve_base(str(make_base(tmp_path / "tied", tied=True)), None, world.settings)
    base = load_base(resolved, QuantizationSpec(), world.settings, device="cpu")
    assert base.model.get_input_embeddings().weight is base.model.get_output_embeddings().weight
    base.model.resize_token_embeddings(322, mean_resizing=False)
    inject(base.model, "x", trainable_token_indices=[5, 320, 321])
    wanted = logits(base.model)
    flavor.save_model(base.model, tmp_path / "saved", base.tokenizer, base=base)
    loaded = flavor.load_model(tmp_path / "saved", settings=world.settings)
    assert torch.equal(logits(loaded.model), wanted)
    done = export_merged(
        tmp_path / "saved", tmp_path / "merged", dtype="float32", max_new_tokens=4, settings=world.settings
    )
    assert done.agreement.equal_greedy_tokens == 1.0
    assert done.agreement.max_logit_difference < 1e-3


def test_a_loaded_model_trains_nothing_by_itself(world):
    loaded = flavor.load_model(world.saved, settings=world.settings)
    assert not loaded.model.training
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())


def test_adapters_of_different_bases_are_not_loaded_together(world, tmp_path):
    from rankwise.assets.base import resolve_base
    from rankwise.experiment.schema import QuantizationSpec
    from rankwise.modeling.base import load_base

    other = resolve_base(str(make_base(tmp_path / "other", seed=5)), None, world.settings)
    base = load_base(other, QuantizationSpec(), world.settings, device="cpu")
    inject(base.model, "x")
    flavor.save_model(base.model, tmp_path / "other-saved", base.tokenizer, base=base)
    with pytest.raises(BaseMismatchError, match="were trained on different bases"):
        flavor.load_models([world.saved, tmp_path / "other-saved"], settings=world.settings)
    plain = world.load_base(load_in_4bit=False)
    inject(plain.model, "x")
    flavor.save_model(plain.model, tmp_path / "plain", plain.tokenizer, base=plain)
    with pytest.raises(QuantizationMismatchError, match="4 bit nf4 with double quantization and not quantized"):
        flavor.load_models([world.saved, tmp_path / "plain"], settings=world.settings)


def test_no_model_at_all_is_an_error():
    with pytest.raises(ConfigError, match="at least one model"):
        flavor.load_models([])


def test_the_adapter_s_name_tells_the_registered_model_and_its_content(world, store):
    flavor.log_adapter(world.adapter, world.load_base(), registered_model_name="org.diamonds v2")
    loaded = flavor.load_model("models:/org.diamonds v2/1", settings=world.settings)
    assert loaded.adapter_name == f"org-diamonds-v2-{loaded.metadata.manifest[7:19]}"
    assert loaded.origin.version == "1"


def test_the_tokenizer_is_the_adapter_s_own_with_its_template(world, tmp_path):
    base = world.load_base()
    inject(base.model, "x")
    base.tokenizer.chat_template = "{{ messages[0]['content'] }}!"
    base.tokenizer.add_special_tokens({"additional_special_tokens": ["<|price|>"]})
    flavor.save_model(base.model, tmp_path / "saved", base.tokenizer, base=base)
    loaded = flavor.load_model(tmp_path / "saved", settings=world.settings)
    assert loaded.tokenizer.chat_template == "{{ messages[0]['content'] }}!"
    assert loaded.tokenizer.convert_tokens_to_ids("<|price|>") == base.tokenizer.convert_tokens_to_ids("<|price|>")
    assert loaded.tokenizer("a <|price|>") == base.tokenizer("a <|price|>")
    assert loaded.base.tokenizer.chat_template != loaded.tokenizer.chat_template

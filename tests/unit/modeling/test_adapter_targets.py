"""peft selects the same modules by the resolved configuration as by the original one."""

from __future__ import annotations

import pytest
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

from rankwise.exceptions import AdapterTargetError
from rankwise.modeling.adapter_targets import resolve_patterns, resolve_targets

MODULES = [
    "model", "model.embed_tokens", "model.layers", "lm_head", "tower.lm_head", "model.norm",
    *(f"model.layers.{layer}.{name}" for layer in range(12) for name in ("attn.q", "attn.v", "mlp.up", "mlp.down")),
    *(f"vision.model.layers.{layer}.{name}" for layer in range(3) for name in ("attn.q", "attn.v")),
]  # fmt: skip


def selected(config):
    return {name for name in MODULES if bool(check_target_module_exists(config, name)) and not excluded(config, name)}


def excluded(config, name):
    return type(check_target_module_exists(config, name)).__name__ == "_ExcludedModule"


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": r".*\.q"},
        {"target_modules": r"model\.layers\.\d\.attn\.[qv]"},
        {"target_modules": r"(?!vision).*\.(q|v)"},
        {"target_modules": "lm_head"},
        {"target_modules": r"model\.layers\.1\.attn\.q"},
        {"target_modules": r".*\.(q|up)", "exclude_modules": r"vision.*"},
        {"target_modules": r".*\.(q|up)", "exclude_modules": ["attn.q"]},
        {"target_modules": ["q", "up"], "exclude_modules": r"vision\..*|.*\.up"},
        {"target_modules": ["q"], "exclude_modules": r".*\.1\..*", "layers_to_transform": [1, 2, 11]},
        {"target_modules": ["q"], "exclude_modules": r"nothing"},
        {"target_modules": ".*", "modules_to_save": ["lm_head"]},
    ],
    ids=str,
)
def test_a_resolved_configuration_selects_what_the_original_does(settings):
    config = LoraConfig(**settings)
    resolved = resolve_targets(config, MODULES, "x")
    assert selected(resolved) == selected(config) != set()
    assert not isinstance(resolved.target_modules, str)
    assert not isinstance(resolved.exclude_modules, str)
    assert config.to_dict() == LoraConfig(**settings).to_dict()


def test_the_ends_of_names_suffice_where_they_are_unambiguous():
    assert resolve_targets(LoraConfig(target_modules=r".*\.(q|up)"), MODULES, "x").target_modules == {"q", "up"}
    resolved = resolve_targets(LoraConfig(target_modules="lm_head"), MODULES, "x")
    assert (resolved.target_modules, resolved.exclude_modules) == ({"lm_head"}, {"tower.lm_head"})


@pytest.mark.parametrize(
    "settings", [{"target_modules": ["q"]}, {"target_modules": "all-linear"}, {"target_modules": None}]
)
def test_what_has_no_pattern_is_left_alone(settings):
    config = LoraConfig(**settings)
    assert resolve_targets(config, MODULES, "x") is config


@pytest.mark.parametrize(
    "settings", [{"target_modules": "q"}, {"target_modules": "lm_head", "exclude_modules": ".*head"}]
)
def test_a_pattern_that_selects_nothing_is_refused(settings):
    with pytest.raises(AdapterTargetError, match=r"x: the regular expression target_modules, '.*', matches the whole"):
        resolve_targets(LoraConfig(**settings), MODULES, "x")


@pytest.mark.parametrize(
    "pattern",
    [
        {r"^model\.layers\.\d\..*": 2, r".*\.q": 4},
        {r"layers\.1\.attn\.(q|v)": 2, "up": 8, "down": 8},
        {r"(?<!\d)1\.attn\.q": 3},
        {"q|attn.v": 3},
        {f"model.layers.{layer}.attn.q": layer + 1 for layer in range(300)},
        {"nothing.*": 3},
    ],
    ids=lambda pattern: next(iter(pattern)),
)
def test_resolved_keys_give_every_module_the_value_that_peft_gives_it(pattern):
    config = LoraConfig(rank_pattern=pattern, alpha_pattern=pattern)
    resolved = resolve_patterns(config, MODULES, "x")
    for name in MODULES:
        expected = pattern.get(get_pattern_key(pattern, name))
        for given in (resolved.rank_pattern, resolved.alpha_pattern):
            assert given.get(get_pattern_key(given, name)) == expected
    assert all(key.startswith("^(?:") for key in resolved.rank_pattern)


def test_keys_that_are_names_stay():
    config = LoraConfig(rank_pattern={"q": 2, "layers.1.mlp.up": 4})
    assert resolve_patterns(config, MODULES, "x") is config

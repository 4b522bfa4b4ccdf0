"""`inspect` and `import` of adapters whose `adapter_config.json` is odd end with 0 or a message, never a traceback."""

from __future__ import annotations

import itertools
import json
import shutil
import time
from collections import Counter

import pytest
from click.testing import CliRunner
from helpers.flavored import make_world
from helpers.odd_configs import mutations, nested

from rankwise.cli.inspect import inspect
from rankwise.cli.registry import import_
from rankwise.exceptions import RankwiseError

# A pattern that is stopped takes a second; a busy machine more.
LONGEST_S = 30


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("odd"))


@pytest.fixture(scope="module")
def target(world):
    return shutil.copytree(world.adapter, world.root / "odd")


@pytest.fixture(autouse=True)
def _home(world, monkeypatch):
    world.enter(monkeypatch)


def written(target, content):
    (target / "adapter_config.json").write_bytes(
        content if isinstance(content, bytes) else json.dumps(content).encode()
    )
    return target


def outcome(command, *arguments):
    """The exit code, and the message of an error."""
    result = CliRunner().invoke(command, [str(argument) for argument in arguments])
    if result.exception is None:
        return result.exit_code, result.stdout
    if not isinstance(result.exception, RankwiseError):
        raise AssertionError(f"{arguments} gives {type(result.exception).__name__}") from result.exception
    return result.exception.exit_code, str(result.exception)


def try_mutations(world, target, *, seed, count, measure):
    config = json.loads((world.adapter / "adapter_config.json").read_text())
    codes: Counter[tuple[str, int]] = Counter()
    for told, content in itertools.islice(mutations(config, seed), count):
        written(target, content)
        for name, command, arguments in (
            ("inspect", inspect, [target, *([] if measure else ["--no-measure"])]),
            ("import", import_, [target, "--name", "odd", "--quantization", "none"]),
        ):
            started = time.monotonic()
            try:
                code, text = outcome(command, *arguments)
            except AssertionError as error:
                raise AssertionError(f"{told}: {error}") from error.__cause__
            # The base that it names may not be there.
            allowed = (0, 2, 3) if "base_model_name_or_path" in told else (0, 2)
            assert code in allowed, f"{told}: {name} exits with {code}: {text}"
            assert text.encode(), told
            assert time.monotonic() - started < LONGEST_S, told
            codes[name, code] += 1
    return codes


def test_every_mutation_is_accepted_or_refused_with_a_message(world, target):
    codes = try_mutations(world, target, seed=1, count=200, measure=False)
    assert min(codes[name, code] for name in ("inspect", "import") for code in (0, 2)) >= 10, codes


@pytest.mark.faults
def test_thousands_of_mutations_are_accepted_or_refused_with_a_message(world, target):
    codes = try_mutations(world, target, seed=2, count=3000, measure=True)
    print(dict(codes))


def config_with(world, **changes):
    return {**json.loads((world.adapter / "adapter_config.json").read_text()), **changes}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"alpha_pattern": "../..", "use_dora": ""}, "use_dora must be true or false, got ''; alpha_pattern must be"),
        ({"exclude_modules": "((((("}, "exclude_modules: '(((((' is not a valid regular expression"),
        ({"lora_alpha": [], "ensure_weight_tying": {"q_proj": 10**12}}, "lora_alpha must be a finite number, got []"),
        ({"rank_pattern": False}, "rank_pattern must be a mapping"),
        ({"rank_pattern": "LORA"}, "rank_pattern must be a mapping"),
        ({"loftq_config": nested(300)}, "is nested deeper than 6 levels"),
    ],
    ids=str,
)
def test_an_odd_configuration_is_refused_by_both_commands_with_the_key_and_the_value(world, target, changes, message):
    written(target, config_with(world, **changes))
    for command, arguments in ((inspect, [target]), (import_, [target, "--name", "odd"])):
        code, text = outcome(command, *arguments)
        assert code == 2
        for part in message.split("; "):
            assert part in text


@pytest.mark.parametrize("key", ["target_modules", "exclude_modules"])
@pytest.mark.parametrize("pattern", [r"(\w+\.?)+X", r"(?=(\w+\.?)+X)(\w+\.?)+X"])
def test_a_pattern_that_takes_for_ever_ends_with_a_message(world, target, key, pattern):
    written(target, config_with(world, **{key: pattern}))
    started = time.monotonic()
    code, text = outcome(import_, target, "--name", "odd", "--quantization", "none")
    assert time.monotonic() - started < LONGEST_S
    if key == "exclude_modules" and pattern.startswith(r"(\w"):
        assert code == 0  # RE2 sees at once that it excludes nothing.
        return
    assert code == 2
    expected = "matches the whole name of none of" if pattern.startswith(r"(\w") else "was stopped after 1 s over"
    assert f"{key}" in text
    assert expected in text


def test_patterns_that_never_end_as_keys_of_ranks_are_stopped_too(world, target):
    written(target, config_with(world, rank_pattern={r"(?=(\w+\.?)+X)x": 2}))
    for command, arguments in ((inspect, [target]), (import_, [target, "--name", "odd"])):
        code, text = outcome(command, *arguments)
        assert code == 2
        assert "rank_pattern: the regular expression" in text
        assert "was stopped after 1 s over" in text


@pytest.mark.filterwarnings("ignore:Unexpected keyword arguments")
@pytest.mark.parametrize(
    "changes",
    [
        {"target_modules": r"model\.layers\.\d+\.self_attn\.[qv]_proj"},
        {"target_modules": r"(?!.*k_proj).*\.(q|v)_proj"},
        {"target_modules": r".*_proj", "exclude_modules": r".*\.(?:[ok]|gate|up|down)_proj"},
        {"exclude_modules": r".*k_proj"},
        {"rank_pattern": {r"(?<!x)q_proj": 4}, "r": 4},
        {"auto_mapping": {"parent_library": "transformers.models.llama.modeling_llama", "unsloth_fixed": True}},
        {"use_a_new_method": False, "another_config": None, "use_dora": None, "lora_bias": None},
    ],
    ids=lambda changes: next(iter(changes)),
)  # fmt: skip
def test_what_peft_loads_is_imported_with_names_instead_of_patterns(world, target, changes):
    import torch
    from helpers.bases import logits
    from peft import PeftModel

    import rankwise.flavor as flavor

    written(target, config_with(world, **changes))
    code, uri = outcome(import_, target, "--name", "adopted", "--quantization", "none")
    assert code == 0, uri
    loaded = flavor.load_model(uri.strip(), settings=world.settings, tracking_uri=world.settings.tracking_uri)
    wanted = PeftModel.from_pretrained(world.load_base(load_in_4bit=False).model, target).eval()
    assert torch.equal(logits(loaded.model), logits(wanted))
    stored = loaded.model.peft_config[loaded.adapter_name]
    assert stored.target_modules == {"q_proj", "v_proj"}
    assert not isinstance(stored.exclude_modules, str)

from __future__ import annotations

import json
import shlex
from dataclasses import replace

import pytest

import rankwise.flavor as flavor
from rankwise.experiment.schema import QuantizationSpec
from rankwise.serving.serve_command import serve_command


@pytest.fixture
def directory(world, tmp_path):
    return flavor.download_adapter(world.saved, tmp_path / "adapter")


@pytest.fixture(scope="module")
def metadata(world):
    return flavor.read_metadata(world.saved)


def test_the_line_names_base_dtype_quantization_rank_and_directory(world, directory, metadata):
    float32 = replace(metadata, base=replace(metadata.base, compute_dtype="float32"))
    serve = serve_command(directory, float32, "my model", world.settings)
    assert shlex.split(serve.line) == [
        "vllm", "serve", str(world.base_path), "--dtype", "bfloat16", "--quantization", "bitsandbytes",
        "--enable-lora", "--max-lora-rank", "8", "--lora-modules", f"my-model={directory}",
    ]  # fmt: skip
    assert "computes in bfloat16 instead of float32" in serve.differs
    assert (serve.obstacles, serve.remarks) == ((), ())


def test_a_base_of_the_hub_is_named_with_its_commit(world, directory, metadata):
    hub = replace(
        metadata.base, source="org/base", revision="0" * 40, quantization=QuantizationSpec(load_in_4bit=False)
    )
    arguments = serve_command(directory, replace(metadata, base=hub), "m", world.settings).arguments
    assert arguments[:4] == ("serve", "org/base", "--revision", "0" * 40)
    assert "--quantization" not in arguments


def test_a_base_that_is_elsewhere_is_found_by_its_content_and_a_changed_one_is_not_taken(world, directory, metadata):
    moved = replace(metadata, base=replace(metadata.base, source="/gone/base"))
    assert (
        serve_command(directory, moved, "m", world.settings).obstacles[0].startswith("the base /gone/base at sha256:")
    )
    listed = replace(world.settings, bases=(world.base_path.parent,))
    assert serve_command(directory, moved, "m", listed).arguments[1] == str(world.base_path)
    other = replace(metadata.base.fingerprint, weights="sha256:" + "0" * 64)
    changed = replace(metadata, base=replace(metadata.base, fingerprint=other))
    assert serve_command(directory, changed, "m", listed).arguments is None


def test_a_template_of_the_adapter_s_own_and_a_system_message_are_told(world, directory, metadata):
    (directory / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    serve = serve_command(directory, replace(metadata, system="Be brief."), "m", world.settings)
    assert serve.arguments[-2:] == ("--chat-template", str(directory / "chat_template.jinja"))
    assert serve.remarks == ("trained with the system message 'Be brief.': start every chat with it",)
    assert serve.to_json()["line"] == serve.line


def test_arguments_of_the_template_are_given_to_the_server(world, directory, metadata):
    reading = replace(metadata.reading, chat_template_kwargs={"enable_thinking": False})
    serve = serve_command(directory, replace(metadata, reading=reading), "m", world.settings)
    place = serve.arguments.index("--default-chat-template-kwargs")
    assert serve.arguments[place + 1] == '{"enable_thinking": false}'


def test_what_vllm_cannot_serve_has_no_line(world, directory, metadata):
    path = directory / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "rank_pattern": {"q_proj": 2}}))
    serve = serve_command(directory, metadata, "m", world.settings)
    assert serve.line is None
    assert serve.obstacles == ("rank_pattern: vLLM scales all modules alike, so the answers would be wrong",)

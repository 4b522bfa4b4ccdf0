from __future__ import annotations

import pytest

from rankwise.serving.vllm_options import VllmOptions, model_uri


def test_the_command_line_says_rank_revision_and_quantization():
    line = "vllm serve org/base --revision abc --enable-lora --max-lora-rank=64 -q bitsandbytes --port 1"
    assert VllmOptions.from_command_line(line.split()) == VllmOptions(
        max_rank=64, revision="abc", quantization="bitsandbytes", url="http://127.0.0.1:1"
    )
    # vLLM's own default.
    assert VllmOptions.from_command_line(["vllm", "serve", "org/base", "--enable-lora"]).max_rank == 16


@pytest.mark.parametrize(
    ("options", "url"),
    [
        ("", "http://127.0.0.1:8000"), ("--host 0.0.0.0 --port 9", "http://127.0.0.1:9"),
        ("--host 10.0.0.3", "http://10.0.0.3:8000"), ("--host fd00::1", "http://[fd00::1]:8000"),
        ("--uds /run/vllm", None), ("--ssl-certfile c.pem", None),
    ],
)  # fmt: skip
def test_where_the_server_answers(options, url):
    assert VllmOptions.from_command_line(["vllm", "serve", "org/base", "--enable-lora", *options.split()]).url == url


def test_options_may_have_underscores_and_a_file(tmp_path):
    line = ["vllm", "serve", "org/base", "--enable_lora", "--max_lora_rank=32", "--ssl_certfile", "c.pem"]
    assert VllmOptions.from_command_line(line) == VllmOptions(max_rank=32)
    config = tmp_path / "vllm.yaml"
    config.write_text("port: 9001\nenable-lora: true\nmax_lora_rank: 64\nquantization: bitsandbytes\ncors: [a, b]\n")
    line = ["vllm", "serve", "org/base", "--config", str(config)]
    expected = VllmOptions(max_rank=64, quantization="bitsandbytes", url="http://127.0.0.1:9001")
    assert VllmOptions.from_command_line(line) == expected
    assert VllmOptions.from_command_line([*line, "--port", "9002"]).url == "http://127.0.0.1:9002"
    config.write_text("port: 9001\nenable-lora: false\n")
    assert VllmOptions.from_command_line(line) == VllmOptions()


@pytest.mark.parametrize("content", [None, "[1", "- a"])
def test_of_a_file_that_cannot_be_read_nothing_is_guessed(tmp_path, content, caplog):
    config = tmp_path / "vllm.yaml"
    if content is not None:
        config.write_text(content)
    assert (
        VllmOptions.from_command_line(["vllm", "serve", "b", "--enable-lora", "--config", str(config)]) == VllmOptions()
    )
    assert "the file of --config cannot be read" in caplog.text


def test_a_server_that_another_program_has_started_is_not_guessed_at():
    assert VllmOptions.from_command_line(["app.py", "--port", "1"]) == VllmOptions()


@pytest.mark.parametrize(
    ("name", "uri"),
    [
        ("models:/m@champion", "models:/m@champion"),
        ("models:/my model/3", "models:/my model/3"),
        ("m@champion", "models:/m@champion"),
        ("org/base", None),
        ("m", None),
        ("models:/m", None),
        ("models:/m-0123", None),
        ("a b@c", None),
        ("../x@y", None),
    ],
)
def test_which_names_are_registered_adapters(name, uri):
    assert model_uri(name) == uri

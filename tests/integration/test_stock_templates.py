"""The stock chat templates of trl, each with six kinds of rows: what is trained is what generation sees."""

import importlib.util
import json
import re
from pathlib import Path

import datasets
import pytest
from helpers.tiny import make_tokenizer

from rankwise.data.chat import parse_messages
from rankwise.data.masks import CLOSE
from rankwise.data.preflight import preflight
from rankwise.data.rows import Examples, build_examples
from rankwise.data.template import Renderer
from rankwise.data.tokens import mask_examples
from rankwise.exceptions import DatasetError
from rankwise.experiment.schema import DatasetSpec

pytestmark = pytest.mark.proof

# The end tokens of the bases that have the template (eos_token_id of their generation configurations).
ENDS = {
    "cohere": ["<|END_OF_TURN_TOKEN|>"],
    "deepseek": ["<\uff5cend\u2581of\u2581sentence\uff5c>"],
    "diffusion_gemma": ["<turn|>", "<|tool_response>"],
    "gemma4": ["<turn|>", "<|tool_response>"],
    "gemma": ["<end_of_turn>"],
    "glm4moe": ["<|endoftext|>", "<|user|>", "<|observation|>"],
    "gptoss": ["<|return|>", "<|call|>"],
    "idefics3": ["<end_of_utterance>"],
    "lfm2": ["<|im_end|>"],
    "llama3": ["<|eot_id|>"],
    "llava_next": ["</s>"],
    "muse_glimmer": ["<|eot|>"],
    "nemotron": ["<|im_end|>"],
    "phi3": ["<|end|>", "<|endoftext|>"],
    "qwen": ["<|im_end|>"],
    "smolvlm": ["<end_of_utterance>"],
}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "install",
            "description": "Install a package.",
            "parameters": {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]},
        },
    }
]
CALL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [
        {"id": "call00001", "type": "function", "function": {"name": "install", "arguments": {"name": "vim"}}}
    ],
}
RESULT = {"role": "tool", "name": "install", "tool_call_id": "call00001", "content": "installed"}
ASK = [{"role": "user", "content": "first question"}, {"role": "user", "content": "second question"}]
SAY = [{"role": "assistant", "content": "first answer"}, {"role": "assistant", "content": "second answer"}]
THINK = [{**SAY[0], "reasoning_content": "first thought"}, {**SAY[1], "reasoning_content": "second thought"}]
KINDS = {
    "single turn": [ASK[0], SAY[0]],
    "several turns": [ASK[0], SAY[0], ASK[1], SAY[1]],
    "system": [{"role": "system", "content": "the rules"}, ASK[0], SAY[0]],
    "tools": [ASK[0], CALL, RESULT, SAY[0]],
    "thinking": [ASK[0], THINK[0]],
    "thinking in several turns": [ASK[0], THINK[0], ASK[1], THINK[1]],
}
ARGUMENTS = {("qwen3_5_nothink", "thinking"): {"enable_thinking": True}}

# Templates that do not write calls of the assistant, and the results of tools or only these.
NO_CALLS = {
    "cohere", "cohere2", "deepseek_r1_distill", "gemma", "gemma3", "idefics3", "lfm2", "llama3", "llava_next", "phi3",
    "phi3_5", "qwen2_5_vl", "smolvlm",
}  # fmt: skip
# Templates that do not write the thought of a final answer.
NO_THOUGHTS = {
    "cohere", "cohere2", "gemma", "gemma3", "gemma4", "gemma4_v2", "gemma4_v3", "gemma4_v4", "idefics3", "lfm2",
    "lfm2_v2", "llama3", "llama3_1", "llama3_2", "llava_next", "phi3", "phi3_5", "qwen2_5", "qwen2_5_vl",
    "qwen3_instruct_2507", "qwen3_vl", "smolvlm",
}  # fmt: skip


def templates():
    spec = importlib.util.find_spec("trl")
    if spec is None or spec.origin is None:
        return []
    folder = Path(spec.origin).parent / "chat_templates"
    return sorted(path for path in folder.glob("*.jinja") if not path.stem.endswith("_training"))


def make_renderer(path, **arguments):
    ends = next(ends for name, ends in ENDS.items() if path.stem.startswith(name))
    text = path.read_text()
    tokenizer = make_tokenizer(text)
    marks = set(re.findall(r"<[|\uff5c][^<>'\"{} ]+>|<[^<>'\"{} /|]+[|]>|<[a-z_]+of[a-z_]+>", text))
    tokenizer.add_special_tokens({"additional_special_tokens": sorted(marks | set(ends))})
    tokenizer.eos_token = ends[0]
    renderer = Renderer.create(tokenizer, chat_template_kwargs=arguments)
    numbers = frozenset(tokenizer.convert_tokens_to_ids(ends))
    return Renderer(tokenizer=renderer.tokenizer, end_token_ids=numbers, chat_template_kwargs=arguments)


def encode(path, kind, renderer):
    row = {"messages": KINDS[kind]} | ({"tools": TOOLS} if kind == "tools" else {})
    # As JSON texts, so that Arrow does not give every message all keys.
    table = datasets.Dataset.from_list([{name: json.dumps(cell) for name, cell in row.items()}])
    (example,) = build_examples(DatasetSpec(train="x"), [table], None, renderer).train
    return example, mask_examples([example], renderer, None)


def check(kind, renderer, example, encoded):
    """Every answer is trained once, after exactly the tokens that generation starts from."""
    tokenizer, able = renderer.tokenizer, renderer.capabilities
    messages, tools = able.adapt(parse_messages(KINDS[kind], "here")), TOOLS if kind == "tools" else None
    supervised = sum(int(row.supervised.sum()) for row in encoded)
    covered = 0
    for place, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = tokenizer.apply_chat_template(
            messages[:place],
            tools=tools,
            add_generation_prompt=True,
            return_dict=False,
            **renderer.chat_template_kwargs,
        )
        (row,) = [
            row
            for row in encoded
            if row.input_ids[: len(prompt)].tolist() == prompt
            and row.supervised[len(prompt)]
            and not row.supervised[len(prompt) - 1]
        ]
        tokens = row.input_ids.tolist()
        stop = next(at + 1 for at in range(len(prompt), len(tokens)) if tokens[at] in renderer.end_token_ids)
        assert row.supervised[len(prompt) : stop].all()
        assert stop == len(tokens) or not row.supervised[stop]
        covered += stop - len(prompt)
        answer = tokenizer.decode(tokens[len(prompt) : stop])
        wanted = ["install", "vim"] if KINDS[kind][place].get("tool_calls") else [KINDS[kind][place]["content"]]
        thought = KINDS[kind][place].get("reasoning_content")
        if thought is not None and (able.close is not None or CLOSE in renderer.template):
            wanted.append(thought)
        assert all(word in answer for word in wanted), answer
        asked = tokenizer.decode(prompt)
        assert KINDS[kind][0]["content"] in asked
        assert kind != "tools" or place < 2 or "installed" in asked
    assert covered == supervised
    assert encoded.unended == ()
    report = preflight(Examples(train=[example], eval=[]), encoded, None, renderer)
    assert [str(error) for error in report.errors] == []


def outcome(path, kind):
    """`trained`, `trained without the thought` where the template does not write it, or the reason of the refusal."""
    renderer = make_renderer(path, **ARGUMENTS.get((path.stem, kind.split()[0]), {}))
    try:
        example, encoded = encode(path, kind, renderer)
    except DatasetError as error:
        return str(error)
    check(kind, renderer, example, encoded)
    thinks = renderer.capabilities.close is not None or CLOSE in renderer.template
    return "trained" if thinks or not kind.startswith("thinking") else "trained without the thought"


def test_templates_train_what_generation_sees():
    paths = templates()
    if not paths:
        pytest.skip("`make proofs` installs trl")
    results = {(path.stem, kind): outcome(path, kind) for path in paths for kind in KINDS}
    names = {path.stem for path in paths}
    refused = {kind: {name for name in names if not results[name, kind].startswith("trained")} for kind in KINDS}
    silent = {name for name in names if results[name, "thinking"] != "trained"}
    print(f"{len(names)} templates; trained: { ({kind: len(names) - len(refused[kind]) for kind in KINDS}) }")
    assert len(names) >= 41
    assert refused["single turn"] == refused["several turns"] == set()
    assert refused["system"] == {"gemma"}
    assert "System role not supported" in results["gemma", "system"]
    assert refused["thinking"] == refused["thinking in several turns"] == set()
    assert silent == NO_THOUGHTS
    assert refused["tools"] == NO_CALLS
    for name in NO_CALLS:
        assert "does not write tool_calls" in results[name, "tools"] or "refuses" in results[name, "tools"]


def test_a_mode_that_does_not_think_is_refused_with_the_argument_that_helps():
    paths = [path for path in templates() if path.stem == "qwen3_5_nothink"]
    if not paths:
        pytest.skip("`make proofs` installs trl")
    with pytest.raises(DatasetError, match=r"set dataset.chat_template_kwargs: \{enable_thinking: true\}"):
        encode(paths[0], "thinking", make_renderer(paths[0]))

"""A tiny base learns to call tools from chats with `tool_calls` and `tools`, and calls them on rows it has not seen."""

import json
import random

import pytest
from helpers.project import make_project
from helpers.tiny import make_base

TEMPLATE = (
    "{% if tools %}<|im_start|>tools\n{% for tool in tools %}{{ tool.function.name }} {% endfor %}<|im_end|>\n"
    "{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content or '' }}"
    "{% for call in message.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
VERBS = ["install", "remove", "update"]
PACKAGES = ["vim", "git", "nginx", "bash", "curl", "mutt", "gimp", "rust"]
HOSTS = ["alpha", "beta", "gamma", "delta", "omega", "sigma"]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": verb,
            "description": f"{verb} a package",
            "parameters": {
                "type": "object",
                "properties": {"package": {"type": "string"}, "host": {"type": "string"}},
                "required": ["package", "host"],
            },
        },
    }
    for verb in VERBS
]
DEFINITION = """\
version: 1
name: calls
base_model: ./tools-base
quantization: {{bnb_4bit_compute_dtype: float32}}
lora: {{r: 64, lora_alpha: 64, target_modules: all-linear}}
dataset: {{train: rows.jsonl, eval: {eval}}}
training: {{max_steps: {steps}, per_device_train_batch_size: 16, learning_rate: {rate}, warmup_steps: 20,
           max_length: 160, logging_steps: 50}}
evaluation: {{metrics: [loss, exact_match], max_new_tokens: 90}}
register: {{name: calls, alias: best}}
"""


def call(verb, package, host):
    return {"name": verb, "arguments": {"package": package, "host": host}}


def row(verb, package, host):
    called = {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"type": "function", "function": call(verb, package, host)}],
    }
    return {"messages": [{"role": "user", "content": f"{verb} {package} on {host}"}, called], "tools": TOOLS}


def learn(tmp_path, rows, eval, steps, rate):
    project = make_project(tmp_path)
    make_base(project.directory / "tools-base", chat_template=TEMPLATE, hidden_size=128)
    (project.directory / "rows.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    (project.directory / "calls.yaml").write_text(DEFINITION.format(eval=eval, steps=steps, rate=rate))
    (arm,) = json.loads(run(project, "run", "calls.yaml", "--json").stdout)["arms"]
    return project, arm["metrics"]


def run(project, *arguments):
    done = project.run(*arguments, env={"RANKWISE_COMPUTE_DTYPE": "float32", "CUDA_VISIBLE_DEVICES": ""}, timeout=1500)
    assert done.returncode == 0, f"{arguments}\n{done.stdout}\n{done.stderr}"
    return done


def answers(project, rows):
    (project.directory / "ask.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    run(project, "predict", "--model", "models:/calls@best", "--max-new-tokens", "90", "ask.jsonl", "out.jsonl")
    lines = (project.directory / "out.jsonl").read_text().splitlines()
    return [json.loads(line)["text"] for line in lines]


def wanted(each):
    function = each["messages"][1]["tool_calls"][0]["function"]
    return f"<tool_call>{json.dumps(function)}</tool_call>"


def test_calls_that_were_learned_are_made_again_from_the_same_file(tmp_path):
    rows = [row(VERBS[place % 3], PACKAGES[place], HOSTS[place % 6]) for place in range(8)]
    project, metrics = learn(tmp_path, rows, "rows.jsonl", 120, "1e-2")
    assert metrics["eval.exact_match"]["value"] == 1.0
    # With and without the call that is asked for; arguments as JSON text.
    asked = [{**each, "messages": each["messages"][:1]} for each in rows[:4]]
    texts = json.loads(json.dumps(rows[4:]))
    for each in texts:
        function = each["messages"][1]["tool_calls"][0]["function"]
        function["arguments"] = json.dumps(function["arguments"])
    assert answers(project, [*asked, *texts]) == [wanted(each) for each in rows]


@pytest.mark.proof
def test_the_right_tool_is_called_on_rows_that_were_not_seen(tmp_path):
    everything = [(verb, package, host) for verb in VERBS for package in PACKAGES for host in HOSTS]
    rows = [row(*each) for each in random.Random(0).sample(everything, len(everything))]
    _, metrics = learn(tmp_path, rows, "{split_from: train, rows: 40}", 700, "3e-3")
    exact = metrics["eval.exact_match"]
    print(f"exact match on held-out rows: {exact['value']:.1%} of {exact['n']}")
    assert exact["n"] == 40
    assert exact["value"] > 0.9

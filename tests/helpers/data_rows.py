"""Small tables, definitions and examples for the tests of `rankwise.data`."""

from __future__ import annotations

from typing import Any

from hypothesis import settings
from hypothesis import strategies as st

from helpers.tiny import make_tokenizer
from rankwise.data.chat import Message, answer_turns
from rankwise.data.rows import Example
from rankwise.data.template import Renderer
from rankwise.experiment.schema import DatasetSpec

QUICK = settings(max_examples=60, deadline=None, database=None)
PROMPT = "carat {carat}, cut {cut}"
COMPLETION = "Price is ${price}"

# As SmolLM2's: a system message of its own where the conversation brings none.
DEFAULT_SYSTEM = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# Leaves out the thinking of all answers but the last, as reasoning models' templates do.
FORGETS_THINKING = (
    "{% for message in messages %}{% set content = message['content'] %}"
    "{% if message['role'] == 'assistant' and not loop.last %}{% set content = content.split('</think>')[-1] %}"
    "{% endif %}{{ '<|im_start|>' + message['role'] + '\n' + content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

words = st.text(alphabet=st.characters(codec="utf-8", exclude_categories=("Cs",)), min_size=1, max_size=12)


def chat(*turns: tuple[str, str]) -> tuple[Message, ...]:
    return tuple(Message(role=role, content=content) for role, content in turns)


def make_renderer(chat_template: str | None = None, **changes: Any) -> Renderer:
    tokenizer = make_tokenizer()
    for name, value in changes.items():
        setattr(tokenizer, name, value)
    return Renderer.create(tokenizer, chat_template)


def make_example(renderer: Renderer, messages: tuple[Message, ...], row_id: str = "0") -> Example:
    turn = answer_turns(messages)[-1]
    return Example(
        id=row_id,
        messages=messages,
        prompt=renderer.texts([messages[:turn]], add_generation_prompt=True)[0],
        completion=messages[turn]["content"],
    )


def ask(renderer: Renderer, prompt: str, completion: str, row_id: str = "0") -> Example:
    return make_example(renderer, chat(("user", prompt), ("assistant", completion)), row_id)


def definition(**changes: Any) -> DatasetSpec:
    values: dict[str, Any] = {"train": "rows.csv", "prompt": PROMPT, "completion": COMPLETION} | changes
    return DatasetSpec.model_validate({name: value for name, value in values.items() if value is not None})


def table(rows: list[dict[str, Any]]) -> Any:
    import datasets

    return datasets.Dataset.from_list(rows)


def diamonds(count: int, distinct: int = 1000) -> list[dict[str, Any]]:
    cuts = ("Ideal", "Premium", "Good")
    return [
        {"carat": round(0.2 + row % distinct / 100, 2), "cut": cuts[row % distinct % 3], "price": 300 + row}
        for row in range(count)
    ]

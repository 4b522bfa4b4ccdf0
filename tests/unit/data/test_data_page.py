"""The reference page of data: every example is read as it says."""

import re
from pathlib import Path

import pytest
import yaml
from helpers.data_rows import make_renderer

from rankwise.assets.dataset import resolve_data
from rankwise.data.documents import windows
from rankwise.data.preflight import is_documents
from rankwise.data.rows import load_examples
from rankwise.data.tables import KINDS
from rankwise.data.token_preview import pieces
from rankwise.data.tokens import encode
from rankwise.experiment.schema import DatasetSpec
from rankwise.settings import Settings

PAGE = Path(__file__).parents[3] / "platform" / "docs" / "reference" / "data.md"
# ChatML with tools.
TEMPLATE = (
    "{% if tools %}<|im_start|>tools\n{{ tools | map(attribute='function') | list | tojson }}<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content or '' }}"
    "{% for call in message.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MAX_LENGTH = 500


def examples():
    """Of each example: its title, the file, its content or a program that writes it, the definition, what is shown."""
    for section in re.split(r"^#{2,3} ", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE):
        fences = dict(re.findall(r"^```(\w+)\n(.*?)^```$", section, flags=re.MULTILINE | re.DOTALL))
        if "text" not in fences:
            continue
        (name,) = re.findall(r"^`(\w+\.\w+)`[:,]", section, flags=re.MULTILINE)
        source = fences.get(name.rpartition(".")[2], fences.get("python"))
        yield section.partition("\n")[0], name, source, fences["yaml"], fences["text"]


def shown(name, source, definition, folder, monkeypatch):
    """The rows of an example, what is learned between brackets."""
    monkeypatch.chdir(folder)
    settings = Settings.load({"RANKWISE_HOME": str(folder / "home"), "RANKWISE_CACHE": str(folder / "cache")})
    if name.endswith(".parquet"):
        exec(source, {})
    else:
        (folder / name).write_text(source, encoding="utf-8")
    dataset = DatasetSpec.model_validate(yaml.safe_load(definition)["dataset"])
    renderer = make_renderer(TEMPLATE)
    data = resolve_data(dataset.train, None, settings)
    rows = load_examples(dataset, [data], None, renderer, settings).train
    if is_documents(rows):
        encoded = windows(rows, renderer, MAX_LENGTH, joined=True)
    else:
        encoded = encode(rows, renderer, MAX_LENGTH, supervise=dataset.supervise)
    texts = []
    for row in encoded:
        text = "".join(
            f"⟦{piece.text}⟧" if piece.supervised else piece.text for piece in pieces(row, renderer.tokenizer)
        )
        texts.append(text.replace("⟧⟦", "").rstrip("\n"))
    return "\n\n".join(texts) + "\n"


@pytest.mark.parametrize("example", list(examples()), ids=lambda example: example[0])
def test_an_example_is_read_as_it_says(example, tmp_path, monkeypatch):
    _, name, source, definition, expected = example
    assert shown(name, source, definition, tmp_path, monkeypatch) == expected


def test_every_type_of_file_is_named():
    page = PAGE.read_text(encoding="utf-8")
    assert all(f"`{suffix}`" in page for suffix in KINDS)


def test_every_format_has_an_example():
    page = PAGE.read_text(encoding="utf-8")
    formats = DatasetSpec.model_fields["format"].annotation.__args__
    assert all(f"| `{name}` |" in page for name in formats if name != "auto")
    assert len(list(examples())) >= 11

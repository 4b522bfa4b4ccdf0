"""The reference of an experiment file says every field, as the checks have it."""

from pathlib import Path

from rankwise.experiment.editor_schema import reference
from rankwise.experiment.fields import leaves

SHIPPED = Path(__file__).parents[3] / "platform" / "docs" / "reference" / "experiment-file.md"


def row(key, section):
    table = reference().partition(f"## {section}\n")[2].partition("\n## ")[0]
    (line,) = [line for line in table.splitlines() if line.startswith(f"| `{key}` |")]
    return [cell.strip() for cell in line.strip("| ").split(" | ")]


def test_every_field_has_a_row():
    text = reference()
    for path in leaves():
        section, _, key = path.rpartition(".")
        table = text.partition(f"## `{section}`\n" if section else "## The top level\n")[2].partition("\n## ")[0]
        assert f"| `{key}` |" in table, path


def test_a_row_says_what_is_allowed_and_the_default():
    assert row("r", "`lora`") == ["`r`", "*e*, *s*", "Rank.", "a whole number of at least 1", "required"]
    assert row("bnb_4bit_quant_type", "`quantization`")[3:] == ["nf4 or fp4", "`nf4`"]
    assert row("training", "The top level")[3] == "see `training` below"


def test_the_shipped_reference_is_this_one():
    assert SHIPPED.read_text() == reference(), "rankwise schema --markdown > platform/docs/reference/experiment-file.md"

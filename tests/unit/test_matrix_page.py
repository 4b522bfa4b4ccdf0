"""The generated page of the architecture matrix."""

from pathlib import Path

from helpers.architectures import ARCHITECTURES, WRAPPERS
from helpers.matrix_page import COLUMNS, page

PAGE = Path(__file__).parents[2] / "platform" / "docs" / "reference" / "architectures.md"


def test_a_row_has_every_check_and_failures_keep_their_reason():
    text = page({"b": dict.fromkeys(COLUMNS, "equal"), "a": {"load": "eager", "export": "TypeError: a | b"}})
    first, second = text.splitlines()[-4:-2]
    assert first == "| `a` | eager |  |  |  |  |  | TypeError: a \\| b |"
    assert second == "| `b` |" + " equal |" * len(COLUMNS)
    assert text.endswith("\n\n2 architectures.\n")


def test_the_shipped_page_has_every_architecture_and_no_failure():
    text = PAGE.read_text()
    for name in (*ARCHITECTURES, *WRAPPERS):
        assert f"| `{name}` | " in text, f"{name}: generate the page again"
    assert "Error" not in text

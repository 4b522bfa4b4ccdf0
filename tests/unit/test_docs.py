"""The documentation says what is so: messages that are quoted exist, and the map has every module."""

import ast
import re
from pathlib import Path

import pytest
from helpers.module_map import module_map

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "platform" / "docs"
SOURCES = ROOT / "platform" / "rankwise"
# Said by MLflow, not by rankwise.
FOREIGN = {"Invalid Host header"}


def texts():
    """All string constants of the program; what an f-string fills in is a gap."""
    found = []
    for path in SOURCES.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                found.append("\0".join(part.value for part in node.values if isinstance(part, ast.Constant)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(found)


def test_messages_that_troubleshooting_quotes_exist():
    rows = re.findall(r"^\| (.+?) \|", (DOCS / "troubleshooting.md").read_text(), re.MULTILINE)
    quoted = [quote for row in rows for quote in re.findall(r"`([^`]+)`", row)]
    assert len(quoted) >= 20
    said = texts()
    assert [quote for quote in quoted if quote not in said and quote not in FOREIGN] == []


def test_the_map_has_every_module_with_its_first_sentence():
    assert (DOCS / "modules.md").read_text() == module_map(), (
        "PYTHONPATH=tests python -m helpers.module_map > platform/docs/modules.md"
    )


def test_layers_are_those_that_import_linter_holds():
    import tomllib

    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    layers = next(contract["layers"] for contract in contracts if contract["type"] == "layers")
    text = (DOCS / "architecture.md").read_text()
    assert "\n".join(layer for layer in layers if layer != "__main__") in text


@pytest.mark.parametrize("page", sorted(path.name for path in DOCS.glob("*.md")))
def test_links_between_pages_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", (DOCS / page).read_text()):
        assert (DOCS / target).exists(), target

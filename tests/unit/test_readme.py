"""The README says what is so."""

from pathlib import Path

from rankwise.cli.main import _COMMANDS

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def block(name: str) -> str:
    text = README.partition(f"<!-- {name}:begin -->")[2].partition(f"<!-- {name}:end -->")[0].strip()
    assert text.startswith("```"), name
    return text.partition("\n")[2].removesuffix("```")


def test_the_definition_is_the_one_that_is_shipped():
    assert block("definition") == (ROOT / "experiments" / "diamonds-rank.yaml").read_text()


def test_every_command_is_told():
    assert [name for name in _COMMANDS if f"`rankwise {name}" not in README and f"`{name}" not in README] == []


def test_every_package_is_told():
    packages = [path.parent.name for path in (ROOT / "platform" / "rankwise").glob("*/__init__.py")]
    assert [name for name in packages if f"| `{name}/` |" not in README] == []


def test_the_outputs_are_there():
    assert "27,262,976" in block("llama-plan")
    assert "base" in block("main-job")

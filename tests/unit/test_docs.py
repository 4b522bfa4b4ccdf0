"""The documentation says what is so: commands, messages, variables, codes, links and examples."""

import ast
import importlib
import re
import tomllib
from pathlib import Path

import click
import pytest
from helpers.definitions import DEFINITION

from rankwise.cli.main import _COMMANDS, BROKEN_PIPE, INTERRUPTED, cli
from rankwise.exceptions import RankwiseError
from rankwise.experiment.document import read_document
from rankwise.experiment.experiment import parse_experiment

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "platform" / "docs"
SOURCES = ROOT / "platform" / "rankwise"
README = ROOT / "README.md"
CONTRIBUTING = ROOT / ".github" / "CONTRIBUTING.md"
PAGES = [README, CONTRIBUTING, *sorted(DOCS.rglob("*.md"))]
# Messages of MLflow that troubleshooting quotes.
FOREIGN = {"Invalid Host header"}
# Set by a worker for its own children, so not part of the interface.
INTERNAL = {"RANKWISE_WORK", "RANKWISE_UMASK"}
# The data files that the examples name.
DATA = {
    "orders.csv": "customer,article,quantity,price,total\nAnn,plums,2,3,6\n",
    "sums.csv": "a;b;sum\n1;2;3\n",
    "chats.jsonl": '{"messages": [{"role": "user", "content": "4 at 9?"}, {"role": "assistant", "content": "36"}]}\n',
}
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_SNIPPET = re.compile(r'^--8<-- "(.+)"$', re.MULTILINE)
_MARK = re.compile(r"<!-- ([a-z-]+):(begin|end) -->")


def of_page(path):
    return path.relative_to(ROOT).as_posix()


def fences(path, *languages):
    """Code blocks in these languages, with the files that they include."""
    for language, text in _FENCE.findall(path.read_text()):
        if language in languages:
            yield _SNIPPET.sub(lambda match: (ROOT / match[1]).read_text().rstrip("\n"), text)


def block(page, name):
    """The code block between two marks."""
    text = page.read_text().partition(f"<!-- {name}:begin -->")[2].partition(f"<!-- {name}:end -->")[0].strip()
    assert text.startswith("```"), name
    return text.partition("\n")[2].removesuffix("```")


def prose(path):
    """A page without its code blocks."""
    return _FENCE.sub("", path.read_text())


def anchors(path):
    """The anchors of a page's headings, as mkdocs and GitHub both make them."""
    found = {"": 0}
    for title in re.findall(r"^#+ (.+)$", prose(path), re.MULTILINE):
        slug = re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", title).strip().lower())
        found[slug] = found.get(slug, 0) + 1
    return found


def links(path):
    """Targets of a page's links and pictures that are no URLs."""
    targets = re.findall(r"\]\(([^)\s]+)\)", prose(path))
    return [target for target in targets if not re.match(r"[a-z]+:", target)]


def texts():
    """All string constants of the program; what an f-string fills in is a gap."""
    constants = []
    for path in SOURCES.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                constants.append("\0".join(part.value for part in node.values if isinstance(part, ast.Constant)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                constants.append(node.value)
    return "\n".join(constants)


def test_the_readme_can_be_read_in_five_minutes():
    assert len(README.read_text().splitlines()) <= 200


@pytest.mark.parametrize("page", PAGES, ids=of_page)
def test_links_and_anchors_resolve(page):
    for target in links(page):
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        assert file.exists(), target
        assert not anchor or anchors(file).get(anchor) == 1, target


def test_the_navigation_has_every_page_once():
    named = re.findall(r"([\w/-]+\.md)$", (ROOT / "platform" / "mkdocs.yml").read_text(), re.MULTILINE)
    assert sorted(named) == sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))


@pytest.mark.parametrize("page", PAGES, ids=of_page)
def test_marks_enclose_one_block_of_output_each(page):
    marks = _MARK.findall(page.read_text())
    names = [name for name, side in marks if side == "begin"]
    assert marks == [(name, side) for name in names for side in ("begin", "end")]
    assert len(set(names)) == len(names)
    for name in names:
        assert block(page, name).count("```") == 0, name


def test_the_definition_in_the_tutorial_is_the_one_that_is_shipped():
    shipped = (ROOT / "experiments" / "diamonds-rank.yaml").read_text()
    assert block(DOCS / "tutorial.md", "definition") == shipped


def test_the_outputs_are_there():
    assert "27,262,976" in block(DOCS / "how-to" / "gpu.md", "llama-plan")
    assert "base" in block(README, "main-job")
    assert block(README, "main-job") == block(DOCS / "tutorial.md", "main-job")


def definitions():
    # The examples of the page of data come with their files, and have a test of their own (data/test_data_page.py).
    pages = [page for page in PAGES if page != DOCS / "reference" / "data.md"]
    return [(page, number, text) for page in pages for number, text in enumerate(fences(page, "yaml"))]


@pytest.mark.parametrize(
    ("page", "number", "text"), definitions(), ids=[f"{of_page(page)}-{number}" for page, number, _ in definitions()]
)
def test_every_experiment_in_the_documentation_is_valid(page, number, text, tmp_path):
    directory = ROOT / "experiments"
    if "configs/" not in text:
        directory = tmp_path
        for name, content in DATA.items():
            (tmp_path / name).write_text(content)
    document, problems = read_document(text, of_page(page))
    assert not problems
    if "version" not in document.data:  # some sections: the rest is that of a small definition
        kept = re.split(r"^(?=\w)", DEFINITION, flags=re.MULTILINE)
        text += "".join(part for part in kept if part.partition(":")[0] not in document.data)
    parse_experiment(text, of_page(page), directory=directory)


def commands():
    """The lines of code blocks that call rankwise, as (page, arguments)."""
    for page in PAGES:
        for text in fences(page, ""):
            for line in text.replace("\\\n", " ").splitlines():
                match = re.match(r"(?:\w+=\S+ )*rankwise (.+)$", line)
                if match:
                    yield page, match[1].partition(" #")[0].split()


def command(arguments):
    """The click command that arguments lead to, and what is left of them."""
    node = cli
    while arguments and isinstance(node, click.Group):
        node = node.get_command(click.Context(cli), arguments[0])
        assert node is not None, arguments
        arguments = arguments[1:]
    return node, arguments


def test_commands_in_the_documentation_have_the_options_that_they_are_given():
    called = list(commands())
    assert len(called) >= 50
    for page, arguments in called:
        node, rest = command(arguments)
        options = {name for parameter in node.params for name in (*parameter.opts, *parameter.secondary_opts)}
        unknown = [word for word in rest if word.startswith("-") and word.partition("=")[0] not in options]
        assert not unknown, (of_page(page), arguments)


def test_every_command_is_told():
    told = "\n".join(page.read_text() for page in PAGES)
    assert [name for name in _COMMANDS if f"rankwise {name}" not in told] == []


def test_the_reference_of_the_command_line_comes_from_the_commands():
    fields = dict(re.findall(r"^    :(\w+): (.+)$", (DOCS / "reference" / "cli.md").read_text(), re.MULTILINE))
    assert getattr(importlib.import_module(fields["module"]), fields["command"]) is cli
    assert cli.list_commands(click.Context(cli)) == list(_COMMANDS)


def names_in(module):
    """What a module defines or imports at its top level, without importing it (and torch)."""
    path = SOURCES.parent.joinpath(*module.split("."))
    file = path.with_suffix(".py") if path.with_suffix(".py").is_file() else path / "__init__.py"
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.ImportFrom):
            names.update(alias.asname or alias.name for alias in node.names)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
    return names


def test_the_reference_of_the_python_api_names_what_is_there():
    text = (DOCS / "reference" / "python.md").read_text()
    named = re.findall(r"^::: (\S+)\n(?:    options:\n)?((?:      .+\n)*)", text, re.MULTILINE)
    assert len(named) >= 4
    for path, options in named:
        module, _, name = path.rpartition(".")
        if name[0].isupper():
            assert name in names_in(module), path
        for members in re.findall(r"members: \[(.+)\]", options):
            assert set(members.split(", ")) <= names_in(path), path


def test_every_package_is_told():
    packages = [path.parent.name for path in SOURCES.glob("*/__init__.py")]
    text = (DOCS / "explanation" / "architecture.md").read_text()
    assert [name for name in packages if f"| `{name}/` |" not in text] == []


def test_layers_are_those_that_import_linter_holds():
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    layers = next(contract["layers"] for contract in contracts if contract["type"] == "layers")
    text = (DOCS / "explanation" / "architecture.md").read_text()
    assert "\n".join(layer for layer in layers if layer != "__main__") in text


def test_every_variable_is_told():
    names = set(re.findall(r'"(RANKWISE_[A-Z_]+)"', (SOURCES / "settings.py").read_text())) - INTERNAL
    assert len(names) >= 9
    text = (DOCS / "reference" / "environment.md").read_text()
    assert [name for name in sorted(names) if f"`{name}`" not in text] == []


def test_every_exit_code_is_told():
    def tree(error):
        return [error, *(below for child in error.__subclasses__() for below in tree(child))]

    codes = {0, INTERRUPTED, BROKEN_PIPE, *(error.exit_code for error in tree(RankwiseError))}
    told = re.findall(r"^\| (\d+) \|", (DOCS / "reference" / "exit-codes.md").read_text(), re.MULTILINE)
    assert sorted(map(int, told)) == sorted(codes)


def test_messages_that_troubleshooting_quotes_exist():
    rows = re.findall(r"^\| (.+?) \|", (DOCS / "troubleshooting.md").read_text(), re.MULTILINE)
    quoted = [quote for row in rows for quote in re.findall(r"`([^`]+)`", row)]
    assert len(quoted) >= 20
    said = texts()
    assert [quote for quote in quoted if quote not in said and quote not in FOREIGN] == []

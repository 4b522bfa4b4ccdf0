"""The map of modules in the documentation: the first sentence of each module's docstring.

PYTHONPATH=tests python -m helpers.module_map > platform/docs/modules.md
"""

import ast
from itertools import groupby
from pathlib import Path

_ROOT = Path(__file__).parents[2] / "platform" / "rankwise"
_HEAD = """\
# Modules

One line for each, out of its docstring: `PYTHONPATH=tests python -m helpers.module_map`. What may import what is in
[architecture.md](architecture.md).
"""


def module_map() -> str:
    files = sorted(path for path in _ROOT.rglob("*.py") if path.name != "__main__.py")
    parts = [_HEAD]
    for folder, modules in groupby(files, key=lambda path: path.parent):
        name = folder.relative_to(_ROOT).as_posix()
        own = list(modules)
        title = "rankwise" if name == "." else f"{name}/"
        about = next((_about(path) for path in own if path.name == "__init__.py"), "")
        parts.append(f"## `{title}`\n\n{about}\n")
        parts += [f"- `{path.stem}`: {_about(path)}" for path in own if path.name != "__init__.py"]
        parts.append("")
    return "\n".join(parts)


def _about(path: Path) -> str:
    text = ast.get_docstring(ast.parse(path.read_text())) or ""
    return " ".join(text.partition("\n\n")[0].split())


if __name__ == "__main__":
    print(module_map(), end="")

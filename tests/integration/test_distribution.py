"""The wheel and the source distribution: what is in them, and that the wheel works without the checkout.

Building fetches the build backend from the package index; `make proofs` runs this.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from helpers.project import make_project

from rankwise import __version__

pytestmark = pytest.mark.proof
ROOT = Path(__file__).parents[2]


def run(*command: str | Path, cwd: Path, env: dict[str, str] | None = None) -> str:
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{command}: exit {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def files(directory: Path) -> set[str]:
    paths = (path for path in directory.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {path.relative_to(directory).as_posix() for path in paths}


@pytest.fixture(scope="module")
def distributions(tmp_path_factory):
    """The source distribution, and the wheel that is built from it."""
    directory = tmp_path_factory.mktemp("distributions")
    run(sys.executable, "-m", "build", "--outdir", directory, ROOT, cwd=directory)
    return directory / f"rankwise-{__version__}.tar.gz", directory / f"rankwise-{__version__}-py3-none-any.whl"


@pytest.fixture(scope="module")
def command(distributions, tmp_path_factory):
    """`rankwise` in a new environment: the wheel, and the dependencies of the environment that runs the tests."""
    directory = tmp_path_factory.mktemp("installed") / "venv"
    run(sys.executable, "-m", "venv", "--without-pip", directory, cwd=ROOT)
    python = directory / "bin" / "python"
    run(
        sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index",
        "--disable-pip-version-check", distributions[1], cwd=ROOT,
    )  # fmt: skip
    packages = [path for path in sys.path if path.endswith("site-packages")]
    assert packages
    (site,) = directory.glob("lib/python*/site-packages")
    (site / "zz_dependencies.pth").write_text("\n".join(packages) + "\n")
    where = run(python, "-I", "-c", "import rankwise; print(rankwise.__file__)", cwd=directory).strip()
    assert where == str(site / "rankwise" / "__init__.py")
    return directory / "bin" / "rankwise"


def test_an_index_accepts_both(distributions):
    run(sys.executable, "-m", "twine", "check", "--strict", *distributions, cwd=ROOT)


def test_the_wheel_has_the_whole_package_and_the_examples_and_nothing_else(distributions):
    names = set(zipfile.ZipFile(distributions[1]).namelist())
    info = {name for name in names if name.startswith(f"rankwise-{__version__}.dist-info/")}
    assert f"rankwise-{__version__}.dist-info/licenses/LICENSE" in info
    package, examples = files(ROOT / "platform" / "rankwise"), files(ROOT / "experiments")
    assert names - info == {f"rankwise/{name}" for name in package} | {f"rankwise/examples/{name}" for name in examples}
    # Files that are not Python, and code that nothing imports by its name.
    suffixes = {Path(name).suffix for name in package}
    assert {".j2", ".css", ".js", ".mako", ".json"} <= suffixes
    assert "py.typed" in package
    assert any(name.startswith("jobs/migrations/versions/") for name in package)
    assert {"diamonds-rank.yaml", "configs/smollm2-135m.json", "schema.json"} <= examples


def test_the_source_distribution_has_the_package_the_tests_and_the_examples(distributions):
    with tarfile.open(distributions[0]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "README.md", "LICENSE", "constraints.txt", "experiments/diamonds-rank.yaml"} <= names
    assert {"platform/rankwise/__init__.py", "tests/integration/test_distribution.py"} <= names
    assert not [name for name in names if name.startswith((".venv", "mlruns", "dist"))]


def test_the_wheel_plans_the_shipped_example_from_an_empty_directory(command, tmp_path):
    assert run(command, "examples", "diamonds-rank", cwd=tmp_path) == "diamonds-rank.yaml\n"
    assert "4 arms" in run(command, "validate", "diamonds-rank.yaml", cwd=tmp_path)
    document = json.loads(run(command, "plan", "diamonds-rank.yaml", "--json", cwd=tmp_path))
    assert [arm["estimates"]["adapter_parameters"] for arm in document["arms"]][2] == 921_600


def test_the_wheel_runs_an_experiment_and_writes_its_report(command, tmp_path):
    project = make_project(tmp_path, fresh=True)
    comparison = json.loads(run(command, "run", "tiny.yaml", "--json", cwd=tmp_path, env=project.environment()))
    assert [arm["status"] for arm in comparison["arms"]] == ["FINISHED", "FINISHED"]
    run(command, "report", "tiny", "--output", "report.html", cwd=tmp_path, env=project.environment())
    assert "tiny" in (tmp_path / "report.html").read_text()

from __future__ import annotations

import subprocess
import sys
import zipfile
from importlib import metadata

from packaging.version import Version

from rankwise.flavor.card import library_versions, pip_requirements


def test_requirements_name_exact_public_versions_and_the_wheel_by_its_relative_path(tmp_path):
    lines = pip_requirements(tmp_path)
    assert f"torch=={Version(metadata.version('torch')).public}" in lines
    assert not any("+" in line for line in lines if not line.startswith("wheels/"))
    wheel = lines[-1]
    assert wheel.startswith("wheels/rankwise-")
    assert (tmp_path / wheel).is_file()


def test_the_wheel_of_one_source_is_the_same_to_the_byte(tmp_path):
    one, two = pip_requirements(tmp_path / "a")[-1], pip_requirements(tmp_path / "b")[-1]
    assert one == two
    assert (tmp_path / "a" / one).read_bytes() == (tmp_path / "b" / two).read_bytes()


def test_pip_installs_the_wheel_and_python_imports_it(tmp_path):
    wheel = tmp_path / pip_requirements(tmp_path)[-1]
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-compile", "--target",
         str(tmp_path / "site"), "--disable-pip-version-check", str(wheel)],
        check=True,
    )  # fmt: skip
    found = subprocess.run(
        [sys.executable, "-S", "-c", "import sys; sys.path.insert(0, sys.argv[1]); import rankwise.exceptions as e; "
         "print(e.__file__)", str(tmp_path / "site")],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    assert found.stdout.startswith(str(tmp_path / "site"))
    assert not [name for name in zipfile.ZipFile(wheel).namelist() if "__pycache__" in name]


def test_library_versions_keep_local_labels():
    assert library_versions()["torch"] == metadata.version("torch")

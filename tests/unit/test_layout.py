"""What must hold of the tree itself."""

import pickle
import subprocess
import sys
from pathlib import Path

import rankwise.exceptions as exceptions

ROOT = Path(__file__).parents[2]


def test_platform_is_a_source_root_and_not_a_package():
    assert not (ROOT / "platform" / "__init__.py").exists()
    # From the root, where `platform/` would shadow the standard library's module if it were a package.
    done = subprocess.run(
        [sys.executable, "-c", "import platform; print(platform.system())"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.strip() == "Linux"


def test_the_command_starts_without_the_heavy_libraries():
    heavy = ["torch", "transformers", "mlflow", "datasets", "peft", "sqlalchemy", "pandas"]
    code = (
        "import sys, contextlib\nfrom rankwise.cli.main import main\n"
        "with contextlib.suppress(SystemExit): main(['--help'])\n"
        f"print([name for name in {heavy} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert "Which LoRA rank does the job?" in done.stdout


def test_errors_survive_a_trip_between_processes():
    kinds = [
        kind
        for kind in vars(exceptions).values()
        if isinstance(kind, type) and issubclass(kind, exceptions.RankwiseError)
    ]
    assert len(kinds) > 10
    for kind in kinds:
        error = pickle.loads(pickle.dumps(kind("what, which value; what to do")))
        assert type(error) is kind
        assert str(error) == "what, which value; what to do"

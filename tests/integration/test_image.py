"""The image of platform/Dockerfile: its steps in their order, and what runs in it as compose.yaml runs it.

`make proofs` runs this: five minutes and more, five gigabytes of disk. Needs root and overlayfs, no container engine.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
from helpers.image import ROOT, Image, context, instructions
from helpers.project import make_project
from helpers.team import free_port

from rankwise import __version__

_ABOVE_RAYS_WORKERS = 20_000  # They take ports up to 19,999, and the head refuses one of these.


@pytest.fixture(scope="module")
def image():
    if os.geteuid() != 0:
        pytest.fail("the image's steps need root: they make users and mount file systems of their own")
    work = Path(tempfile.mkdtemp(prefix="rankwise-image-"))
    work.chmod(0o755)
    # PyTorch's own index may be out of reach; the package index of this machine serves as well.
    image = Image(work, {"DEVICE": "cpu", "TORCH_CPU_INDEX": ""})
    done = image.build()
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    yield image
    shutil.rmtree(work)


def said(image, command, **mounts):
    done = image.run(command, **mounts)
    assert done.returncode == 0, f"{command}: {done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def test_the_builder_is_sent_nothing_but_what_the_image_is_made_of(tmp_path):
    names = {str(path.relative_to(tmp_path)) for path in context(tmp_path).rglob("*") if path.is_file()}
    package = {name for name in names if name.startswith("platform/rankwise/")}
    examples = {str(path.relative_to(ROOT)) for path in (ROOT / "experiments").rglob("*") if path.is_file()}
    assert names - package == {"constraints.txt", "pyproject.toml", "README.md", "LICENSE", *examples}
    assert len(package) > 100
    assert not [name for name in package if "__pycache__" in name]


def test_only_what_was_copied_is_used(tmp_path):
    copied = [
        rest for keyword, rest in instructions((ROOT / "platform" / "Dockerfile").read_text()) if keyword == "COPY"
    ]
    assert copied == [
        "constraints.txt pyproject.toml ./",
        "README.md LICENSE ./",
        "experiments experiments",
        "platform/rankwise platform/rankwise",
        "--from=builder /opt/rankwise /opt/rankwise",
    ]


@pytest.mark.proof
def test_the_image_has_every_program_of_the_team(image):
    shown = said(image, "rankwise --version && mlflow --version && ray --version")
    assert f"rankwise, version {__version__}" in shown
    assert "mlflow, version 3." in shown
    code = "import boto3, flask_wtf, psycopg, rankwise, torch; print(rankwise.__file__, torch.__version__)"
    where, torch = said(image, f"python -I -c '{code}'").split()
    assert where.startswith("/opt/rankwise/lib/")
    assert torch.startswith("2.13.0")
    installed = {line.partition("==")[0].lower() for line in said(image, "python -m pip freeze").splitlines()}
    assert not installed & {"pytest", "mypy", "ruff", "hypothesis"}


@pytest.mark.proof
def test_nothing_in_it_is_root_and_its_files_stay_as_they_are(image):
    assert said(image, "id -u && id -g").split() == ["10001", "10001"]
    status = said(image, "cat /proc/self/status")
    assert {line.split()[1] for line in status.splitlines() if line.startswith(("CapEff", "CapPrm", "CapBnd"))} == {
        "0" * 16
    }
    assert "NoNewPrivs:\t1" in status
    for path in ("/opt/rankwise/x", "/etc/x", "/var/lib/rankwise/x"):
        assert image.run(f"touch {path}").returncode != 0, path
    assert said(image, "touch /tmp/x && echo written").strip() == "written"


@pytest.mark.proof
def test_a_sweep_runs_in_it_over_a_root_that_cannot_be_written(image, tmp_path):
    project = make_project(tmp_path / "experiments", fresh=True)
    for path in project.directory.rglob("*"):
        # safetensors writes files that only their owner, root here, may read.
        path.chmod(0o755 if path.is_dir() else 0o644)
    mounts = {"/work/experiments": project.directory}
    for name in ("/var/lib/rankwise", "/var/cache/rankwise"):
        mounts[name] = tmp_path / Path(name).parts[2]
        mounts[name].mkdir()
    said(image, "rankwise run experiments/tiny.yaml", mounts=mounts)
    compared = json.loads(said(image, "rankwise compare tiny --json", mounts=mounts))
    assert [arm["status"] for arm in compared["arms"]] == ["FINISHED", "FINISHED"]
    assert (tmp_path / "lib" / "rankwise.db").stat().st_uid == 10001


@pytest.mark.proof
def test_the_server_starts_in_it(image):
    port = free_port()
    probe = f"import urllib.request as u; u.urlopen('http://127.0.0.1:{port}/health', timeout=5)"
    script = f"""
        cd /tmp
        export MLFLOW_FLASK_SERVER_SECRET_KEY=x MLFLOW_AUTH_ADMIN_PASSWORD=not-a-short-one
        mlflow server --backend-store-uri sqlite:////tmp/mlflow.db --host 127.0.0.1 --port {port} --workers 1 \
            --app-name=basic-auth > /tmp/log 2>&1 &
        for number in $(seq 1 120); do
            if python -c "{probe}" 2> /dev/null; then echo healthy; break; fi
            sleep 1
        done
        kill $!
        wait $! || true
        tail -5 /tmp/log
    """
    assert said(image, script).startswith("healthy\n")


@pytest.mark.proof
def test_a_ray_node_starts_in_it(image):
    script = """
        cd /tmp
        export RAY_AUTH_MODE=token RAY_AUTH_TOKEN=0123456789abcdef0123456789abcdef0123456789abcdef
        ray start --head --port=PORT --num-cpus=0 --num-gpus=0 --include-dashboard=false --disable-usage-stats \\
            --block > /tmp/log 2>&1 &
        for number in $(seq 1 60); do
            if ray health-check --address 127.0.0.1:PORT 2> /dev/null; then echo healthy; exit; fi
            sleep 1
        done
        cat /tmp/log
    """.replace("PORT", str(free_port(_ABOVE_RAYS_WORKERS)))
    assert "healthy" in said(image, script)


def test_the_parser_of_the_dockerfile_reads_what_a_builder_reads():
    text = '# c\nARG A=1\nFROM x AS y\nRUN one && \\\n    two \\\n    three\nCMD ["z"]\n'
    assert instructions(text) == [
        ("ARG", "A=1"),
        ("FROM", "x AS y"),
        ("RUN", "one && two three"),
        ("CMD", '["z"]'),
    ]


def test_shell_scripts_of_the_deployment_parse():
    for script in (ROOT / "platform" / "deploy").glob("*.sh"):
        subprocess.run(["sh", "-n", str(script)], check=True)

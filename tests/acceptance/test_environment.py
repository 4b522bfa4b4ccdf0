"""What the environment can do to `rankwise run`: each a message, exit code 3, and nothing half-written."""

import textwrap

import pytest
from helpers.project import make_project


@pytest.fixture
def project(tmp_path):
    return make_project(tmp_path)


def fails(project, *arguments, code=3, env=None):
    done = project.run("run", "tiny.yaml", *arguments, env=env)
    assert done.returncode == code, f"exit {done.returncode}\n{done.stderr}"
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    return done.stderr


def inject(project, code):
    """Python code that every process of this project runs at its start, in place of a real fault."""
    (project.directory / "inject").mkdir()
    (project.directory / "inject" / "sitecustomize.py").write_text(textwrap.dedent(code))
    return {"PYTHONPATH": str(project.directory / "inject")}


def test_a_missing_file(project):
    done = project.run("run", "nowhere.yaml")
    assert done.returncode == 2
    assert "nowhere.yaml" in done.stderr
    assert "Traceback" not in done.stderr


def test_neither_a_file_nor_a_recorded_definition(project):
    done = project.run("run")
    assert done.returncode == 2
    assert "give an experiment FILE, or --from RUN_OR_MODEL_URI" in done.stderr


def test_an_unreachable_hub(project):
    told = fails(
        project,
        "--set", "base_model=nobody/nothing",
        "--set", f"base_model_revision={'a' * 40}",
        env={"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(project.directory / "hf")},
    )  # fmt: skip
    assert "nobody/nothing" in told
    assert not list((project.directory / "cache").rglob("*.safetensors"))


def test_a_hub_that_must_not_be_asked(project):
    told = fails(
        project,
        "--set", "base_model=nobody/nothing",
        "--set", f"base_model_revision={'a' * 40}",
        env={"HF_HUB_OFFLINE": "1", "HF_HOME": str(project.directory / "hf")},
    )  # fmt: skip
    assert "nobody/nothing" in told
    assert "HF_HUB_OFFLINE" in told


def test_a_wrong_digest_of_the_base(project):
    told = fails(project, "--set", f"base_model_revision=sha256:{'0' * 64}")
    assert f"sha256:{'0' * 64}" in told
    assert told.count("sha256:") >= 2, "both digests are named"
    assert not (project.home / "checkpoints").exists()


def test_a_wrong_digest_of_the_rows(project):
    told = fails(project, "--set", f"dataset.train_revision=sha256:{'0' * 64}")
    assert "train_revision" in told


def test_a_home_that_cannot_be_written(project):
    # The kernel refuses directories there, also to root.
    told = fails(project, env={"RANKWISE_HOME": "/sys/rankwise"})
    assert "/sys/rankwise" in told
    assert "RANKWISE_HOME" in told


def test_a_home_that_is_a_file(project):
    (project.directory / "occupied").write_text("mine")
    told = fails(project, env={"RANKWISE_HOME": str(project.directory / "occupied")})
    assert "a file is where a directory must be" in told
    assert (project.directory / "occupied").read_text() == "mine"


def test_a_full_disk_at_a_checkpoint(project):
    env = inject(
        project,
        """
        import errno, os
        real = os.fsync

        def fsync(descriptor):
            if "checkpoints" in os.readlink(f"/proc/self/fd/{descriptor}"):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real(descriptor)

        os.fsync = fsync
        """,
    )
    done = project.run("run", "tiny.yaml", "--set", "sweep.parameters={lora.r: [2]}", env=env)
    assert done.returncode == 3, done.stderr
    assert "free some space" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list((project.home / "checkpoints").rglob("manifest.json"))
    # With space again, the same command does the work.
    project.succeed("run", "tiny.yaml", "--set", "sweep.parameters={lora.r: [2]}")


def test_a_tracking_server_that_is_not_there(project):
    told = fails(project, env={"MLFLOW_TRACKING_URI": "http://127.0.0.1:9"})
    assert "127.0.0.1:9" in told

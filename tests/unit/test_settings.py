import os

import platformdirs
import pytest

from rankwise.exceptions import ConfigError
from rankwise.settings import Settings, compute_dtype, set_process_defaults


def test_everything_lies_in_mlruns_by_default(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = Settings.load({})
    assert settings.home == tmp_path / "mlruns"
    assert settings.tracking_uri == f"sqlite:///{tmp_path / 'mlruns' / 'mlflow.db'}"
    assert settings.database_url == f"sqlite:///{tmp_path / 'mlruns' / 'rankwise.db'}"
    assert settings.local_store
    assert not settings.offline
    assert list(tmp_path.iterdir()) == [], "reading the settings creates nothing"


def test_variables_move_the_stores(tmp_path):
    settings = Settings.load(
        {
            "RANKWISE_HOME": str(tmp_path / "home"),
            "RANKWISE_CACHE": str(tmp_path / "cache"),
            "RANKWISE_DATABASE_URL": "postgresql://h/d",
            "RANKWISE_BASES": f"{tmp_path / 'a'}{os.pathsep}{tmp_path / 'b'}",
            "MLFLOW_TRACKING_URI": "http://127.0.0.1:5000",
            "HF_HUB_OFFLINE": "1",
        }
    )
    assert settings.home == tmp_path / "home"
    assert settings.cache == tmp_path / "cache"
    assert settings.database_url == "postgresql://h/d"
    assert settings.bases == (tmp_path / "a", tmp_path / "b")
    assert settings.tracking_uri == "http://127.0.0.1:5000"
    assert not settings.local_store
    assert settings.offline
    assert settings.outbox == tmp_path / "home" / "outbox"


@pytest.mark.parametrize("variable", ["RANKWISE_HOME", "RANKWISE_CACHE", "RANKWISE_BASES", "RANKWISE_SIGNING_KEY"])
def test_a_home_directory_that_is_not_there_is_said(variable):
    with pytest.raises(
        ConfigError, match=rf"^{variable}: this user has no home directory to expand '~nobody-here/x'; set {variable}"
    ):
        Settings.load({variable: "~nobody-here/x"})


def test_a_user_without_a_home_directory_is_asked_for_a_cache(monkeypatch):
    monkeypatch.setattr(platformdirs, "user_cache_dir", lambda name: f"~/.cache/{name}")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    with pytest.raises(
        ConfigError, match=r"RANKWISE_CACHE: this user has no home directory to expand '~/\.cache/rankwise'"
    ):
        Settings.load({})


def test_defaults_do_not_override_what_a_person_has_set(monkeypatch):
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "false")
    monkeypatch.delenv("HF_HUB_DISABLE_TELEMETRY", raising=False)
    set_process_defaults()
    assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "false"
    assert os.environ["HF_HUB_DISABLE_TELEMETRY"] == "1"


def test_the_dtype_of_a_machine_is_auto_or_one_that_there_is():
    assert compute_dtype({}) == compute_dtype({"RANKWISE_COMPUTE_DTYPE": ""}) == "auto"
    assert compute_dtype({"RANKWISE_COMPUTE_DTYPE": "bfloat16"}) == "bfloat16"
    message = r"RANKWISE_COMPUTE_DTYPE must be one of auto, float32, bfloat16, float16, got 'fp32'"
    with pytest.raises(ConfigError, match=message):
        compute_dtype({"RANKWISE_COMPUTE_DTYPE": "fp32"})

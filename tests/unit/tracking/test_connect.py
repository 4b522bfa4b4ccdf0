from __future__ import annotations

import pytest

from rankwise.exceptions import TrackingError
from rankwise.settings import Settings
from rankwise.tracking.connection import connect


def test_a_file_that_is_no_database_is_an_error(tmp_path):
    (tmp_path / "mlflow.db").write_text("this is not a database, " * 100)
    settings = Settings.load({"RANKWISE_HOME": str(tmp_path)})
    with pytest.raises(TrackingError, match=r"opening .*mlflow\.db: .*file is not a database"):
        connect(settings)

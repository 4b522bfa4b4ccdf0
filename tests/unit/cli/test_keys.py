from __future__ import annotations

import json

from click.testing import CliRunner

from rankwise.cli.registry import keys


def test_public_keys_are_one_document(tmp_path):
    def call(*arguments):
        result = CliRunner().invoke(keys, [*arguments, "--json"], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)

    new = call("new", str(tmp_path / "keys"), "--name", "team")
    assert call("show", str(tmp_path / "keys")) == {"schema_version": 1, "keys": [{"name": "team", "id": new["id"]}]}

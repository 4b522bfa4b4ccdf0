from __future__ import annotations

import json
from pathlib import Path

from rankwise.experiment.editor_schema import editor_schema
from rankwise.experiment.fields import sweepable

SHIPPED = Path(__file__).parents[3] / "experiments" / "schema.json"


def kinds(node) -> set[str]:
    return {option.get("type", "enum") for option in node.get("anyOf", [node])}


def test_the_shipped_schema_is_what_the_command_prints():
    """After a change of the schema: `rankwise schema > experiments/schema.json`."""
    assert json.loads(SHIPPED.read_text()) == editor_schema()


def test_numbers_admit_expressions_and_other_fields_do_not():
    lora = editor_schema()["properties"]["lora"]["properties"]
    assert kinds(lora["r"]) == {"integer", "string"}
    assert kinds(lora["lora_alpha"]) == {"number", "string"}
    assert kinds(lora["use_rslora"]) == {"boolean"}
    assert lora["r"]["description"] == "Rank."
    steps = editor_schema()["properties"]["training"]["properties"]["max_steps"]
    assert kinds(steps) == {"integer", "null", "string"}
    assert steps["default"] is None
    assert editor_schema()["properties"]["version"] == {
        "const": 1, "description": "File format version.", "type": "integer",
    }  # fmt: skip


def test_the_sweep_knows_its_fields():
    sweep = editor_schema()["properties"]["sweep"]["properties"]
    assert set(sweep["parameters"]["properties"]) == set(sweepable())
    assert sweep["parameters"]["additionalProperties"] is False
    assert kinds(sweep["parameters"]["properties"]["lora.r"]["anyOf"][0]["items"]) == {"integer", "string"}
    assert "default" not in sweep["parameters"]["properties"]["seed"]["anyOf"][0]["items"]
    assert set(sweep["arms"]["items"]["properties"]) == set(sweepable())


def test_it_is_plain_draft_7_without_references():
    text = json.dumps(editor_schema())
    assert editor_schema()["$schema"] == "http://json-schema.org/draft-07/schema#"
    assert "$ref" not in text
    assert "$defs" not in text


def test_unknown_keys_are_refused_in_every_section():
    def check(node):
        if isinstance(node, dict):
            if "properties" in node and node.get("type") == "object":
                assert node["additionalProperties"] is False, node
            for child in node.values():
                check(child)
        elif isinstance(node, list):
            for child in node:
                check(child)

    check(editor_schema())


def test_ranges_are_offered_where_they_have_a_meaning():
    parameters = editor_schema()["properties"]["sweep"]["properties"]["parameters"]["properties"]

    def ranges(path):
        return [next(iter(form["properties"])) for form in parameters[path]["anyOf"] if form["type"] == "object"]

    assert ranges("lora.r") == ["choice", "int"]
    assert ranges("training.learning_rate") == ["choice", "int", "uniform", "log_uniform"]
    assert ranges("lora.target_modules") == ["choice"]

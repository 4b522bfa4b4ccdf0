"""The table of attacks: each answer has its test, and the documentation names no test that is not there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "platform").glob("docs/**/*.md"))]
_NAMED = re.compile(r"`(tests/[\w/]+\.py)::(test_\w+)`")
ATTACKS = {
    "a definition that unfolds (aliases)": (
        "unit/experiment/test_document.py",
        "test_an_alias_bomb_is_refused_before_it_unfolds",
    ),
    "a definition nested without end": (
        "unit/experiment/test_document.py",
        "test_deep_nesting_is_refused",
    ),
    "a definition of megabytes": (
        "unit/experiment/test_document.py",
        "test_a_large_file_is_refused",
    ),
    "an endless number": (
        "unit/experiment/test_document.py",
        "test_an_endless_integer_is_no_integer",
    ),
    "a tag that builds objects": (
        "unit/experiment/test_document.py",
        "test_tags_are_refused",
    ),
    "code in an expression": (
        "unit/experiment/test_expressions.py",
        "test_conditions_have_no_way_out_either",
    ),
    "an expression without end": (
        "unit/experiment/test_expressions.py",
        "test_long_and_large_expressions_are_refused",
    ),
    "objects through a prompt": (
        "unit/data/test_columns.py",
        "test_wrong_templates_say_what_is_allowed",
    ),
    "a prompt of gigabytes": (
        "unit/data/test_columns.py",
        "test_a_width_that_takes_the_memory_is_refused",
    ),
    "files of the machine as data": (
        "unit/assets/test_confine.py",
        "test_files_outside_are_refused_however_they_are_named",
    ),
    "links out of the data": (
        "unit/assets/test_confine.py",
        "test_a_directory_is_looked_through",
    ),
    "a card that leads elsewhere": (
        "unit/assets/test_confine.py",
        "test_a_directorys_card_cannot_lead_elsewhere",
    ),
    "a wheel that grows": (
        "unit/assets/test_wheel.py",
        "test_a_member_that_grows_beyond_all_measure_is_refused_before_it_is_unpacked",
    ),
    "a member that leaves its place": (
        "unit/assets/test_wheel.py",
        "test_a_member_cannot_leave_the_cache",
    ),
    "a link in a wheel": (
        "unit/assets/test_wheel.py",
        "test_a_link_in_a_wheel_is_no_file",
    ),
    "a template that reaches out": (
        "unit/data/test_template_guard.py",
        "test_the_sandbox_holds",
    ),
    "a template without end": (
        "unit/data/test_template_guard.py",
        "test_templates_that_take_all_time_or_memory_are_refused_at_once",
    ),
    "a header that lies": (
        "unit/assets/test_safetensors.py",
        "test_a_header_that_lies_is_refused_before_anything_is_allocated",
    ),
    "a model that unfolds": (
        "unit/assets/test_input_checks.py",
        "test_a_bomb_in_a_models_description_is_no_model",
    ),
    "code in a model": (
        "unit/flavor/test_fetch.py",
        "test_a_surplus_file_is_refused",
    ),
    "a changed byte": (
        "unit/flavor/test_fetch.py",
        "test_a_flipped_byte_in_mlmodel_is_refused_or_changes_nothing_that_decides",
    ),
    "an odd adapter": (
        "unit/cli/test_odd_adapters.py",
        "test_every_mutation_is_accepted_or_refused_with_a_message",
    ),
    "a pattern without end": (
        "unit/cli/test_odd_adapters.py",
        "test_a_pattern_that_takes_for_ever_ends_with_a_message",
    ),
    "an adapter of a stranger": (
        "unit/flavor/test_signing.py",
        "test_with_trusted_keys_only_what_they_have_signed_loads",
    ),
    "a signature on other content": (
        "unit/flavor/test_signing.py",
        "test_a_signature_does_not_fit_other_content",
    ),
    "a signature that is taken away": (
        "unit/flavor/test_signing.py",
        "test_a_signature_that_was_taken_away_is_missed",
    ),
    "a private key that leaks": (
        "unit/flavor/test_signing.py",
        "test_the_private_key_is_in_no_file_no_tag_and_no_log",
    ),
    "a secret in a definition": (
        "unit/experiment/test_secrets.py",
        "test_a_definition_with_a_secret_is_refused_where_it_stands_without_repeating_it",
    ),
    "a secret in MLflow": (
        "unit/tracking/test_runs.py",
        "test_secrets_are_taken_out_of_params_tags_description_and_texts",
    ),
    "a secret in a log": (
        "unit/test_logs.py",
        "test_secrets_are_taken_out_of_text_values_and_tracebacks",
    ),
    "a secret in the queue": (
        "helpers/job_store_contract.py",
        "test_secrets_in_an_error_are_not_stored",
    ),
    "a secret of the environment": (
        "unit/test_redact.py",
        "test_the_environments_secrets_are_taken_out_wherever_they_stand",
    ),
    "a secret in the doctor's words": (
        "unit/doctor/test_checks.py",
        "test_secrets_are_taken_out_of_what_the_doctor_says",
    ),
    "a text that is slow to clean": (
        "unit/test_redact.py",
        "test_a_long_text_is_cleaned_in_no_time_whatever_it_repeats",
    ),
    "an answer that is slow to read": (
        "unit/evaluation/test_numbers.py",
        "test_no_answer_takes_long_to_read",
    ),
    "a damaged outbox": (
        "unit/tracking/test_damaged_outboxes.py",
        "test_no_damage_stops_a_synchronization",
    ),
    "a damaged file of its own": (
        "unit/test_damaged_files.py",
        "test_a_damaged_file_gives_a_message_or_is_passed_over",
    ),
    "another user of the machine": (
        "acceptance/test_run.py",
        "test_other_users_can_read_neither_rows_nor_answers_nor_anything_in_the_home",
    ),
    "a script in a page": (
        "unit/data/test_preview.py",
        "test_html_escapes_the_data",
    ),
    "a script in a plot": (
        "unit/report/test_anatomy_page.py",
        "test_the_page_needs_no_network_and_no_script_and_escapes_what_it_shows",
    ),
    "a row that steers the terminal": (
        "unit/data/test_preview.py",
        "test_data_cannot_steer_the_terminal_or_its_markup",
    ),
    "a formula in a table": (
        "unit/inference/test_tables.py",
        "test_a_cell_that_a_spreadsheet_would_compute_stays_as_it_is",
    ),
    "a foreign Host header": (
        "integration/test_doctor.py",
        "test_the_projects_own_server_is_found_to_be_safe",
    ),
    "a cluster without a token": (
        "unit/worker/test_ray_placer.py",
        "test_a_cluster_that_anybody_may_use_is_refused",
    ),
}


def _tests(path: Path) -> set[str]:
    tree = ast.parse(path.read_text())
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}


@pytest.mark.parametrize("attack", ATTACKS)
def test_every_attack_has_its_test(attack):
    file, name = ATTACKS[attack]
    assert name in _tests(ROOT / "tests" / file)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_the_documentation_names_tests_that_are_there(document):
    named = _NAMED.findall(document.read_text())
    assert [f"{file}::{name}" for file, name in named if name not in _tests(ROOT / file)] == []


def test_a_table_in_the_documentation_has_all_attacks():
    found = [pair for document in DOCUMENTS for pair in _NAMED.findall(document.read_text())]
    named = {(file.removeprefix("tests/"), name) for file, name in found}
    if named.intersection(ATTACKS.values()):
        assert set(ATTACKS.values()) - named == set()

"""The architecture matrix: every check of `helpers.matrix` for every configuration of `helpers.architectures`.

`RANKWISE_MATRIX=FILE` collects the results as JSON, from which `python -m helpers.matrix_page FILE` writes the page
`platform/docs/reference/architectures.md`.
"""

import json
import os
from pathlib import Path

import pytest
import torch
from helpers.architectures import ARCHITECTURES, WRAPPERS
from helpers.matrix import CHECKS, Subject, shortened

pytestmark = pytest.mark.proof


@pytest.fixture(scope="module", autouse=True)
def collected():
    results: dict[str, dict[str, str]] = {}
    yield results
    if path := os.environ.get("RANKWISE_MATRIX"):
        Path(path).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


@pytest.mark.parametrize("name", [*ARCHITECTURES, *WRAPPERS])
def test_architecture(name, tmp_path, collected):
    torch.set_num_threads(1)
    subject = Subject(name, tmp_path)
    results = collected[name] = {}
    failures = {}
    for check, run in CHECKS.items():
        try:
            results[check] = run(subject)
        except Exception as error:  # Each check has its own cell in the table.
            results[check] = failures[check] = shortened(error)
    assert not failures, failures


def test_there_are_at_least_sixty_architectures():
    assert len(ARCHITECTURES) >= 60

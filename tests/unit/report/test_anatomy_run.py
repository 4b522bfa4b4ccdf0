import json
from dataclasses import replace

import pytest
from helpers.bases import inject, resolved, settings_in
from helpers.tiny import make_base

from rankwise.compat.peft import SEVERAL_ADAPTERS
from rankwise.experiment.schema import QuantizationSpec
from rankwise.modeling.adapter import read_adapter, save_adapter
from rankwise.modeling.base import expected_warning, load_base
from rankwise.report.anatomy import rank_metrics, trained_anatomy, trained_page


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A base in memory with the adapters of two arms in it, one of them saved; and what the base took alone."""
    root = tmp_path_factory.mktemp("trained")
    base = load_base(resolved(make_base(root / "base")), QuantizationSpec(), settings_in(root), device="cpu")
    alone = base.memory_bytes
    inject(base.model, "arm-1", r=8)
    with expected_warning(SEVERAL_ADAPTERS):
        inject(base.model, "arm-2", r=2, seed=1)
    save_adapter(base.model, "arm-2", root / "adapter", base_source="org/tiny", base_revision="a" * 40)
    return base, root / "adapter", alone


def test_memory_is_that_of_the_base_in_memory_without_the_other_arms(trained):
    base, adapter, alone = trained
    anatomy = trained_anatomy(read_adapter(adapter), base)
    assert anatomy.parameters == 2 * 2 * (128 + 96)
    assert anatomy.memory.measured
    assert anatomy.memory.base == alone
    assert anatomy.memory.base_and_adapter == alone + 4 * anatomy.parameters
    assert anatomy.disagreements == ()
    assert len(anatomy.checks) == 5


def test_the_page_names_the_arm_and_its_base(trained):
    base, adapter, _ = trained
    page = trained_page(trained_anatomy(read_adapter(adapter), base), base, "arm r=2")
    assert "<h1>arm r=2</h1>" in page
    assert f"over org/tiny at {'a' * 40}" in page
    assert "r = 2 is used" in page


def test_metrics_say_how_much_of_the_rank_is_used_and_the_table_is_json(trained):
    base, adapter, _ = trained
    anatomy = trained_anatomy(read_adapter(adapter), base)
    metrics = rank_metrics(anatomy)
    ranks = [target.effective_rank for target in anatomy.targets]
    assert metrics["adapter.effective_rank"] == pytest.approx(sum(ranks) / len(ranks))
    assert 1 < metrics["adapter.effective_rank"] <= 2
    assert metrics["adapter.rank_99"] == 2
    table = json.loads(json.dumps(anatomy.to_dict(), allow_nan=False))
    assert [target["effective_rank"] for target in table["adapter"]["targets"]] == ranks
    assert rank_metrics(replace(anatomy, targets=())) == {}

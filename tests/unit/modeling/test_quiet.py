import warnings

import pytest
from transformers.utils import logging as transformers_logging

from rankwise.compat.peft import SEVERAL_ADAPTERS
from rankwise.modeling.base import expected_warning, quiet_transformers


def _quiet_then_fail():
    with quiet_transformers():
        assert transformers_logging.get_verbosity() == transformers_logging.ERROR
        assert not transformers_logging.is_progress_bar_enabled()
        raise KeyError


@pytest.mark.parametrize("bars", [True, False])
def test_the_former_state_comes_back_even_after_an_error(bars):
    before = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    try:
        transformers_logging.set_verbosity_info()
        (transformers_logging.enable_progress_bar if bars else transformers_logging.disable_progress_bar)()
        with pytest.raises(KeyError):
            _quiet_then_fail()
        assert transformers_logging.get_verbosity() == transformers_logging.INFO
        assert transformers_logging.is_progress_bar_enabled() is bars
    finally:
        transformers_logging.set_verbosity(before[0])
        (transformers_logging.enable_progress_bar if before[1] else transformers_logging.disable_progress_bar)()


def test_only_the_exact_message_is_ignored():
    with expected_warning(SEVERAL_ADAPTERS):
        warnings.warn(SEVERAL_ADAPTERS, stacklevel=1)
        with pytest.warns(UserWarning, match="more"):
            warnings.warn(SEVERAL_ADAPTERS + " And more.", stacklevel=1)


def test_peft_still_says_what_is_ignored(tmp_path):
    from helpers.bases import inject, resolved, settings_in
    from helpers.tiny import make_base

    from rankwise.experiment.schema import QuantizationSpec
    from rankwise.modeling.base import load_base

    model = load_base(resolved(make_base(tmp_path / "b")), QuantizationSpec(), settings_in(tmp_path)).model
    inject(model, "one")
    with pytest.warns(UserWarning, match="Already found") as caught:
        inject(model, "two")
    assert [str(warning.message) for warning in caught] == [SEVERAL_ADAPTERS]


def test_eight_bit_layers_tell_of_their_casts_once(tmp_path, caplog):
    from helpers.bases import logits, resolved, settings_in
    from helpers.tiny import make_base

    from rankwise.compat import bitsandbytes as compat
    from rankwise.experiment.schema import QuantizationSpec
    from rankwise.modeling.base import load_base

    spec = QuantizationSpec(load_in_4bit=False, load_in_8bit=True, bnb_4bit_compute_dtype="float32")
    model = load_base(resolved(make_base(tmp_path / "b")), spec, settings_in(tmp_path), device="cpu").model
    compat._once._seen = False
    logits(model)
    logits(model)
    assert len([record for record in caplog.records if "inputs will be cast" in record.getMessage()]) == 1

from __future__ import annotations

import pytest

from rankwise.exceptions import ConfigError
from rankwise.flavor.metadata import DEFAULTS, make_signature, read_params


def test_the_signature_has_no_input_schema_and_all_parameters_with_their_defaults():
    signature = make_signature()
    assert signature.inputs is None
    assert {param.name: param.default for param in signature.params.params} == DEFAULTS


def test_params_left_out_take_their_defaults():
    decoding, seed, batch_size = read_params(None)
    assert (decoding.max_new_tokens, decoding.temperature, decoding.top_p, decoding.stop) == (64, 0.0, 1.0, ())
    assert (seed, batch_size) == (0, 8)


def test_stop_may_be_one_text_or_several():
    assert read_params({"stop": "x"})[0].stop == ("x",)
    assert read_params({"stop": ["x", "y"]})[0].stop == ("x", "y")


def test_an_unknown_param_is_refused_with_those_that_there_are():
    with pytest.raises(ConfigError, match="params not known: max_tokens; allowed are max_new_tokens, temperature"):
        read_params({"max_tokens": 3})

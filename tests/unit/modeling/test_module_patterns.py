"""Foreign regular expressions give what `re` gives, within a limit."""

from __future__ import annotations

import re
import time

import pytest

from rankwise.modeling.module_patterns import PatternError, full_matches, is_plain

NAMES = [
    "model", "model.layers.0.self_attn.q_proj", "model.layers.10.self_attn.v_proj", "model.layers.1.mlp.down_proj",
    "lm_head", "aaa", "a{,3}", "x-y", "q_proj",
]  # fmt: skip
SAME = [
    "", ".*", r"model\.layers\.\d+\..*_proj", "(?:.*?(?:self_attn|mlp).*?(?:q_proj|v_proj))|lm_head", "a{,3}",
    "a{1,3}", "(?i)MODEL", "(?!model).*", r"(?<=x)-y|.*(?<!q)_proj", r"(a)\1*", "(?P<n>a)(?P=n)+", r"[\w.]+\Z",
    "model$", "^model", "x--y|x-y", "[[a]+", r"\bq_proj\b", "a++", "(?x) a a a # all", ".*\u00e9|aaa",
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:Possible:FutureWarning")
@pytest.mark.parametrize("pattern", SAME)
def test_names_match_as_with_re(pattern):
    expected = [name for name in NAMES if re.fullmatch(pattern, name)]
    assert full_matches([pattern], NAMES) == [expected]


def test_several_patterns_keep_their_order_whichever_engine_runs_them():
    patterns = ["(?=a)a+", "lm_head", "(?!x).*head", "aaa"]
    assert full_matches(patterns, NAMES) == [["aaa"], ["lm_head"], ["lm_head"], ["aaa"]]


def test_names_outside_of_ascii_match_as_with_re():
    assert full_matches([r"\w+", "é$"], ["é", "é\n"]) == [["é"], ["é"]]


@pytest.mark.parametrize(
    "pattern",
    ["(((((", "*", "a**", r"\pL", "(?=", "[", "a{2,1}", "(?P<n>a)(?P<n>b)", "x(?i)y", "(" * 5000 + ")" * 5000],
    ids=lambda pattern: pattern[:9],
)
def test_what_re_refuses_is_refused(pattern):
    with pytest.raises(PatternError, match="is not a valid regular expression: "):
        full_matches([pattern], [])


@pytest.mark.parametrize("pattern", [r"(?=x?)(\w+\.?)+X", r"(a*)*\1b", r"(?=(\w+\.?)+X).*"], ids=repr)
def test_what_would_take_for_ever_is_stopped(pattern):
    started = time.monotonic()
    with pytest.raises(PatternError, match="was stopped after 1 s over 2 names; replace it by a list of module names"):
        full_matches([pattern], ["model.layers.0.self_attn.q_proj", "a" * 40])
    assert time.monotonic() - started < 15


def test_what_is_linear_is_answered_at_once_however_bad_for_re():
    started = time.monotonic()
    assert full_matches([r"(\w+\.?)+X", "(a|a?)+b"], ["model.layers.0.self_attn.q_proj" * 9, "a" * 5000]) == [[], []]
    assert time.monotonic() - started < 1


def test_names_are_plain_and_patterns_are_not():
    assert all(is_plain(name) for name in ("q_proj", "model.layers.0", "x-y", ""))
    assert not any(is_plain(text) for text in ("a*", "^a", "a|b", "é", "a b", "a\n"))

from __future__ import annotations

import sys
import time

import pytest
from helpers.tiny import make_base
from transformers import AutoTokenizer

from rankwise.data.template import BUILT_IN, apply_template
from rankwise.data.template_guard import MAX_CHARACTERS, TemplateRefused, guard
from rankwise.exceptions import DatasetError

BOMBS = {
    "a constant text that is computed while the template is compiled": "{{ 'a' * 9999999 }}",
    "a constant in a branch that no trial comes to": "{% if messages|length > 90 %}{{ 'a' * 1000 * 1000 }}{% endif %}",
    "a large number": "{{ 'a'|center(999999999) }}",
    "a power": "{{ 9 ** 9 ** 9 }}",
    "a list": "{{ ([0] * 1000)|list }}",
    "a product of a variable": "{% set a = 'aaaa' %}{{ a * 1000000 }}",
    "nested ranges": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "nested ranges by another name": (
        "{% set r = range(9999) %}{% for i in r %}{% for j in r %}{% endfor %}{% endfor %}"
    ),
    "a filtered range in another": (
        "{% for i in range(9999)|list %}{% for j in range(9999)|list %}{% endfor %}{% endfor %}"
    ),
    "a macro that calls itself twice": "{% macro f(n) %}{{ f(n) }}{{ f(n) }}{% endmacro %}{{ f(1) }}",
    "a large template": "x" * (MAX_CHARACTERS + 1),
}
# As templates on the hub are: loops over messages, conditions, dates, generation marks, refusals.
HARMLESS = {
    **BUILT_IN,
    "strict roles": (
        "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}{{ m.content | trim }}{% endfor %}"
    ),
    "marks": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% break %}{% endfor %}",
    "tools": "{{ strftime_now('%d %b %Y') }}{% if tools %}{{ tools | tojson(indent=4) }}{% endif %}{{ bos_token }}",
    "two loops": "{% for m in messages %}{% for p in m.content %}{{ p }}{% endfor %}{% endfor %}{{ loop_count * 2 }}",
    "not jinja": "{% for %}",
}


@pytest.mark.parametrize("name", BOMBS)
def test_templates_that_take_all_time_or_memory_are_refused_at_once(name):
    began = time.monotonic()
    with pytest.raises(TemplateRefused):
        guard(BOMBS[name])
    assert time.monotonic() - began < 10


@pytest.mark.parametrize("name", HARMLESS)
def test_ordinary_templates_pass_and_tracing_is_as_before(name):
    before = sys.gettrace()
    guard.__wrapped__(HARMLESS[name])
    assert sys.gettrace() is before


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return AutoTokenizer.from_pretrained(make_base(tmp_path_factory.mktemp("guard") / "base"))


def test_a_bomb_is_refused_from_a_definition_and_from_a_tokenizer(tokenizer):
    bomb = BOMBS["nested ranges"]
    with pytest.raises(
        DatasetError, match=r"dataset\.chat_template: refused, because it could exhaust time or memory: .* range\(\)"
    ):
        apply_template(tokenizer, bomb)
    tokenizer.chat_template = bomb
    with pytest.raises(DatasetError, match="the base's chat template: refused, because it could exhaust time"):
        apply_template(tokenizer, None)


@pytest.mark.parametrize(
    "escape",
    [
        "{{ messages.__class__.__mro__[1].__subclasses__() }}",
        "{{ ''.__class__.__init__.__globals__ }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ messages.append('x') }}",
    ],
)
def test_the_sandbox_holds(tokenizer, escape):
    from rankwise.data.template import Renderer, RenderError

    renderer = Renderer.create(tokenizer, escape)
    with pytest.raises(RenderError, match=r"unsafe|has no attribute|is undefined"):
        renderer.texts([[{"role": "user", "content": "x"}]])

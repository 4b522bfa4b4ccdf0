import re

import pytest
from helpers.anatomies import anatomy, planned, target

from rankwise.modeling.anatomy.anatomy import ConsistencyCheck
from rankwise.report.anatomy import bars, energy_plot, heat_map, make_page


def layers(count, **changes):
    return [target(layer, kind, **changes) for layer in range(count) for kind in ("self_attn.q_proj", "mlp.up_proj")]


def cells(figure):
    """Fill and tooltip of each cell of a heat map."""
    return re.findall(r'<rect [^>]*fill="([^"]+)"[^>]*><title>([^<]+)</title>', figure)


def test_the_page_needs_no_network_and_no_script_and_escapes_what_it_shows():
    page = make_page(anatomy(layers(3)), "<script>alert(1)</script>", "over <b>")
    assert "<script" not in page
    assert "src=" not in page
    assert "href=" not in page
    assert "over &lt;b&gt;" in page
    assert len(page) < 60_000


def test_the_page_says_what_the_terminal_says():
    page = make_page(anatomy(layers(2), beside=128), "x", "over org/base at abc")
    assert "over org/base at abc" in page
    assert "layers 0 to 1: 2 alike, 768 parameters each" in page
    assert "lora_A 4 x 64, lora_B 32 x 4" in page
    assert "0.166%" in page
    assert "base here, measured" in page
    assert "stored rows, 128 parameters" in page
    assert "r = 4 is more than needed: rank 2 keeps 99 %" in page
    assert page.count("<td>model.layers.1.mlp.up_proj</td>") == 1


def test_a_disagreement_stands_in_front_of_everything():
    page = make_page(anatomy(layers(1), checks=[ConsistencyCheck(name="bytes", expected=5, actual=7)]), "x")
    loud = page.index('<p class="bad">DISAGREE: bytes: expected 5, found 7')
    assert loud < page.index("<table")
    assert 'class="bad"' not in make_page(
        anatomy(layers(1), checks=[ConsistencyCheck(name="b", expected=7, actual=7)]), "x"
    )


def test_modules_that_learned_nothing_are_named_and_framed():
    page = make_page(anatomy([*layers(2), target(2, values=(0.0,) * 4, flags=("untrained",))]), "x")
    assert "<b>untrained</b>: 1 of 5 modules (B is zero: nothing was learned): model.layers.2.self_attn.q_proj" in page
    assert page.count('stroke="#d00" stroke-width="2"') == 2
    many = make_page(anatomy(layers(10, values=(0.0,) * 4, flags=("untrained",))), "x")
    assert "and 12 more" in many
    assert "<polyline" not in many


def test_a_plan_has_no_deltas_to_draw():
    page = make_page(anatomy([planned(layer) for layer in range(40)]), "plan")
    assert "Norm of the delta" not in page
    assert "<th>norm</th>" not in page
    assert "layers 0 to 39: 40 alike" in page


def test_a_plan_without_a_base_can_be_drawn():
    page = make_page(anatomy(layers(1), with_base=False), "x")
    assert "Memory" not in page


def test_colours_follow_the_values():
    figure = heat_map(
        anatomy([target(layer) for layer in range(3)]),
        "x",
        lambda one: {"0": 0.0, "1": 1.0, "2": 2.0}[one.module.split(".")[2]],
        lambda one: one.module,
    )
    assert cells(figure) == [
        ("#440154", "model.layers.0.self_attn.q_proj"),
        ("#21918c", "model.layers.1.self_attn.q_proj"),
        ("#fde725", "model.layers.2.self_attn.q_proj"),
    ]


@pytest.mark.parametrize("value", [None, float("nan"), float("inf")])
def test_a_value_that_is_no_number_is_grey_and_does_not_spoil_the_scale(value):
    figure = heat_map(
        anatomy([target(0), target(1)]), "x", lambda one: value if "layers.0" in one.module else 3.0, lambda one: "t"
    )
    assert [fill for fill, _ in cells(figure)] == ["#ddd", "#fde725"]


def test_126_layers_fit_into_the_width():
    figure = heat_map(anatomy([target(layer) for layer in range(126)]), "x", lambda one: 1.0, lambda one: "t")
    last = max(float(x) + float(w) for x, w in re.findall(r'<rect x="([\d.]+)" y="24" width="([\d.]+)"', figure))
    assert last <= 980


def test_the_energy_of_a_kind_is_pooled_over_layers():
    figure = energy_plot(anatomy([target(0, values=(2.0, 1.0)), target(1, values=(1.0, 0.0, 0.0, 2.0))]), "x")
    assert re.findall(r"rank (\d) keeps ([\d.]+%)", figure) == [
        ("1", "50.00%"), ("2", "60.00%"), ("3", "60.00%"), ("4", "100.00%"),
    ]  # fmt: skip


def test_rank_one_alone_can_be_drawn():
    assert "<polyline" in energy_plot(anatomy([target(0, values=(2.0,))]), "x")


def test_bars_are_in_proportion():
    lengths = [float(found) for found in re.findall(r'width="([\d.]+)" height="20"', bars("x", {"a": 400, "b": 100}))]
    assert lengths[0] == pytest.approx(4 * lengths[1])

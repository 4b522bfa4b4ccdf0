from helpers.anatomies import anatomy, planned, target
from rich.console import Console

from rankwise.cli.inspect import render
from rankwise.modeling.anatomy.anatomy import ConsistencyCheck


def shown(made, width=140):
    console = Console(width=width, highlight=False)
    with console.capture() as capture:
        console.print(render(made, "title", "over the base", "Linear4bit"))
    return capture.get()


def test_deltas_are_drawn_layer_by_layer():
    text = shown(anatomy([target(layer, values=(float(layer), 0.0, 0.0, 0.0)) for layer in range(8)]))
    assert "norm 0 to 7  ▁▂▃▄▅▆▇█" in text
    assert "effective rank 1.5 to 2.2 of 4" in text
    assert "title  3,072 parameters, 12.29 kB, 0.307% of the base\nover the base\n" in text


def test_what_disagrees_comes_first():
    text = shown(anatomy([target(0)], checks=[ConsistencyCheck(name="bytes", expected=5, actual=1234)]))
    assert text.startswith("DISAGREE  bytes: expected 5, found 1,234\n")
    agreeing = shown(anatomy([target(0)], checks=[ConsistencyCheck(name="bytes", expected=5, actual=5)]))
    assert "DISAGREE" not in agreeing
    assert "ok        bytes: 5" in agreeing


def test_one_layer_more_than_a_line_holds_and_one_alone_get_no_row_of_blocks():
    assert "▁" not in shown(anatomy([target(0)]))
    assert "█" not in shown(anatomy([target(layer) for layer in range(101)]))


def test_a_layer_that_is_not_finite_has_a_cross():
    nan = float("nan")
    text = shown(anatomy([target(0), target(1, delta_norm=nan, effective_rank=0.0, flags=("nonfinite",))]))
    assert "█x" in text
    assert "nonfinite: 1 of 2 modules (NaN or infinity in the factors): model.layers.1.self_attn.q_proj" in text


def test_flags_and_the_use_of_the_rank_are_told_in_words():
    targets = [target(layer) for layer in range(9)]
    targets += [target(layer, values=(0.0,) * 4, flags=("untrained",)) for layer in range(9, 19)]
    text = " ".join(shown(anatomy(targets)).split())
    assert "untrained: 10 of 19 modules (B is zero: nothing was learned): model.layers.9.self_attn.q_proj" in text
    assert "and 2 more" in text
    assert "r = 4 is more than needed: rank 2 keeps 99 % of the energy of all deltas" in text


def test_a_plan_shows_sizes_and_no_delta():
    text = shown(anatomy([planned(0), planned(1)], measured=False, beside=10))
    assert "delta" not in text
    assert "here, estimated" in text
    assert "outside of the targets: stored rows, 10 parameters" in text
    assert "r = " not in text


def test_without_a_base_only_the_adapter_is_sized():
    text = shown(anatomy([target(0)], with_base=False))
    assert "base + adapter" not in text
    assert "of the base" not in text

from helpers.anatomies import anatomy, target

from rankwise.modeling.anatomy.anatomy import fold, kind_of, span


def both(layer, **changes):
    return [target(layer, "self_attn.q_proj", **changes), target(layer, "mlp.down_proj", **changes)]


def test_layers_that_are_alike_are_folded_and_others_stand_alone():
    blocks = fold(anatomy([*both(0), *both(1), *both(2, scaling=1.0), *both(3)]))
    assert [block.layers for block in blocks] == [(0, 1), (2,), (3,)]
    assert [block.label for block in blocks] == [
        "layers 0 to 1: 2 alike, 768 parameters each",
        "layer 2: 768 parameters",
        "layer 3: 768 parameters",
    ]
    assert [[one.module for one in alike] for alike in blocks[0].modules] == [
        ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"],
        ["model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"],
    ]


def test_what_differs_in_numbers_only_is_alike():
    assert len(fold(anatomy([target(0), target(1, values=(9.0, 1.0, 1.0, 1.0), flags=("dead",))]))) == 1


def test_modules_outside_of_layers_are_called_so():
    (block,) = fold(anatomy([target(0, module="model.embed_out")]))
    assert block.label == "outside of layers: 384 parameters"


def test_a_kind_is_the_name_within_its_layer():
    assert kind_of("gpt_neox.layers.11.attention.query_key_value") == "attention.query_key_value"
    assert kind_of("embed_out") == "embed_out"


def test_spans_are_short():
    assert span([1.2341, 1.2339]) == "1.23"
    assert span([0.5, 12.345]) == "0.5 to 12.3"

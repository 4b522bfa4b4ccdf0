import pytest

from rankwise.experiment.paths import as_path, dotted, follow, put


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("", (0, {"lora": {"r": 8, "x": None}})),
        ("lora.r", (2, 8)),
        ("lora", (1, {"r": 8, "x": None})),
        ("lora.x", (2, None)),
        ("lora.y.z", (1, {"r": 8, "x": None})),
        ("lora.x.z", (2, None)),
        ("lora.r.z", (2, 8)),
        ("seed", (0, {"lora": {"r": 8, "x": None}})),
    ],
)
def test_a_path_is_followed_as_far_as_it_goes(path, expected):
    data = {"lora": {"r": 8, "x": None}}
    assert follow(data, as_path(path) if path else ()) == expected


def test_missing_and_empty_sections_are_made_on_the_way_to_a_value():
    data = {"register": None, "lora": {"r": 8}}
    put(data, ("register", "name"), "x")
    put(data, ("lora", "r"), 4)
    put(data, ("dataset", "limit", "train"), 5)
    put(data, ("seed",), 1)
    assert data == {"register": {"name": "x"}, "lora": {"r": 4}, "dataset": {"limit": {"train": 5}}, "seed": 1}


def test_paths_are_written_with_dots_and_places_in_lists():
    assert dotted(("sweep", "arms", 0, "lora.r")) == "sweep.arms[0].lora.r"
    assert as_path("training.max_steps") == ("training", "max_steps")
    assert dotted(()) == ""

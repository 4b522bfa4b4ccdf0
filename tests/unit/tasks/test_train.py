from rankwise.tasks.train import pack_label


def test_the_arms_of_a_pack_are_named_so_that_names_with_commas_stay_apart_and_many_are_counted():
    names = [f"lora.r={rank}, seed=0" for rank in (2, 4, 8, 16, 32)]
    assert pack_label(names[:2]) == "lora.r=2, seed=0; lora.r=4, seed=0"
    assert pack_label(names[:4]).count(";") == 3
    assert pack_label(names) == "5 arms"

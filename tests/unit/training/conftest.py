"""One tiny base in NF4 for all tests of the engine."""

import pytest
from helpers.packs import load_tiny


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    return load_tiny(tmp_path_factory.mktemp("engine"))


@pytest.fixture(autouse=True)
def _nothing_stays_in_the_base(request):
    """Whatever a test trains, the base is as before."""
    yield
    if "base" in request.fixturenames:
        model = request.getfixturevalue("base").model
        assert not getattr(model, "peft_config", None)
        assert not any(module.training for module in model.modules())
        assert not any(parameter.requires_grad for parameter in model.parameters())
        assert not any("lora_A" in name for name, _ in model.named_parameters())

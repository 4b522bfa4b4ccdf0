"""Loading the tiny bases of `helpers.tiny`, and adapters with random weights over them."""

from __future__ import annotations

from pathlib import Path


def settings_in(path: Path):
    """Settings with a home and a cache of their own."""
    from rankwise.settings import Settings

    return Settings.load({"RANKWISE_HOME": str(path / "home"), "RANKWISE_CACHE": str(path / "cache")})


def resolved(path: Path, source: str = "org/tiny", revision: str = "a" * 40):
    from rankwise.assets.base import ResolvedBase

    return ResolvedBase(source=source, revision=revision, path=path, pinned=True)


def inject(model, name="arm-1", *, seed=0, **lora):
    """Inject an adapter with random, non-zero factors and return the model."""
    import torch
    from peft import LoraConfig, inject_adapter_in_model

    from rankwise.modeling.adapter import adapter_tensors

    config = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], **lora}
    inject_adapter_in_model(LoraConfig(**config), model, name)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in adapter_tensors(model, name).values():
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.1)
    return model


def logits(model):
    """Logits of a fixed batch; the last row of the embedding is in it."""
    import torch

    tokens = torch.arange(4, 28).reshape(2, 12)
    tokens[0, -1] = model.config.vocab_size - 1
    with torch.no_grad():
        return model(input_ids=tokens).logits

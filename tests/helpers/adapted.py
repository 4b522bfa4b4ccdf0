"""A tiny base with a few random adapters on it, for tests of mixed batches."""

from __future__ import annotations

from pathlib import Path

from helpers.tiny import make_base


def load_tiny(directory: Path, architecture="llama", *, load_in_4bit: bool = False):
    """Make and load a tiny base; its caches lie below `directory`."""
    from rankwise.assets.base import ResolvedBase
    from rankwise.experiment.schema import QuantizationSpec
    from rankwise.modeling.base import load_base
    from rankwise.settings import Settings

    path = make_base(directory / architecture, architecture)
    settings = Settings.load({"RANKWISE_HOME": str(directory / "home"), "RANKWISE_CACHE": str(directory / "cache")})
    resolved = ResolvedBase(source=str(path), revision="sha256:" + "0" * 64, path=path, pinned=False)
    return load_base(resolved, QuantizationSpec(load_in_4bit=load_in_4bit), settings, device="cpu")


def encode_prompts(base, texts: list[str]) -> list[tuple[int, ...]]:
    """Token ids of rendered prompts, which have all special tokens already."""
    return [tuple(ids) for ids in base.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]]


def attach(model, name: str, *, r: int = 4, seed: int = 0, scale: float = 0.5, **settings) -> str:
    """Inject a frozen adapter whose B is random too, so that it changes what the base says.

    `settings` are more of `LoraConfig`.
    """
    import torch
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.lora import LoraLayer

    from rankwise.compat.peft import SEVERAL_ADAPTERS
    from rankwise.modeling.base import expected_warning

    linear = {"q_proj", "v_proj", "o_proj", "down_proj", "query_key_value", "dense_4h_to_h"}
    present = {module.rpartition(".")[2] for module, _ in model.named_modules()}
    settings = {"target_modules": sorted(linear & present), **settings}
    config = LoraConfig(r=r, lora_alpha=2 * r, lora_dropout=0.3, **settings)
    with torch.random.fork_rng(devices=[]), expected_warning(SEVERAL_ADAPTERS):
        inject_adapter_in_model(config, model, name)
        torch.manual_seed(seed)
        for module in model.modules():
            if isinstance(module, LoraLayer) and name in module.lora_A:
                torch.nn.init.normal_(module.lora_A[name].weight, std=scale)
                torch.nn.init.normal_(module.lora_B[name].weight, std=scale)
    model.requires_grad_(False)
    model.eval()
    return name

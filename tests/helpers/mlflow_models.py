"""Models as `mlflow.transformers` stores them."""

from __future__ import annotations

from pathlib import Path


def save_with_mlflow(base: Path, target: Path, *, in_4bit: bool = True, by_path: bool = False) -> Path:
    """Save a peft model over a base from a local path, with random weights in its adapter of rank 4."""
    import mlflow.transformers
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    arguments = {"quantization_config": config} if in_4bit else {}
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, **arguments)
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    mlflow.transformers.save_model(
        {"model": get_peft_model(model, lora), "tokenizer": AutoTokenizer.from_pretrained(base)},
        str(target),
        task="text-generation",
        pip_requirements=["torch"],
        **({"base_model_path": str(base)} if by_path else {}),
    )
    return target

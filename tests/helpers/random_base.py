"""A base of a real size with random weights, written layer by layer: it is never whole in memory.

What a step costs depends on shapes and not on weights, so that a machine without a hub can be measured with the shape
of a real model. The directory is an ordinary bf16 base: rankwise and other libraries load and quantize it as any other,
tensor by tensor.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from helpers.tiny import make_tokenizer


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A Llama's sizes."""

    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    key_value_heads: int
    vocab_size: int

    @property
    def parameters(self) -> int:
        """Parameters, the head apart from the embeddings."""
        head = self.hidden_size // self.heads
        attention = self.hidden_size * head * (2 * self.heads + 2 * self.key_value_heads)
        layer = attention + 3 * self.hidden_size * self.intermediate_size + 2 * self.hidden_size
        return self.layers * layer + 2 * self.vocab_size * self.hidden_size + self.hidden_size


EIGHT_BILLION = Shape(
    hidden_size=4096, intermediate_size=14336, layers=32, heads=32, key_value_heads=8, vocab_size=128256
)
"""Llama-3.1-8B: 8.03 billion parameters."""


def make_random_base(path: Path, shape: Shape, *, seed: int = 0) -> Path:
    """Write the base, one safetensors file a layer; what is there and whole is kept.

    Norms are 1; other weights are normal with a standard deviation of 0.02, as transformers starts them.
    """
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    index_file = path / "model.safetensors.index.json"
    if index_file.is_file():
        return path
    path.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer()
    LlamaConfig(
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_value_heads,
        vocab_size=shape.vocab_size,
        max_position_embeddings=8192,
        tie_word_embeddings=False,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    ).save_pretrained(path)
    tokenizer.save_pretrained(path)
    generator = torch.Generator().manual_seed(seed)
    weight_map: dict[str, str] = {}
    total = 0
    files = len(_files(shape))
    for number, names in enumerate(_files(shape), start=1):
        tensors = {}
        for name, sizes in names.items():
            if len(sizes) == 1:
                tensors[name] = torch.ones(sizes, dtype=torch.bfloat16)
            else:
                # In fp32 one tensor at a time: drawing in bf16 gives 256 different numbers only.
                tensors[name] = (torch.randn(sizes, generator=generator) * 0.02).to(torch.bfloat16)
        file = f"model-{number:05d}-of-{files:05d}.safetensors"
        save_file(tensors, path / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
        total += sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    # Last: its presence says that the rest is there.
    index_file.write_text(json.dumps(index), encoding="utf-8")
    return path


def _files(shape: Shape) -> list[dict[str, tuple[int, ...]]]:
    """Names and sizes of the tensors of each file."""
    hidden, head = shape.hidden_size, shape.hidden_size // shape.heads
    queries, keys, inner = shape.heads * head, shape.key_value_heads * head, shape.intermediate_size
    files: list[dict[str, tuple[int, ...]]] = [{"model.embed_tokens.weight": (shape.vocab_size, hidden)}]
    for layer in range(shape.layers):
        place = f"model.layers.{layer}"
        files.append(
            {
                f"{place}.self_attn.q_proj.weight": (queries, hidden),
                f"{place}.self_attn.k_proj.weight": (keys, hidden),
                f"{place}.self_attn.v_proj.weight": (keys, hidden),
                f"{place}.self_attn.o_proj.weight": (hidden, queries),
                f"{place}.mlp.gate_proj.weight": (inner, hidden),
                f"{place}.mlp.up_proj.weight": (inner, hidden),
                f"{place}.mlp.down_proj.weight": (hidden, inner),
                f"{place}.input_layernorm.weight": (hidden,),
                f"{place}.post_attention_layernorm.weight": (hidden,),
            }
        )
    files.append({"model.norm.weight": (hidden,), "lm_head.weight": (shape.vocab_size, hidden)})
    return files

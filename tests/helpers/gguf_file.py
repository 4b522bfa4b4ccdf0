"""A tiny Llama as a GGUF file, with a byte-level tokenizer and a chat template."""

from __future__ import annotations

import json
from pathlib import Path

from helpers.tiny import CHATML, make_tokenizer


def make_gguf(path: Path, *, seed: int = 0, hidden_size: int = 64, layers: int = 2) -> Path:
    """Write a random two-layer Llama, matrices in Q8_0, norms in F32."""
    import numpy as np
    from gguf import GGMLQuantizationType, GGUFWriter, quants

    tokenizer = json.loads(make_tokenizer()._tokenizer.to_str())
    vocabulary = tokenizer["model"]["vocab"]
    tokens = sorted(vocabulary, key=vocabulary.get)
    specials = {token["content"] for token in tokenizer["added_tokens"]}
    merges = [" ".join(pair) for pair in tokenizer["model"]["merges"]]
    heads, key_value_heads, inner = 4, 2, 2 * hidden_size

    writer = GGUFWriter(str(path), "llama")
    writer.add_name("tiny")
    writer.add_context_length(512)
    writer.add_block_count(layers)
    writer.add_embedding_length(hidden_size)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(key_value_heads)
    writer.add_rope_dimension_count(hidden_size // heads)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in specials else 1 for token in tokens])
    writer.add_token_merges(merges)
    writer.add_bos_token_id(vocabulary["<|endoftext|>"])
    writer.add_eos_token_id(vocabulary["<|im_end|>"])
    writer.add_pad_token_id(vocabulary["<|pad|>"])
    writer.add_chat_template(CHATML)

    random = np.random.default_rng(seed)

    def matrix(name: str, rows: int, columns: int) -> None:
        values = (random.standard_normal((rows, columns)) * 0.2).astype(np.float32)
        kind = GGMLQuantizationType.Q8_0
        writer.add_tensor(name, quants.quantize(values, kind), raw_dtype=kind)

    def ones(name: str) -> None:
        writer.add_tensor(name, np.ones(hidden_size, dtype=np.float32))

    matrix("token_embd.weight", len(tokens), hidden_size)
    for layer in range(layers):
        block = f"blk.{layer}"
        key_value = hidden_size // heads * key_value_heads
        ones(f"{block}.attn_norm.weight")
        ones(f"{block}.ffn_norm.weight")
        matrix(f"{block}.attn_q.weight", hidden_size, hidden_size)
        matrix(f"{block}.attn_k.weight", key_value, hidden_size)
        matrix(f"{block}.attn_v.weight", key_value, hidden_size)
        matrix(f"{block}.attn_output.weight", hidden_size, hidden_size)
        matrix(f"{block}.ffn_gate.weight", inner, hidden_size)
        matrix(f"{block}.ffn_up.weight", inner, hidden_size)
        matrix(f"{block}.ffn_down.weight", hidden_size, inner)
    ones("output_norm.weight")
    matrix("output.weight", len(tokens), hidden_size)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path

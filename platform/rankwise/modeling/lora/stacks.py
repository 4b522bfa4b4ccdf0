"""Flat storage for the adapters of a pack: one tensor for all matrices of arms that are alike.

Letters: `K` arms, `P` numbers of an arm, `R` rank, `I` and `O` features in and out of a module.

Arms with equal target modules and similar ranks form a `Stack`. Its `values` are (K, P), its gradients too: an arm is a
row, and a module's matrices of all arms are a view of the columns, A as (K, R, I) and B transposed as (K, R, O). So a
product for all arms is one batched product, and an optimizer works on one tensor. Smaller ranks are padded with zeros,
which stay zeros: their gradients are zero.

peft's parameters are views of their arm's row, A as (r, I) and B as the transpose of (r, O). peft and everything that
reads or copies into parameters work as before. Optimizers must not be given these views: torch's fused AdamW silently
computes wrong updates on some of them. They work on rows.

For products in 16 bit there is a copy of the values in that dtype, with B scaled, which is made once per step.

On a GPU ranks up to 16 share a stack, since its products work on tiles of 16, and larger ones up to the fourfold. On a
CPU only equal ranks do: padding costs memory there and saves nothing. Arms whose optimizer keeps moments in 8 bit are
not padded either, since blocks of moments must not depend on the other arms of a pack.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from rankwise.modeling.lora.draws import WIDEST, keep_share, module_word, table_offset

_TILE = 16
"""Ranks up to this one share a stack on a GPU."""


class Layout:
    """Where the matrices of each module are in an arm's row: all A first, then all B, so that B can be scaled at once.

    Attributes:
        modules: Features in and out of each module.
        rank: The padded rank.
        b_start: The first column of any B.
        size: `P`.
    """

    def __init__(self, modules: Mapping[str, tuple[int, int]], rank: int) -> None:
        """Place the matrices in the order of modules."""
        self.modules = dict(modules)
        self.rank = rank
        self.b_start = rank * sum(inputs for inputs, _ in modules.values())
        self.size = self.b_start + rank * sum(outputs for _, outputs in modules.values())
        self._places: dict[str, tuple[int, int]] = {}
        a, b = 0, self.b_start
        for name, (inputs, outputs) in modules.items():
            self._places[name] = (a, b)
            a, b = a + rank * inputs, b + rank * outputs

    def a(self, flat: torch.Tensor, module: str) -> torch.Tensor:
        """A of all arms, (K, R, I), as a view of (K, P)."""
        return self._matrices(flat, self._places[module][0], self.modules[module][0])

    def b(self, flat: torch.Tensor, module: str) -> torch.Tensor:
        """B of all arms, transposed, (K, R, O), as a view of (K, P)."""
        return self._matrices(flat, self._places[module][1], self.modules[module][1])

    def _matrices(self, flat: torch.Tensor, start: int, features: int) -> torch.Tensor:
        return flat[:, start : start + self.rank * features].view(-1, self.rank, features)

    def convert(self, flat: torch.Tensor, arms: Sequence[int], other: Layout) -> torch.Tensor:
        """Copy the rows of some arms into a layout of another rank.

        The rank may be lower where the arms' own ranks allow it.
        """
        if other.rank == self.rank:
            return torch.stack([flat[arm] for arm in arms])
        made = flat.new_zeros(len(arms), other.size)
        rank = min(self.rank, other.rank)
        for module in self.modules:
            for get, put in (
                (self.a(flat, module), other.a(made, module)),
                (self.b(flat, module), other.b(made, module)),
            ):
                for row, arm in enumerate(arms):
                    put[row, :rank] = get[arm, :rank]
        return made


@dataclass(frozen=True, kw_only=True)
class Member:
    """An arm of a stack.

    Attributes:
        adapter: The adapter's name.
        ranks: Its rank in each module.
        scalings: `alpha / r`, or `alpha / sqrt(r)`, in each module.
        dropout: Probability of dropping an element.
    """

    adapter: str
    ranks: Mapping[str, int]
    scalings: Mapping[str, float]
    dropout: float

    @property
    def rank(self) -> int:
        """The largest rank."""
        return max(self.ranks.values())

    @staticmethod
    def of(layers: Sequence[tuple[str, Any]], adapter: str) -> Member:
        """What the layers of a model say of an adapter."""
        own = {name: layer for name, layer in layers if adapter in layer.lora_A}
        (dropout,) = {getattr(layer.lora_dropout[adapter], "p", 0.0) for layer in own.values()}
        return Member(
            adapter=adapter,
            ranks={name: layer.lora_A[adapter].weight.shape[0] for name, layer in own.items()},
            scalings={name: float(layer.scaling[adapter]) for name, layer in own.items()},
            dropout=dropout,
        )


class Stack:
    """The adapters of arms that are alike.

    Attributes:
        members: The arms, in the order of rows.
        layout: Where their matrices are.
        values: (K, P) in fp32.
        gradients: (K, P) in fp32; backward passes add to it.
        anchor: A number that asks for a gradient, by which autograd knows that outputs need a backward pass.
        module_index: The number of each module.
        module_words: Words of the modules, (M,), for `draws.choose_patterns`.
        factors: `alpha / r` divided by the share that dropout keeps, (K, M).
        shares: The shares that dropout keeps, (K,).
        ps: The distinct probabilities of dropout.
        table_offsets: What is added to the patterns of each arm, (K,), in a table for `ps`.
    """

    gradients: torch.Tensor
    factors: torch.Tensor
    shares: torch.Tensor
    table_offsets: torch.Tensor
    _weights: torch.Tensor
    _stale: bool

    def __init__(self, layers: Mapping[str, Any], members: Sequence[Member], dtype: torch.dtype) -> None:
        """Move the matrices of adapters into flat storage.

        Args:
            layers: The LoRA layers that these adapters have, by name.
            members: The arms.
            dtype: That of products.
        """
        self.members = tuple(members)
        self._layers = dict(layers)
        shapes = {name: _shape(layer, self.members[0].adapter) for name, layer in self._layers.items()}
        self.layout = Layout(shapes, max(member.rank for member in members))
        device = next(iter(self._layers.values())).lora_A[self.members[0].adapter].weight.device
        if max(inputs for inputs, _ in shapes.values()) > WIDEST:
            assert not any(member.dropout for member in self.members), f"dropout needs at most {WIDEST} features"
        self._copies = dtype != torch.float32 or device.type == "cuda"
        self._dtype = dtype
        self.module_index = {name: index for index, name in enumerate(shapes)}
        self.module_words = torch.tensor([module_word(name) for name in shapes], device=device)
        self.anchor = torch.zeros((), device=device).requires_grad_()
        self.values = torch.zeros(len(self.members), self.layout.size, device=device)
        with torch.no_grad():
            for name, layer in self._layers.items():
                a, b = self.layout.a(self.values, name), self.layout.b(self.values, name)
                for index, member in enumerate(self.members):
                    a[index, : member.ranks[name]] = layer.lora_A[member.adapter].weight
                    b[index, : member.ranks[name]] = layer.lora_B[member.adapter].weight.t()
        self._settle()

    def __len__(self) -> int:
        """Number of arms."""
        return len(self.members)

    @property
    def device(self) -> torch.device:
        """Where the storage is."""
        return self.values.device

    @property
    def folded(self) -> bool:
        """Whether `weights` has B scaled. Otherwise products are scaled, which are small."""
        return self._copies

    def index(self, adapter: str) -> int:
        """The row of an adapter."""
        return self._order[adapter]

    def __contains__(self, adapter: object) -> bool:
        """Whether an adapter is in the stack."""
        return adapter in self._order

    def weights(self) -> torch.Tensor:
        """The values in the dtype of products, (K, P), made when values have changed; see `folded`."""
        if not self._copies:
            return self.values
        if self._stale:
            start = self.layout.b_start
            self._weights[:, :start] = self.values[:, :start]
            torch.mul(self.values[:, start:], self._b_factors(), out=self._weights[:, start:])
            self._stale = False
        return self._weights

    def changed(self) -> None:
        """Note that values have changed."""
        self._stale = True

    def finish_gradients(self) -> None:
        """Scale the gradients of B, once all passes of a step are made."""
        if self.folded:
            self.gradients[:, self.layout.b_start :].mul_(self._b_factors())

    def _b_factors(self) -> torch.Tensor:
        """What B is scaled by, (K, 1), or (K, all columns of B) where modules differ."""
        if self._uniform:
            return self.factors[:, :1]
        columns = [self.layout.rank * outputs for _, outputs in self.layout.modules.values()]
        return self.factors.repeat_interleave(torch.tensor(columns, device=self.device), dim=1)

    def keep(self, adapters: Sequence[str]) -> tuple[Layout, list[int], Layout]:
        """Compact the storage to some of the adapters.

        Returns:
            The former layout, the rows that were kept, and the new layout, for what else is stored by rows.
        """
        rows = [index for index, member in enumerate(self.members) if member.adapter in adapters]
        before = self.layout
        self.members = tuple(self.members[row] for row in rows)
        if before.rank > max(member.rank for member in self.members):
            self.layout = Layout(before.modules, max(member.rank for member in self.members))
        self.gradients = self.gradients[:0]
        self.values = before.convert(self.values, rows, self.layout)
        self._settle()
        return before, rows, self.layout

    def matrices(self, flat: torch.Tensor, adapter: str) -> Iterator[tuple[str, torch.Tensor]]:
        """An arm's matrices in a tensor of the shape of `values`, unpadded, under their names in a PEFT file."""
        index = self.index(adapter)
        for module, rank in self.members[index].ranks.items():
            yield f"base_model.model.{module}.lora_A.weight", self.layout.a(flat, module)[index, :rank]
            yield f"base_model.model.{module}.lora_B.weight", self.layout.b(flat, module)[index, :rank].t()

    def release(self) -> None:
        """Give the parameters of all adapters storage of their own again."""
        for layer in self._layers.values():
            for member in self.members:
                for matrices in (layer.lora_A, layer.lora_B):
                    if member.adapter in matrices:
                        parameter = matrices[member.adapter].weight
                        parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)

    def _settle(self) -> None:
        """Make everything that depends on the members and the layout, and show peft its views."""
        self._order = {member.adapter: index for index, member in enumerate(self.members)}
        self.gradients = torch.zeros_like(self.values)
        shares = [keep_share(member.dropout) for member in self.members]
        self.shares = torch.tensor(shares, device=self.device)
        factors = [
            [member.scalings[name] / share for name in self.layout.modules]
            for member, share in zip(self.members, shares, strict=True)
        ]
        self.factors = torch.tensor(factors, device=self.device)
        self._uniform = all(len(set(row)) == 1 for row in factors)
        self.ps = tuple(dict.fromkeys(member.dropout for member in self.members))
        self.drops = any(self.ps)
        offsets = [table_offset(self.ps.index(member.dropout)) for member in self.members]
        self.table_offsets = torch.tensor(offsets, dtype=torch.int32, device=self.device)
        if self._copies:
            self._weights = torch.empty_like(self.values, dtype=self._dtype)
        self._stale = True
        for name, layer in self._layers.items():
            a, b = self.layout.a(self.values, name), self.layout.b(self.values, name)
            for index, member in enumerate(self.members):
                _show(layer.lora_A[member.adapter], a[index, : member.ranks[name]])
                _show(layer.lora_B[member.adapter], b[index, : member.ranks[name]].t())


class Stacks:
    """The stacks of a pack, in a fixed order of arms."""

    def __init__(self, model: Any, adapters: Mapping[str, bool], dtype: torch.dtype) -> None:
        """Stack adapters that `create_adapter` has made.

        Args:
            model: The base's model.
            adapters: Their names, and whether each must not be padded.
            dtype: That of products.
        """
        layers = lora_layers(model)
        groups: dict[Any, list[Member]] = {}
        for adapter, exact in adapters.items():
            member = Member.of(layers, adapter)
            own = {name: layer for name, layer in layers if name in member.ranks}
            exact = exact or next(iter(own.values())).lora_A[adapter].weight.device.type == "cpu"
            key = (tuple(own), exact, member.rank if exact else rank_class(member.rank))
            groups.setdefault(key, []).append(member)
        self._stacks = [
            Stack({name: layer for name, layer in layers if name in members[0].ranks}, members, dtype)
            for members in groups.values()
        ]

    def __iter__(self) -> Iterator[Stack]:
        """The stacks that have arms."""
        return iter(self._stacks)

    def of(self, adapter: str) -> Stack:
        """The stack of an adapter."""
        return next(stack for stack in self._stacks if adapter in stack)

    def __contains__(self, adapter: object) -> bool:
        """Whether an adapter is in a stack."""
        return any(adapter in stack for stack in self._stacks)

    @property
    def adapters(self) -> list[str]:
        """All adapters, in the order of rows that makes the fewest products."""
        return [member.adapter for stack in self._stacks for member in stack.members]

    def drop(self, stack: Stack) -> None:
        """Forget a stack whose arms have all left."""
        self._stacks.remove(stack)

    def release(self) -> None:
        """Give the parameters of all adapters storage of their own again."""
        for stack in self._stacks:
            stack.release()
        self._stacks = []


def lora_layers(model: Any) -> list[tuple[str, Any]]:
    """The LoRA layers of a model with their full names."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer)]


def rank_class(rank: int) -> int:
    """The largest rank that shares a stack with this one on a GPU."""
    limit = _TILE
    while rank > limit:
        limit *= 4
    return limit


def _shape(layer: Any, adapter: str) -> tuple[int, int]:
    return layer.lora_A[adapter].weight.shape[1], layer.lora_B[adapter].weight.shape[0]


def _show(module: nn.Module, view: torch.Tensor) -> None:
    """Make a matrix of peft's a view."""
    parameter: Any = module.weight
    parameter.data = view
    parameter.grad = None

"""Anatomies made by hand: what the page and the terminal draw, without a model."""

from __future__ import annotations


def target(layer: int, kind: str = "self_attn.q_proj", *, values=(2.0, 1.0, 0.0, 0.0), flags=(), **changes):
    from rankwise.modeling.anatomy.anatomy import Target

    norm = sum(value * value for value in values) ** 0.5
    fields = {
        "module": f"model.layers.{layer}.{kind}",
        "lora_A": (4, 64),
        "lora_B": (32, 4),
        "parameters": 4 * (64 + 32),
        "scaling": 2.0,
        "dropout": 0.05,
        "delta_norm": norm,
        "effective_rank": 1.5 + layer / 10,
        "stable_rank": 1.2,
        "rank_99": 2,
        "singular_values": tuple(values),
        "flags": tuple(flags),
    }
    return Target(**{**fields, **changes})


def planned(layer: int, kind: str = "self_attn.q_proj", **changes):
    empty = {"delta_norm": None, "effective_rank": None, "stable_rank": None, "rank_99": None}
    return target(layer, kind, **{**empty, "singular_values": (), **changes})


def anatomy(targets, *, checks=(), with_base=True, beside=0, measured=True):
    from rankwise.modeling.anatomy.anatomy import Anatomy, Memory
    from rankwise.modeling.estimate import BaseEstimate

    parameters = sum(one.parameters for one in targets) + beside
    base = BaseEstimate(
        parameters=1_000_000,
        bytes_fp32=4_000_000,
        bytes_bf16=2_000_000,
        bytes_quantized=700_000,
        bytes_loaded=900_000,
        share_4bit=1.0,
    )
    memory = Memory(base=910_000, base_and_adapter=910_000 + 4 * parameters, measured=measured)
    return Anatomy(
        parameters=parameters,
        bytes=4 * parameters,
        targets=tuple(targets),
        base=base if with_base else None,
        memory=memory if with_base else None,
        checks=tuple(checks),
    )

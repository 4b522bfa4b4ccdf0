"""What a stored adapter accepts and returns, as MLflow writes it down.

There is no input schema: none admits texts, chats and tables alike (with one, a list of messages arrives without its
content). `inputs.py` checks every form itself.
"""

from __future__ import annotations

from typing import Any

from mlflow.models import ModelSignature
from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema

from rankwise.exceptions import ConfigError
from rankwise.modeling.generation import Decoding

DEFAULTS: dict[str, Any] = {
    "max_new_tokens": 64,
    "temperature": 0.0,
    "top_k": 0,
    "top_p": 1.0,
    "stop": [],
    "seed": 0,
    "batch_size": 8,
}
_TYPES = {
    "max_new_tokens": DataType.long,
    "temperature": DataType.double,
    "top_k": DataType.long,
    "top_p": DataType.double,
    "stop": DataType.string,
    "seed": DataType.long,
    "batch_size": DataType.long,
}
EXAMPLE = {"messages": [{"role": "user", "content": "How much is this diamond? carat 0.23, cut Ideal"}]}


def make_signature() -> ModelSignature:
    """The signature of every adapter: any input, one text per row, the parameters of generation."""
    params = ParamSchema(
        [
            # A list's default must be a list: with None MLflow refuses the specification.
            ParamSpec(name, _TYPES[name], default, shape=(-1,) if isinstance(default, list) else None)
            for name, default in DEFAULTS.items()
        ]
    )
    return ModelSignature(inputs=None, outputs=Schema([ColSpec(DataType.string)]), params=params)


def read_params(params: dict[str, Any] | None) -> tuple[Decoding, int, int]:
    """The decoding, the seed and the batch size out of `predict`'s params.

    Raises:
        ConfigError: A name is not known, or a value is out of its range.
    """
    given = dict(params or {})
    unknown = sorted(set(given) - set(DEFAULTS))
    if unknown:
        raise ConfigError(f"params not known: {', '.join(unknown)}; there are {', '.join(DEFAULTS)}")
    values = {**DEFAULTS, **given}
    stop = values["stop"]
    texts = (stop,) if isinstance(stop, str) else tuple(str(text) for text in stop)
    decoding = Decoding(
        max_new_tokens=int(values["max_new_tokens"]),
        temperature=float(values["temperature"]),
        top_k=int(values["top_k"]),
        top_p=float(values["top_p"]),
        stop=texts,
    )
    return decoding, int(values["seed"]), int(values["batch_size"])

"""The files of a base's directory: what belongs, is missing or is refused, and safetensors headers without torch."""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from rankwise.exceptions import AssetError
from rankwise.reporter import SILENT, Reporter

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

_BYTES = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
}
# `MAX_HEADER_SIZE` of safetensors.
_LARGEST_HEADER = 100_000_000
_BLOCK = 4 << 20


@dataclass(frozen=True, kw_only=True)
class TensorEntry:
    """One tensor of a safetensors file; `start` and `stop` are byte offsets in the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    stop: int


def read_header(path: Path) -> list[TensorEntry]:
    """The tensors of a safetensors file, in the order of their bytes. Raises `AssetError` if it is malformed."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
            if not 0 < length <= min(_LARGEST_HEADER, size - 8):
                raise AssetError(f"{path} is not a safetensors file: its header claims {length} of {size} bytes")
            header: dict[str, Any] = json.loads(file.read(length))
        entries = [
            _entry(name, value, path, 8 + length, size) for name, value in header.items() if name != "__metadata__"
        ]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise AssetError(f"{path} is not a safetensors file: {error}") from error
    except OSError as error:
        if isinstance(error, AssetError):
            raise
        raise AssetError(f"cannot read {path}: {error.strerror or error}") from error
    return sorted(entries, key=lambda entry: (entry.start, entry.name))


def weight_files(path: Path) -> list[Path]:
    """The safetensors files that transformers would load from a directory, whether they exist or not.

    As in transformers, `model.safetensors` precedes the index. Raises `AssetError` if the index is malformed.
    """
    index = path / INDEX
    if (path / SINGLE).is_file() or not index.is_file():
        return [path / SINGLE] if (path / SINGLE).is_file() else []
    try:
        names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise AssetError(f"cannot read {index}: {error!r}") from error
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise AssetError(f"{index} names {name!r}, which is not a file in its directory")
    return [path / name for name in names]


def tensors(path: Path) -> list[TensorEntry]:
    """The tensors of a base's directory, sorted by name. Raises `AssetError` as `read_header`."""
    entries = [entry for file in weight_files(path) for entry in read_header(file)]
    return sorted(entries, key=lambda entry: entry.name)


def tensors_digest(path: Path, *, progress: Reporter = SILENT) -> str:
    """`sha256:...` over name, dtype, shape and bytes of every tensor of a base, sorted by name.

    Unlike a file's digest it does not depend on how a library orders, aligns or shards the files.
    """
    sha256 = hashlib.sha256()
    entries = tensors(path)
    total = sum(entry.stop - entry.start for entry in entries)
    with progress.task("hashing converted tensors", total) as advance:
        for entry in entries:
            # JSON escapes newlines, so that different tensors never give the same line.
            sha256.update(json.dumps([entry.name, entry.dtype, list(entry.shape)]).encode() + b"\n")
            for block in _blocks(entry):
                sha256.update(block)
                advance(len(block))
    return f"sha256:{sha256.hexdigest()}"


def _blocks(entry: TensorEntry) -> Iterator[bytes]:
    with entry.file.open("rb") as file:
        file.seek(entry.start)
        left = entry.stop - entry.start
        while left:
            block = file.read(min(left, _BLOCK))
            if not block:
                raise AssetError(f"{entry.file} ends inside the tensor {entry.name}")
            left -= len(block)
            yield block


def _entry(name: str, value: dict[str, Any], path: Path, head: int, size: int) -> TensorEntry:
    start, stop = value["data_offsets"]
    shape = tuple(int(n) for n in value["shape"])
    if not 0 <= start <= stop <= size - head:
        raise AssetError(f"{path} is truncated: the tensor {name} ends at byte {head + stop} of {size}")
    width = _BYTES.get(str(value["dtype"]))
    if min(shape, default=0) < 0 or (width is not None and math.prod(shape) * width != stop - start):
        raise AssetError(
            f"{path} is not a safetensors file: the tensor {name} of shape {list(shape)} and type {value['dtype']} "
            f"cannot have {stop - start} bytes"
        )
    return TensorEntry(
        name=name, dtype=str(value["dtype"]), shape=shape, file=path, start=head + start, stop=head + stop
    )


# Weights as safetensors, configuration, tokenizer, templates. No code (.py), no pickles (.bin, .pt, .pth).
BASE_FILES = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.tiktoken", "merges.txt", "vocab.txt")
# `consolidated` has the same weights in another library's layout; folders have other forms of the model. `*` also
# matches `/`, as in the hub's client.
NOT_BASE_FILES = ("consolidated*", "adapter_*", "*/*.safetensors", "*/*.json", "*/*.model", "*/*.tiktoken")
TEMPLATE_FOLDER = "additional_chat_templates"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "*.tiktoken", "spiece.model")
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


def base_files(path: Path) -> list[Path]:
    """The files in a directory that belong to a base, sorted by name."""
    candidates = [*path.iterdir(), *(path / TEMPLATE_FOLDER).glob("*.jinja")]
    return sorted(file for file in candidates if file.is_file() and is_base_file(file.relative_to(path).as_posix()))


def missing_parts(path: Path) -> list[str]:
    """Names or kinds of files that a directory lacks to be a base. Raises `AssetError` if its index is unreadable."""
    missing = [] if (path / "config.json").is_file() else ["config.json"]
    weights = weight_files(path)
    if not weights:
        missing.append("safetensors weights")
    missing += [file.name for file in weights if not file.is_file()]
    if not any(_first(path, pattern) for pattern in TOKENIZER_FILES):
        missing.append("a tokenizer (tokenizer.json, tokenizer.model or vocab.json)")
    return missing


def check_base(path: Path, source: str) -> None:
    """Raise an `AssetError` unless a directory is a complete base, without pickles and code of its own."""
    if not weight_files(path):
        refuse_without_safetensors(source, [file.name for file in path.iterdir() if file.is_file()])
    missing = missing_parts(path)
    if missing:
        advice = f"; {INDEX} names it" if any(name.endswith(".safetensors") for name in missing) else ""
        raise AssetError(
            f"{source}: {path} is not a complete base: it lacks {', '.join(missing)}{advice}. A base is a directory "
            "written by `save_pretrained` of a model and of its tokenizer"
        )
    for name in ("config.json", "tokenizer_config.json"):
        file = path / name
        if file.is_file() and "auto_map" in read_json(file):
            raise AssetError(
                f"{source}: {file} has 'auto_map': it requires Python code from the base, which is never run. If "
                "transformers itself supports this model type, copy the directory, delete the key 'auto_map' "
                "there, and use the copy as base_model"
            )


def refuse_without_safetensors(source: str, names: list[str]) -> None:
    """Raise an `AssetError` for a base without safetensors, with a reason that depends on its files."""
    pickles = sorted(name for name in names if any(fnmatch(name, pattern) for pattern in PICKLES))
    ggufs = sorted(name for name in names if name.endswith(".gguf"))
    if pickles:
        raise AssetError(
            f"{source} has its weights as {', '.join(pickles[:3])} only: pickles can run code when they are read, so "
            "only safetensors are supported. Use a revision that has them, or convert the base once yourself with "
            "`save_pretrained`, in an environment you trust"
        )
    if ggufs:
        raise AssetError(
            f"{source} has no safetensors, but GGUF files ({', '.join(ggufs[:3])}): download one and use the "
            "file itself as base_model"
        )
    raise AssetError(f"{source} has no safetensors weights; found {', '.join(sorted(names)[:8]) or 'nothing'}")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises `AssetError` if it is unreadable or something else."""
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, OSError, RecursionError) as error:
        raise AssetError(f"cannot read {path}: {error}") from error
    if not isinstance(content, dict):
        raise AssetError(f"{path} is not a JSON object")
    return content


def is_base_file(name: str) -> bool:
    """Whether a file with this name, relative to the directory, belongs to a base."""
    return any(fnmatch(name, pattern) for pattern in BASE_FILES) and not any(
        fnmatch(name, pattern) for pattern in NOT_BASE_FILES
    )


def _first(path: Path, pattern: str) -> Path | None:
    return next((file for file in path.glob(pattern) if file.is_file()), None)

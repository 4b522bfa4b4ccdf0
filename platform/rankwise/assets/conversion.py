"""A GGUF file becomes a base as transformers keeps them, once: bf16 safetensors, configuration, tokenizer, template."""

from __future__ import annotations

import importlib.metadata
import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rankwise.assets.layout import check_base, read_json, tensors_digest, weight_files
from rankwise.compat.transformers import gguf_progress
from rankwise.digests import canonical_json, content_digest, digests
from rankwise.exceptions import AssetError, StorageError
from rankwise.files import ensure_entry, write_atomically
from rankwise.reporter import SILENT, Reporter
from rankwise.settings import Settings

logger = logging.getLogger(__name__)

RECORD = "conversion.json"
# Part of the entry's name: raised when the conversion itself changes, so that old entries are not taken for new ones.
VERSION = 1
# The libraries that decide what the converted numbers are.
LIBRARIES = ("transformers", "gguf", "torch", "tokenizers", "numpy")


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """What a converted base came from and what came out; kept in it as `conversion.json`.

    Attributes:
        gguf: Digest of the GGUF file.
        tensors: Digest over name, dtype, shape and bytes of the converted tensors.
        libraries: Versions of the libraries that converted it.
    """

    gguf: str
    tensors: str
    libraries: dict[str, str]


def convert_gguf(path: Path, digest: str, settings: Settings, progress: Reporter = SILENT) -> Path:
    """The directory of the base that a GGUF file becomes, made now if this machine has not made it before.

    Args:
        path: The GGUF file.
        digest: Its digest, which names the entry of the cache.
        settings: Where the cache is.
        progress: Told of the tensors as they are unpacked.

    Raises:
        AssetError: transformers cannot read the file, or what it was converted to has changed since.
        StorageError: The cache cannot be written.
    """
    entry = converted_entry(digest, settings)
    if entry.is_dir():
        _check_undamaged(entry, path.name, settings)
    ensure_entry(
        entry, settings, lambda folder: _convert(path, digest, folder, progress), doing=f"converting {path.name}"
    )
    return entry


def converted_entry(digest: str, settings: Settings) -> Path:
    """Where the cache keeps what the GGUF file with this digest becomes."""
    return settings.cache / "bases" / f"gguf-{digest.removeprefix('sha256:')[:32]}-v{VERSION}"


def converted_digest(path: Path, settings: Settings, *, verify: bool = False) -> str:
    """The digest of a converted base's tensors. The contents of its files decide it, so it is remembered by them.

    Args:
        path: The base.
        settings: Where digests are remembered.
        verify: Read everything anew, whatever is remembered.

    Raises:
        AssetError: A file is missing, cannot be read or is not in the format.
    """
    contents = sorted(digests(weight_files(path), settings, verify=verify).values())
    key = content_digest(canonical_json(contents)).removeprefix("sha256:")
    remembered = settings.cache / "tensor-digests" / key
    if remembered.is_file() and not verify:
        return remembered.read_text(encoding="utf-8").strip()
    digest = tensors_digest(path)
    try:
        write_atomically(remembered, f"{digest}\n".encode())
    except StorageError as error:
        # A cache that many share is often read-only, and serves all the same.
        logger.warning("the digest of the tensors in %s is not remembered: %s", path, error)
    return digest


def _check_undamaged(entry: Path, name: str, settings: Settings) -> None:
    conversion = read_conversion(entry)
    found = converted_digest(entry, settings)
    if conversion is None or conversion.tensors != found:
        what = "it has no record" if conversion is None else f"its tensors were {conversion.tensors} and are {found}"
        raise AssetError(
            f"the base that {name} was converted to is damaged: {what}; remove {entry}, and it is converted anew"
        )


def read_conversion(path: Path) -> Conversion | None:
    """The record in a base's directory, or None if it was not converted from a GGUF.

    Raises:
        AssetError: The record is damaged.
    """
    record = path / RECORD
    if not record.is_file():
        return None
    values = read_json(record)
    try:
        return Conversion(
            gguf=str(values["gguf"]),
            tensors=str(values["tensors"]),
            libraries={str(name): str(version) for name, version in values["libraries"].items()},
        )
    except (KeyError, AttributeError) as error:
        raise AssetError(f"{record} is damaged ({error!r}); remove {path}, and the GGUF is converted anew") from error


def _convert(path: Path, digest: str, folder: Path, progress: Reporter) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    where: dict[str, Any] = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    with _quiet_transformers(), _unpacking(path, progress):
        try:
            tokenizer = AutoTokenizer.from_pretrained(**where, local_files_only=True, trust_remote_code=False)
            model = AutoModelForCausalLM.from_pretrained(
                **where,
                quantization_config=GgufConfig(dequantize=True),
                dtype=torch.float32,
                local_files_only=True,
                trust_remote_code=False,
            )
        except MemoryError:
            raise
        except Exception as error:
            # Fed with broken bytes, the parser raises whatever it meets: struct.error, KeyError, UnicodeDecodeError.
            raise AssetError(
                f"transformers {importlib.metadata.version('transformers')} cannot read {path}: {error!r}. "
                "Name a base in safetensors, or a GGUF of an architecture that it knows"
            ) from error
        model.to(torch.bfloat16).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    check_base(folder, path.name)
    conversion = Conversion(
        gguf=digest,
        tensors=tensors_digest(folder, progress=progress),
        libraries={name: importlib.metadata.version(name) for name in LIBRARIES},
    )
    (folder / RECORD).write_text(json.dumps(asdict(conversion), indent=2) + "\n", encoding="utf-8")


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    from transformers.utils import logging as transformers_logging

    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


@contextmanager
def _unpacking(path: Path, progress: Reporter) -> Iterator[None]:
    """Turn the bar that transformers always draws while it unpacks a GGUF into ours."""
    with (
        gguf_progress(lambda items: _counted(items, path, progress)),
        progress.task(f"converting {path.name}", None),
    ):
        yield


def _counted(items: Sequence[Any], path: Path, progress: Reporter) -> Iterator[Any]:
    with progress.task(f"unpacking the tensors of {path.name}", len(items), unit="tensors") as advance:
        for item in items:
            yield item
            advance(1)

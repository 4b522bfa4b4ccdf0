"""Converts a GGUF file once into a base for transformers: bf16 safetensors, configuration, tokenizer, template."""

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
# Part of the entry's name: increase it when the conversion changes.
VERSION = 1
# The libraries that determine the converted numbers.
LIBRARIES = ("transformers", "gguf", "torch", "tokenizers", "numpy")


@dataclass(frozen=True, kw_only=True)
class GgufConversion:
    """The record in a converted base: digest of the GGUF, digest of the converted tensors, versions of libraries."""

    gguf: str
    tensors: str
    libraries: dict[str, str]


def convert_gguf(path: Path, digest: str, settings: Settings, progress: Reporter = SILENT) -> Path:
    """The directory of the base converted from a GGUF file, which is converted now unless the cache has it by `digest`.

    Raises:
        AssetError: transformers cannot read the file, or the converted base has changed.
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
    """The cache entry of the GGUF file with this digest."""
    return settings.cache / "bases" / f"gguf-{digest.removeprefix('sha256:')[:32]}-v{VERSION}"


def converted_digest(path: Path, settings: Settings, *, verify: bool = False) -> str:
    """The digest of a converted base's tensors, remembered by its files' digests. `verify` reads all again."""
    contents = sorted(digests(weight_files(path), settings, verify=verify).values())
    key = content_digest(canonical_json(contents)).removeprefix("sha256:")
    remembered = settings.cache / "tensor-digests" / key
    if remembered.is_file() and not verify:
        return remembered.read_text(encoding="utf-8").strip()
    digest = tensors_digest(path)
    try:
        write_atomically(remembered, f"{digest}\n".encode(), shared=True)
    except StorageError as error:
        # A shared cache may be read-only.
        logger.warning("could not store the digest of the tensors in %s: %s", path, error)
    return digest


def _check_undamaged(entry: Path, name: str, settings: Settings) -> None:
    conversion = read_conversion(entry)
    actual = converted_digest(entry, settings)
    if conversion is None or conversion.tensors != actual:
        problem = (
            "it has no record" if conversion is None else f"its tensors were {conversion.tensors} and are {actual}"
        )
        raise AssetError(
            f"the base converted from {name} is damaged: {problem}; remove {entry} and run again to convert it anew"
        )


def read_conversion(path: Path) -> GgufConversion | None:
    """The record of a converted base, None for another base. Raises `AssetError` if it is damaged."""
    record = path / RECORD
    if not record.is_file():
        return None
    values = read_json(record)
    try:
        return GgufConversion(
            gguf=str(values["gguf"]),
            tensors=str(values["tensors"]),
            libraries={str(name): str(version) for name, version in values["libraries"].items()},
        )
    except (KeyError, AttributeError) as error:
        raise AssetError(
            f"{record} is damaged ({error!r}); remove {path} and run again to convert the GGUF anew"
        ) from error


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
            # The parser raises any exception on malformed input: struct.error, KeyError, UnicodeDecodeError.
            raise AssetError(
                f"transformers {importlib.metadata.version('transformers')} cannot read {path}: {error!r}. "
                "Use a base in safetensors, or a GGUF of an architecture that it supports"
            ) from error
        model.to(torch.bfloat16).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    check_base(folder, path.name)
    conversion = GgufConversion(
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
    """Replace the progress bar that transformers always draws while it unpacks a GGUF."""
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

"""What belongs to a base's directory, and what makes one unusable."""

from __future__ import annotations

import json
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from rankwise.assets.weights import INDEX, weight_files
from rankwise.exceptions import AssetError

# Weights as safetensors, configuration, tokenizer, templates. No code (.py), no pickles (.bin, .pt, .pth).
BASE_FILES = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.tiktoken", "merges.txt", "vocab.txt")
# `consolidated` holds the same weights once more, in another library's layout; folders hold other forms of the model.
# Patterns as `fnmatch` reads them, and with it the hub's client: `*` runs over `/`.
NOT_BASE_FILES = ("consolidated*", "adapter_*", "*/*.safetensors", "*/*.json", "*/*.model", "*/*.tiktoken")
TEMPLATE_FOLDER = "additional_chat_templates"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "*.tiktoken", "spiece.model")
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


def base_files(path: Path) -> list[Path]:
    """The files of a directory that a base consists of, sorted by name."""
    candidates = [*path.iterdir(), *(path / TEMPLATE_FOLDER).glob("*.jinja")]
    return sorted(file for file in candidates if file.is_file() and belongs(file.relative_to(path).as_posix()))


def missing_parts(path: Path) -> list[str]:
    """What a directory lacks to be a base: names of files, or kinds of them; empty if it is whole.

    Raises:
        AssetError: The index of the weights cannot be read.
    """
    missing = [] if (path / "config.json").is_file() else ["config.json"]
    weights = weight_files(path)
    if not weights:
        missing.append("safetensors weights")
    missing += [file.name for file in weights if not file.is_file()]
    if not any(_first(path, pattern) for pattern in TOKENIZER_FILES):
        missing.append("a tokenizer (tokenizer.json, tokenizer.model or vocab.json)")
    return missing


def check_base(path: Path, source: str) -> None:
    """Refuse a directory that is no base, or none that may be loaded.

    Raises:
        AssetError: Something is missing, the weights are pickled, or the configuration asks for code of its own.
    """
    if not weight_files(path):
        refuse_without_safetensors(source, [file.name for file in path.iterdir() if file.is_file()])
    missing = missing_parts(path)
    if missing:
        advice = f"; {INDEX} names it" if any(name.endswith(".safetensors") for name in missing) else ""
        raise AssetError(
            f"{source}: {path} is not a whole base: it lacks {', '.join(missing)}{advice}. A base is a directory as "
            "`save_pretrained` of a model and of its tokenizer write it"
        )
    for name in ("config.json", "tokenizer_config.json"):
        file = path / name
        if file.is_file() and "auto_map" in read_json(file):
            raise AssetError(
                f"{source}: {file} has 'auto_map': it asks for Python code out of the base to be run, which is never "
                "done. If transformers itself knows this model type, copy the directory, delete the key 'auto_map' "
                "there, and name the copy as base_model"
            )


def refuse_without_safetensors(source: str, names: list[str]) -> None:
    """Refuse a base of which no file is safetensors, with the reason that its files give.

    Raises:
        AssetError: Always.
    """
    pickles = sorted(name for name in names if any(fnmatch(name, pattern) for pattern in PICKLES))
    ggufs = sorted(name for name in names if name.endswith(".gguf"))
    if pickles:
        raise AssetError(
            f"{source} has its weights as {', '.join(pickles[:3])} only: these are pickles, which can run code when "
            "they are read. Only safetensors are: take a revision that has them, or convert the base once yourself, in "
            "a place you trust, with `save_pretrained`"
        )
    if ggufs:
        raise AssetError(
            f"{source} has no safetensors, but GGUF files ({', '.join(ggufs[:3])}): download one and name the file "
            "itself as base_model"
        )
    raise AssetError(f"{source} has no safetensors weights; found {', '.join(sorted(names)[:8]) or 'nothing'}")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object out of a file of a base.

    Raises:
        AssetError: The file cannot be read or is not a JSON object.
    """
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, OSError) as error:
        raise AssetError(f"cannot read {path}: {error}") from error
    if not isinstance(content, dict):
        raise AssetError(f"{path} is not a JSON object")
    return content


def belongs(name: str) -> bool:
    """Whether a file of this name, relative to a base's directory, is part of the base."""
    return any(fnmatch(name, pattern) for pattern in BASE_FILES) and not any(
        fnmatch(name, pattern) for pattern in NOT_BASE_FILES
    )


def _first(path: Path, pattern: str) -> Path | None:
    return next((file for file in path.glob(pattern) if file.is_file()), None)

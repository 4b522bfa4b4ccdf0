"""Identity of a base (SHA-256 of weights, configuration, tokenizer, chat template) and manifests of model directories.

A fingerprint depends on content only, so a snapshot in a hub cache and a copy elsewhere agree.

| part | SHA-256 of |
|---|---|
| weights | the sorted digests of the safetensors files that transformers would load; file names do not count. For a
base converted from GGUF: its tensors, because releases of the libraries write the same numbers differently |
| config | `config.json` as canonical JSON without the `NOT_IDENTITY` keys at any depth, and the token ids of
`generation_config.json`, which decide where generation stops |
| tokenizer | the digests of the `TOKENIZER_FILES` present, by name, and `tokenizer_config.json` as canonical JSON
without its template and `NOT_TOKENIZER` |
| chat_template | the templates by name, from `chat_template.jinja`, `additional_chat_templates/`,
`chat_template.json` or `tokenizer_config.json` |

A manifest lists the size and SHA-256 of every file of a directory. It is checked before any file is parsed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rankwise.assets.gguf_conversion import converted_digest, read_conversion
from rankwise.assets.layout import read_json, weight_files
from rankwise.digests import canonical_json, content_digest, digests
from rankwise.exceptions import AdapterIntegrityError, AssetError
from rankwise.files import write_atomically
from rankwise.settings import Settings

# Saving a base again may change these keys, but no logit.
NOT_IDENTITY = frozenset(
    {
        "transformers_version", "_name_or_path", "name_or_path", "_commit_hash", "torch_dtype", "dtype",
        "_attn_implementation", "_attn_implementation_autoset", "_attn_implementation_internal",
        "use_cache", "output_attentions", "output_hidden_states", "return_dict", "torchscript",
    }
)  # fmt: skip
GENERATION_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id", "forced_bos_token_id", "forced_eos_token_id")
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "vocab.txt", "spiece.model",
    "sentencepiece.bpe.model", "tekken.json", "added_tokens.json", "special_tokens_map.json",
)  # fmt: skip
NOT_TOKENIZER = frozenset(
    {
        "chat_template", "transformers_version", "name_or_path", "_commit_hash", "tokenizer_file", "is_local",
        "local_files_only",
    }
)  # fmt: skip
NO_TEMPLATE = "none"


@dataclass(frozen=True, kw_only=True)
class Fingerprint:
    """The four parts of a base's identity, each `sha256:` and 64 hex digits (`chat_template` may be `none`)."""

    weights: str
    config: str
    tokenizer: str
    chat_template: str

    @property
    def digest(self) -> str:
        """Digest of the four parts."""
        return _digest({"format": "rankwise-base", "version": 1, **asdict(self)})

    def to_dict(self) -> dict[str, str]:
        """The parts and their digest."""
        return {**asdict(self), "digest": self.digest}

    @classmethod
    def from_dict(cls, values: dict[str, str]) -> Fingerprint:
        """Inverse of `to_dict`.

        Raises:
            ValueError: A part is missing, or the recorded digest does not match the parts.
        """
        missing = sorted(set(cls.__dataclass_fields__) - set(values))
        if missing:
            raise ValueError(f"a fingerprint needs {', '.join(cls.__dataclass_fields__)}; missing: {missing}")
        fingerprint = cls(**{name: str(values[name]) for name in cls.__dataclass_fields__})
        if values.get("digest", fingerprint.digest) != fingerprint.digest:
            raise ValueError(
                f"the fingerprint's parts have the digest {fingerprint.digest}, but {values['digest']} was recorded"
            )
        return fingerprint

    def differences(self, other: Fingerprint) -> list[str]:
        """List the parts that differ, each as `weights: sha256:... here, sha256:... there`."""
        mine, theirs = asdict(self), asdict(other)
        return [f"{part}: {mine[part]} here, {theirs[part]} there" for part in mine if mine[part] != theirs[part]]


def fingerprint_base(path: Path, settings: Settings, *, verify: bool = False) -> Fingerprint:
    """Compute the fingerprint of a local base: a directory in the Hugging Face format, with safetensors.

    Digests of large files are cached under `settings`; `verify` reads the weights again.

    Raises:
        AssetError: A required file is missing or cannot be parsed.
    """
    parts = _cheap_parts(path)
    return Fingerprint(weights=_digest(_weights(path, settings, verify)), **parts)


def differing_part(path: Path, expected: Fingerprint, settings: Settings) -> str | None:
    """Return the first part in which a local base differs (`config sha256:...`), or None; weights are compared last.

    Raises:
        AssetError: As in `fingerprint_base`.
    """
    for part, digest in _cheap_parts(path).items():
        if digest != getattr(expected, part):
            return f"{part} {digest}"
    weights = _digest(_weights(path, settings, verify=False))
    return None if weights == expected.weights else f"weights {weights}"


def _cheap_parts(path: Path) -> dict[str, str]:
    config = read_json(path / "config.json")
    generation = path / "generation_config.json"
    tokens = read_json(generation) if generation.is_file() else {}
    return {
        "config": _digest(
            {
                "config": _without(config, NOT_IDENTITY),
                "generation": {key: tokens[key] for key in GENERATION_TOKENS if tokens.get(key) is not None},
            }
        ),
        "tokenizer": _tokenizer_digest(path),
        "chat_template": template_fingerprint(path),
    }


def _weights(path: Path, settings: Settings, verify: bool) -> list[str]:
    """Sorted digests of the safetensors files that transformers would load, or of a converted base's tensors."""
    files = weight_files(path)
    missing = [file.name for file in files if not file.is_file()]
    if missing or not files:
        raise AssetError(
            f"{path} lacks {', '.join(missing) or 'safetensors weights'}; fetch the base again, or use one that has "
            "them (no other weight format is supported)"
        )
    if read_conversion(path) is not None:
        return [converted_digest(path, settings, verify=verify)]
    return sorted(digests(files, settings, verify=verify).values())


def _tokenizer_digest(path: Path) -> str:
    parts: dict[str, Any] = {}
    for name in TOKENIZER_FILES:
        if (path / name).is_file():
            with (path / name).open("rb") as file:
                parts[name] = hashlib.file_digest(file, "sha256").hexdigest()
    if (path / "tokenizer_config.json").is_file():
        parts["tokenizer_config.json"] = _without(read_json(path / "tokenizer_config.json"), NOT_TOKENIZER)
    if not parts:
        raise AssetError(f"{path} has no tokenizer (none of {', '.join(TOKENIZER_FILES[:3])}, ...)")
    return _digest(parts)


def template_fingerprint(path: Path) -> str:
    """Digest of the chat templates in a base or tokenizer directory: a fingerprint's `chat_template`."""
    # Later sources override earlier ones, as in transformers.
    templates: dict[str, str] = {}
    for name in ("tokenizer_config.json", "chat_template.json"):
        if (path / name).is_file():
            stored = read_json(path / name).get("chat_template")
            if isinstance(stored, str):
                templates["default"] = stored
            elif isinstance(stored, list):
                templates.update({str(entry["name"]): str(entry["template"]) for entry in stored})
    if (path / "chat_template.jinja").is_file():
        templates["default"] = (path / "chat_template.jinja").read_text(encoding="utf-8")
    for file in sorted((path / "additional_chat_templates").glob("*.jinja")):
        templates[file.stem] = file.read_text(encoding="utf-8")
    return _digest(templates) if templates else NO_TEMPLATE


def _without(value: Any, keys: frozenset[str]) -> Any:
    if isinstance(value, dict):
        return {key: _without(entry, keys) for key, entry in value.items() if key not in keys}
    if isinstance(value, list):
        return [_without(entry, keys) for entry in value]
    return value


def _digest(value: Any) -> str:
    return content_digest(canonical_json(value))


MANIFEST_NAME = "manifest.json"
# MLflow writes these after the flavor, or adds them to a download. The flavor stores the digest of its section of
# `MLmodel` in tags.
WRITTEN_BY_MLFLOW = frozenset({"MLmodel", "registered_model_meta"})
_FORMAT = "rankwise-manifest"
_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class FileEntry:
    """Size and digest of one file."""

    bytes: int
    sha256: str


def write_manifest(directory: Path) -> str:
    """Write `manifest.json` over all files below `directory` except MLflow's own; return its digest (`sha256:...`).

    Raises:
        AdapterIntegrityError: The directory holds a link (its target could change) or another special file.
        StorageError: The manifest cannot be written.
    """
    entries = {name: _entry(directory / name) for name in _files(directory, WRITTEN_BY_MLFLOW)}
    document = {
        "format": _FORMAT,
        "version": _VERSION,
        "files": {name: {"bytes": entry.bytes, "sha256": entry.sha256} for name, entry in sorted(entries.items())},
    }
    content = json.dumps(document, indent=1, sort_keys=True).encode() + b"\n"
    write_atomically(directory / MANIFEST_NAME, content)
    return content_digest(content)


def check_manifest(directory: Path, *, digest: str | None = None, exclude: Collection[str] = WRITTEN_BY_MLFLOW) -> str:
    """Check every file below `directory` against its manifest and return the manifest's digest; parse nothing else.

    `digest` is the expected digest of the manifest, if known from elsewhere (a tag). Files named in `exclude`, at the
    root of the directory, need not be in the manifest.

    Raises:
        AdapterIntegrityError: Lists all differences: a missing, unreadable or other manifest; files that are missing,
            surplus, or have another size or content.
    """
    path = directory / MANIFEST_NAME
    if path.is_symlink() or not path.is_file():
        raise AdapterIntegrityError(
            f"{directory} has no {MANIFEST_NAME}, so its files cannot be checked; if rankwise did not write it, use "
            "`rankwise import`"
        )
    content = path.read_bytes()
    actual = content_digest(content)
    if digest is not None and digest != actual:
        raise AdapterIntegrityError(
            f"{path} is not the stored manifest: expected {digest}, got {actual}; fetch the model again"
        )
    recorded = _parse(content, path)
    present = set(_files(directory, exclude))
    problems = [f"missing: {name}" for name in sorted(set(recorded) - present)]
    problems += [f"surplus: {name}" for name in sorted(present - set(recorded))]
    for name in sorted(present & set(recorded)):
        expected, entry = recorded[name], _entry(directory / name)
        if entry.bytes != expected.bytes:
            problems.append(f"{name}: {entry.bytes} bytes, expected {expected.bytes}")
        elif entry.sha256 != expected.sha256:
            problems.append(f"{name}: sha256 {entry.sha256}, expected {expected.sha256}")
    if problems:
        # A damaged manifest must not steer the terminal.
        shown = ("".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text) for text in problems)
        raise AdapterIntegrityError(
            f"files of {directory} differ from its manifest:\n  " + "\n  ".join(shown) + "\nfetch the model again, "
            "or use another version of it"
        )
    return actual


def _files(directory: Path, exclude: Collection[str]) -> list[str]:
    names = []
    for path in sorted(directory.rglob("*")):
        name = path.relative_to(directory).as_posix()
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise AdapterIntegrityError(
                f"{path} is a link or a special file; a stored model may contain only regular files"
            )
        if path.is_file() and name != MANIFEST_NAME and name not in exclude:
            names.append(name)
    return names


def _entry(path: Path) -> FileEntry:
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        return FileEntry(bytes=file.tell(), sha256=sha256)


# Of a path and of a digest: a damaged manifest must not fill the screen.
_LONGEST = 1000


def _parse(content: bytes, path: Path) -> dict[str, FileEntry]:
    try:
        document = json.loads(content)
        if document["format"] != _FORMAT or document["version"] != _VERSION:
            raise AdapterIntegrityError(
                f"{path} has format {document['format']!r} version {document['version']!r}; this release reads "
                f"{_FORMAT!r} version {_VERSION}"
            )
        return {
            str(name)[:_LONGEST]: FileEntry(bytes=int(entry["bytes"]), sha256=str(entry["sha256"])[:_LONGEST])
            for name, entry in document["files"].items()
        }
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError, RecursionError) as error:
        if isinstance(error, AdapterIntegrityError):
            raise
        raise AdapterIntegrityError(f"{path} is not a manifest: {error!r}; fetch the model again") from error

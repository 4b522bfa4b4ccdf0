"""Finds the base of a stored adapter, and refuses any other.

The order: what the caller names, then the recorded source, then the directories of `RANKWISE_BASES` and the cache, by
fingerprint. Whichever it is, its content decides: a copy elsewhere is the same base, a changed byte is not.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rankwise.assets.base import ResolvedBase, local_bases, resolve_base
from rankwise.assets.digest import directory_digest
from rankwise.assets.layout import base_files
from rankwise.exceptions import AssetError, BaseMismatchError, ConfigError, QuantizationMismatchError, StorageError
from rankwise.experiment.schema import QuantizationSpec
from rankwise.experiment.source import LocalSource, parse_source
from rankwise.flavor.metadata import BaseFacts
from rankwise.modeling.fingerprint import Fingerprint, differing_part, fingerprint_base
from rankwise.settings import Settings

logger = logging.getLogger(__name__)

_PARTS = ("weights", "config", "tokenizer", "chat_template")


@dataclass(frozen=True, kw_only=True)
class Override:
    """Something that is not as it was when the adapter was logged, and was allowed.

    Attributes:
        what: `base`, `quantization`, `compute_dtype`, `module_dtype`.
        recorded: As it was.
        used: As it is.
    """

    what: str
    recorded: str
    used: str

    def __str__(self) -> str:
        """One line for a log."""
        return f"{self.what}: {self.used} in place of {self.recorded}"


def find_base(
    facts: BaseFacts,
    uri: str,
    settings: Settings,
    *,
    base_model: str | Path | ResolvedBase | None = None,
    allow_base_mismatch: bool = False,
) -> ResolvedBase:
    """Find the base that an adapter was trained on.

    Args:
        facts: What was recorded.
        uri: The adapter, for messages.
        settings: Where to look.
        base_model: Look here and nowhere else.
        allow_base_mismatch: Take the named or recorded base whatever it is.

    Raises:
        BaseMismatchError: What was found is another base.
        AssetError: Nothing was found; the message lists where it was looked for.
        ConfigError: `base_model` cannot be understood.
    """
    if base_model is not None:
        found = base_model if isinstance(base_model, ResolvedBase) else _resolve(str(base_model), facts, settings)
        check_base(facts, fingerprint_base(found.path, settings), found, uri, allow=allow_base_mismatch)
        return found
    tried: list[str] = []
    other: ResolvedBase | None = None
    try:
        other = _resolve(facts.source, facts, settings)
        if fingerprint_base(other.path, settings) == facts.fingerprint or allow_base_mismatch:
            return other
        tried.append(f"{facts.source}: another base than the one trained on")
    except (AssetError, ConfigError, StorageError) as error:
        # A cache that cannot be written: the base may lie where nothing has to be.
        tried.append(f"{facts.source}: {error}")
    for path in local_bases(settings):
        try:
            # Many bases may lie there: gigabytes are hashed only of one that agrees in everything else.
            difference = differing_part(path, facts.fingerprint, settings)
        except AssetError as error:
            tried.append(f"{path}: {error}")
            continue
        if difference is None:
            logger.info("base of %s: %s, found by its fingerprint", uri, path)
            digest = directory_digest(path, settings, files=base_files(path))
            return ResolvedBase(source=str(path), revision=digest, path=path, pinned=False)
        tried.append(f"{path}: another base, {difference}")
    if other is not None:
        check_base(facts, fingerprint_base(other.path, settings), other, uri, allow=False)
    listed = "\n  ".join(tried)
    raise AssetError(
        f"the base of {uri} is not on this machine and cannot be fetched: {facts.source} at {facts.revision}, "
        f"fingerprint {facts.fingerprint.digest}. Looked at:\n  {listed}\nName it (base_model=...), or put it into a "
        "directory that RANKWISE_BASES lists"
    )


def check_base(facts: BaseFacts, found: Fingerprint, base: Any, uri: str, *, allow: bool) -> list[Override]:
    """Compare a base's fingerprint with the recorded one, part by part.

    Args:
        facts: What was recorded.
        found: The fingerprint of the base to use.
        base: It has `source`, `revision` and `path`.
        uri: The adapter, for messages.
        allow: Warn only.

    Returns:
        What to record: nothing, or the override.

    Raises:
        BaseMismatchError: They differ and `allow` is not set.
    """
    if found == facts.fingerprint:
        return []
    lines = [
        f"{part}: found {getattr(found, part)}, trained on {getattr(facts.fingerprint, part)}"
        for part in _PARTS
        if getattr(found, part) != getattr(facts.fingerprint, part)
    ]
    text = (
        f"base {base.source} at {base.revision} ({base.path}) is not the one that {uri} was trained on:\n  "
        + "\n  ".join(lines)
        + f"\nTrained on: {facts.source} at {facts.revision}, fingerprint {facts.fingerprint.digest}; found: "
        f"{found.digest}."
    )
    if not allow:
        raise BaseMismatchError(
            f"{text}\nName the right base (base_model=...), put it into a directory that RANKWISE_BASES lists, or pass "
            "allow_base_mismatch=True to load all the same; what it then answers is not what was registered"
        )
    logger.warning(
        "%s\nallow_base_mismatch: loaded all the same; the answers are not those of what was registered", text
    )
    return [
        Override(
            what="base",
            recorded=f"{facts.source} ({facts.fingerprint.digest})",
            used=f"{base.source} ({found.digest})",
        )
    ]


def check_quantization(facts: BaseFacts, used: QuantizationSpec, uri: str, *, allow: bool) -> list[Override]:
    """Compare a quantization with the recorded one; the compute dtype does not count, it follows the device.

    Raises:
        QuantizationMismatchError: They differ and `allow` is not set.
    """
    recorded, asked = describe_quantization(facts.quantization), describe_quantization(used)
    if recorded == asked:
        return []
    text = f"{uri} was trained over a base quantized as: {recorded}; asked for is: {asked}."
    if not allow:
        raise QuantizationMismatchError(
            f"{text} Leave quantization out, or pass allow_base_mismatch=True to load all the same; what it then "
            "answers is not what was registered"
        )
    logger.warning("%s allow_base_mismatch: loaded all the same", text)
    return [Override(what="quantization", recorded=recorded, used=asked)]


def describe_quantization(spec: QuantizationSpec) -> str:
    """A quantization in words, the parts that have no effect left out."""
    if spec.load_in_4bit:
        double = "with double quantization" if spec.bnb_4bit_use_double_quant else "without double quantization"
        return f"4 bit {spec.bnb_4bit_quant_type} {double}"
    return "8 bit" if spec.load_in_8bit else "not quantized"


def _resolve(text: str, facts: BaseFacts, settings: Settings) -> ResolvedBase:
    try:
        source = parse_source(text)
    except ValueError as error:
        raise ConfigError(f"base_model: {error}") from error
    # A directory goes by its fingerprint, which says what differs; the same hub id means the recorded commit.
    pinned = text == facts.source and not isinstance(source, LocalSource)
    return resolve_base(text, facts.revision if pinned else None, settings)

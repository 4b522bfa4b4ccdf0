"""Pins: what says that a base or a data set is still the one that was meant."""

from __future__ import annotations

from rankwise.exceptions import AssetError, ConfigError
from rankwise.experiment.source import HubSource, LocalSource, PypiSource, Source, check_revision, parse_source


def read_source(text: str, revision: str | None, *, key: str) -> HubSource | LocalSource | PypiSource:
    """Read the text of a source and check the form of its revision.

    Args:
        text: `org/name`, a path, or `pypi:DIST==VERSION#MEMBER`.
        revision: The revision that was given with it, or None.
        key: The key of the experiment file that holds the revision, for messages.

    Raises:
        ConfigError: One of them has a wrong form.
    """
    try:
        source = parse_source(text)
    except ValueError as error:
        raise ConfigError(f"{key.removesuffix('_revision')}: {error}") from error
    if revision is not None:
        try:
            check_revision(source, revision)
        except ValueError as error:
            raise ConfigError(f"{key}: {error}") from error
    return source


def check_digest(source: Source, *, expected: str | None, actual: str, key: str, hint: str) -> None:
    """Compare what is there with what the pin says.

    Args:
        source: Where it comes from.
        expected: The pin, or None where there is none.
        actual: The digest of what is there.
        key: The key of the experiment file that holds the pin.
        hint: What to do if the pin is right.

    Raises:
        AssetError: They differ. The message has both digests and both ways out.
    """
    if expected is None or expected == actual:
        return
    raise AssetError(
        f"wrong digest of {source}:\n  expected {expected}\n  found    {actual}\n"
        f"If what is there now is what you want, write `{key}: {actual}`; otherwise {hint}."
    )

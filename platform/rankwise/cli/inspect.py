"""`rankwise inspect`: the anatomy of a stored or planned adapter, as a tree on the terminal.

1. `locate` finds the adapter's PEFT directory, and its base if that is on this machine.
2. `inspect` computes the anatomy and, if the base is available, measures memory.
3. `render` draws the module tree (identical layers folded), sizes, deltas and checks.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import click
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from rankwise.cli.output import note, plain_console, print_json, waiting
from rankwise.exceptions import AssetError, BaseMismatchError, ConfigError
from rankwise.experiment.schema import NAMED_QUANTIZATIONS, LoraSpec, QuantizationSpec
from rankwise.files import format_size, write_atomically
from rankwise.settings import Settings

if TYPE_CHECKING:
    from rankwise.assets.base import ResolvedBase
    from rankwise.flavor.fetch import Fetched
    from rankwise.flavor.signing import Signer
    from rankwise.modeling.anatomy.anatomy import Anatomy, Target

Warn = Callable[[str], None]
_RUN_ID = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True, kw_only=True)
class LocatedAdapter:
    """A stored adapter.

    Attributes:
        directory: Its PEFT directory.
        name: Its name; an alias is shown with its present version.
        quantization: Of the base, as recorded; NF4 for a PEFT directory, which records none.
        base: The local base; None if it is missing, or given only as a configuration.
        config: The base's `config.json`, if known.
        over: The base and its quantization in words, if known.
        stored: Whether it is a model of the flavor, which may be signed.
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
def locate(model: str, base: str | None, settings: Settings, warn: Warn) -> Iterator[LocatedAdapter]:
    """Find the adapter `model` (a URI, a run id or a directory), and its base if that needs no network.

    `base` replaces the recorded base. `warn` is called if the base is missing, or not the one used in training.

    Raises:
        AdapterIntegrityError: A file does not match the manifest.
        RankwiseError: There is no such adapter.
    """
    path = Path(model.removeprefix("file:")).expanduser()
    if (path / "adapter_config.json").is_file():
        yield _from_peft(path, model, base, settings, warn)
        return
    from rankwise.flavor.fetch import fetch

    uri = f"runs:/{model}" if _RUN_ID.fullmatch(model) else model
    if uri.startswith(("models:", "runs:")):
        from rankwise.tracking.connection import connect

        connect(settings)
    with fetch(uri, settings.tracking_uri) as fetched:
        yield _from_flavor(fetched, model, base, settings, warn)


def _from_peft(path: Path, model: str, base: str | None, settings: Settings, warn: Warn) -> LocatedAdapter:
    from rankwise.modeling.adapter_config import read_adapter_document

    config = read_adapter_document(path)
    name, revision = (base, None) if base else (config.base_model_name_or_path, config.revision)
    resolved, base_config = _find_base(name, revision, settings, warn)
    at = f" at {revision}" if revision else ""
    return LocatedAdapter(
        directory=path,
        name=model,
        quantization=QuantizationSpec(),
        base=resolved,
        config=base_config,
        over=f"over {name}{at}" if name else "",
    )


def _from_flavor(fetched: Fetched, model: str, base: str | None, settings: Settings, warn: Warn) -> LocatedAdapter:
    from rankwise.flavor.base import describe_quantization, find_base
    from rankwise.modeling.fingerprint import differing_part

    facts, resolved, base_config = fetched.metadata.base, None, None
    if base is not None:
        resolved, base_config = _find_base(base, None, settings, warn)
        if resolved is not None and (difference := differing_part(resolved.path, facts.fingerprint, settings)):
            warn(f"{base} is not the base used in training: {difference}; inspecting the adapter over it anyway")
    else:
        try:
            # Offline: inspecting must not download gigabytes.
            resolved = find_base(facts, fetched.origin.uri, dataclasses.replace(settings, offline=True))
            base_config = resolved.path / "config.json"
        except (AssetError, BaseMismatchError) as error:
            warn(_no_base_warning(error))
    uri = fetched.origin.uri
    return LocatedAdapter(
        directory=fetched.adapter,
        name=model if uri in (model, str(Path(model).absolute())) else f"{model} ({uri})",
        quantization=facts.quantization,
        base=resolved,
        config=base_config,
        over=f"trained over {facts.source} at {facts.revision}, {describe_quantization(facts.quantization)}",
        stored=True,
        signer=fetched.signer,
    )


def _find_base(
    name: str | None, revision: str | None, settings: Settings, warn: Warn
) -> tuple[ResolvedBase | None, Path | None]:
    """The local base that a name stands for, and its configuration."""
    from rankwise.assets.base import resolve_base

    if name is None:
        warn(_no_base_warning(AssetError("the adapter's configuration names no base")))
        return None, None
    path = Path(name).expanduser()
    if path.suffix == ".json" or ((path / "config.json").is_file() and not any(path.glob("*.safetensors"))):
        return None, path
    try:
        resolved = resolve_base(name, revision, dataclasses.replace(settings, offline=True))
    except (AssetError, ConfigError) as error:
        warn(_no_base_warning(error))
        return None, None
    return resolved, resolved.path / "config.json"


def _no_base_warning(error: Exception) -> str:
    return (
        f"the base is not available, so shapes are not compared and memory is not measured: {error}\n"
        "set it with --base (a config.json is enough)"
    )


_QUANTIZATIONS = {name: NAMED_QUANTIZATIONS[name] for name in ("nf4", "nf4-single", "fp4", "int8", "none")}
# For files and pipes, where rich assumes 80 columns and would break names.
_WIDTH = 140


class _View(NamedTuple):
    """What to show. `over` describes the base."""

    anatomy: Anatomy
    title: str
    over: str
    quantization: QuantizationSpec
    signer: Signer | None = None


@click.command()
@click.argument("model", required=False)
@click.option(
    "--base", help="Base: a directory, config.json, org/name or pypi:... Default for MODEL: the recorded one."
)
@click.option("--r", type=click.IntRange(min=1), help="Planned adapter: rank.")
@click.option("--target-modules", help="Planned adapter: module names separated by commas, or all-linear.")
@click.option(
    "--lora-alpha", type=click.FloatRange(min=0, min_open=True), help="Planned adapter: alpha. Default: 2 * r."
)
@click.option(
    "--lora-dropout", type=click.FloatRange(0, 1, max_open=True), default=0.0, help="Planned adapter: dropout."
)
@click.option("--use-rslora", is_flag=True, help="Planned adapter: scale by alpha / sqrt(r).")
@click.option("--quantization", type=click.Choice(list(_QUANTIZATIONS)), help="Of the base. Default: recorded, or nf4.")
@click.option("--measure/--no-measure", default=True, help="Load the base, if available, to measure memory.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--html", type=click.Path(dir_okay=False, path_type=Path), help="Also write a page with plots.")
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
    """Show an adapter's modules, parameters, bytes, memory, and the norm and effective rank of each delta.

    MODEL is models:/NAME@ALIAS, models:/NAME/VERSION, a run (its id, or runs:/ID), or a PEFT directory. Without MODEL,
    --base, --r and --target-modules describe a planned adapter; no weights are read.
    """
    console = plain_console(stderr=True)
    settings = Settings.load()
    spec = _QUANTIZATIONS[quantization] if quantization else None
    planned = {"--r": r, "--target-modules": target_modules}
    if model is None:
        missing = [name for name, value in {"--base": base, **planned}.items() if value is None]
        if missing:
            raise click.UsageError(
                f"give a MODEL, or plan an adapter with --base, --r and --target-modules; missing: {missing}"
            )
        assert base is not None
        assert r is not None
        assert target_modules is not None
        lora = _lora(r, target_modules, lora_alpha, lora_dropout, use_rslora)
        with waiting("building the model without weights"):
            view = _view_plan(base, lora, spec or QuantizationSpec(), settings)
    else:
        given = [name for name, value in planned.items() if value is not None]
        if given:
            raise click.UsageError(
                f"{', '.join(given)} describe a planned adapter, MODEL is an existing one; give only one of them"
            )
        with waiting(f"inspecting {model}") as status:
            view = _view_stored(model, base, spec, settings, measure, lambda text: status.update(Text(text)), console)
    if html is not None:
        from rankwise.report.anatomy import make_page

        write_atomically(html.absolute(), make_page(view.anatomy, view.title, view.over).encode(), shared=True)
        note(f"page with plots: {html}")
    if as_json:
        signer = None if view.signer is None else vars(view.signer)
        print_json({**view.anatomy.to_dict(), "signer": signer})
    else:
        _show(view)


def _show(view: _View) -> None:
    spec = view.quantization
    layer = "Linear4bit" if spec.load_in_4bit else "Linear8bitLt" if spec.load_in_8bit else "Linear"
    console = plain_console()
    if not console.is_terminal:
        console = plain_console(width=_WIDTH)
    console.print(render(view.anatomy, view.title, view.over, layer if view.anatomy.base else "Linear"))


def _lora(r: int, targets: str, alpha: float | None, dropout: float, use_rslora: bool) -> LoraSpec:
    names = tuple(name.strip() for name in targets.split(",") if name.strip())
    if not names:
        raise click.UsageError("--target-modules is empty; give module names separated by commas, or all-linear")
    return LoraSpec(
        r=r,
        lora_alpha=2 * r if alpha is None else alpha,
        lora_dropout=dropout,
        target_modules="all-linear" if names == ("all-linear",) else names,
        use_rslora=use_rslora,
    )


def _view_plan(base: str, lora: LoraSpec, quantization: QuantizationSpec, settings: Settings) -> _View:
    from rankwise.assets.base import find_config
    from rankwise.modeling.anatomy.reader import plan_anatomy

    anatomy = plan_anatomy(find_config(base, settings), lora, quantization)
    return _View(anatomy, f"planned: r={lora.r}", f"over {base}", quantization)


def _view_stored(
    model: str,
    base: str | None,
    quantization: QuantizationSpec | None,
    settings: Settings,
    measure: bool,
    say: Callable[[str], None],
    console: Console,
) -> _View:
    from rankwise.modeling.anatomy.reader import adapter_anatomy

    with locate(model, base, settings, lambda text: console.print(text, style="yellow", soft_wrap=True)) as located:
        used = quantization or located.quantization
        anatomy = adapter_anatomy(located.directory, base_config=located.config, quantization=used)
        if measure and located.base is not None:
            say(f"loading {located.base.source}")
            anatomy = anatomy.with_memory(*_measure(located.directory, located.base, used, settings))
        signed = str(located.signer or "not signed")
        over = f"{located.over}; {signed}" if located.stored else located.over
        return _View(anatomy, located.name, over, used, located.signer)


def _measure(
    directory: Path, resolved: ResolvedBase, quantization: QuantizationSpec, settings: Settings
) -> tuple[int, int]:
    """Bytes of the loaded base, without and with the adapter."""
    from rankwise.modeling.adapter import load_adapter
    from rankwise.modeling.base import load_base

    base = load_base(resolved, quantization, settings)
    alone = base.memory_bytes
    load_adapter(base.model, directory, "inspected")
    return alone, base.memory_bytes


_WORST = 8
_BLOCKS = "▁▂▃▄▅▆▇█"
# Maximum number of layers that fit on one line.
_LONGEST = 100


def render(anatomy: Anatomy, title: str, over: str, base_layer: str) -> RenderableType:
    """Draw an anatomy, disagreements first; `base_layer` is the class of adapted layers, such as `Linear4bit`."""
    from rankwise.modeling.quantized_share import EXPECTED_SHARE

    parts: list[RenderableType] = []
    if anatomy.disagreements:
        parts += [Text(f"DISAGREE  {check.text}", style="bold red") for check in anatomy.disagreements] + [Text()]
    parts += [_tree(anatomy, title, over, base_layer), "", _sizes(anatomy)]
    if anatomy.base is not None:
        parts.append(Text("quantized: linear layers quantized, the rest in 16 bit; here: as loaded", style="dim"))
        if anatomy.base.share_4bit:
            share = f"in 4 bit: {anatomy.base.share_4bit:.1%} of the base's weights besides embeddings and head"
            parts.append(Text(share, style="dim" if anatomy.base.share_4bit >= EXPECTED_SHARE else "yellow"))
    remarks = [*_flags(anatomy), *_rank_use(anatomy)]
    if remarks:
        parts += ["", *remarks]
    if anatomy.checks:
        parts += ["", *_checks(anatomy)]
    return Group(*parts)


def _tree(anatomy: Anatomy, title: str, over: str, base_layer: str) -> Tree:
    from rankwise.modeling.anatomy.anatomy import fold

    share = f", {anatomy.share_of_base:.3%} of the base" if anatomy.share_of_base is not None else ""
    tree = Tree(
        Text.assemble(
            (title, "bold"),
            f"  {anatomy.parameters:,} parameters, {format_size(anatomy.bytes)}{share}",
            (f"\n{over}" if over else "", "dim"),
        )
    )
    for block in fold(anatomy):
        branch = tree.add(Text(block.label, style="cyan"))
        for alike in block.modules:
            _module(branch, alike, base_layer)
    if anatomy.beside:
        tree.add(Text(f"outside of the targets: stored rows, {anatomy.beside:,} parameters", style="cyan"))
    return tree


def _module(branch: Tree, alike: Sequence[Target], base_layer: str) -> None:
    """Add one module, or the same module of several identical layers."""
    from rankwise.modeling.anatomy.anatomy import kind_of, span

    target = alike[0]
    (r, inputs), (outputs, _) = target.lora_A, target.lora_B
    node = branch.add(Text.assemble((kind_of(target.module), "bold"), f"  {target.parameters:,} parameters"))
    node.add(f"base_layer  {base_layer} {inputs} -> {outputs}")
    node.add(f"lora_A      {r} x {inputs}")
    node.add(f"lora_B      {outputs} x {r}")
    node.add(f"dropout     {target.dropout:g}    scaling {target.scaling:g}")
    norms = [target.delta_norm for target in alike if target.delta_norm is not None]
    ranks = [target.effective_rank for target in alike if target.effective_rank is not None]
    kept = [target.rank_99 for target in alike if target.rank_99 is not None]
    if norms and ranks and kept:
        node.add(
            f"delta       norm {span(norms)}{_sparks(norms)}\n"
            f"            effective rank {span(ranks)} of {r}{_sparks(ranks)}\n"
            f"            99 % of its energy in rank {span(kept)}"
        )


def _sparks(values: Sequence[float]) -> str:
    """One block for each layer, scaled to the largest value; x for non-finite values."""
    if not 1 < len(values) <= _LONGEST:
        return ""
    top = max((value for value in values if math.isfinite(value)), default=0.0)
    return "  " + "".join(
        "x" if not math.isfinite(value) else _BLOCKS[round((len(_BLOCKS) - 1) * value / top) if top else 0]
        for value in values
    )


def _sizes(anatomy: Anatomy) -> Table:
    how = "estimated" if anatomy.memory is None or not anatomy.memory.measured else "measured"
    table = Table("", "parameters", "float32", "16 bit", "quantized", f"here, {how}", box=None, padding=(0, 2))
    for column in table.columns:
        column.no_wrap = True
    for column in table.columns[1:]:
        column.justify = "right"
    if anatomy.base is not None and anatomy.memory is not None:
        base = anatomy.base
        table.add_row(
            "base",
            f"{base.parameters:,}",
            format_size(base.bytes_fp32),
            format_size(base.bytes_bf16),
            format_size(base.bytes_quantized),
            format_size(anatomy.memory.base),
        )
        both = base.parameters + anatomy.parameters
        table.add_row(
            "base + adapter",
            f"{both:,}",
            format_size(4 * both),
            format_size(2 * both),
            format_size(base.bytes_quantized + 2 * anatomy.parameters),
            format_size(anatomy.memory.base_and_adapter),
        )
    table.add_row(
        "adapter",
        f"{anatomy.parameters:,}",
        format_size(4 * anatomy.parameters),
        format_size(2 * anatomy.parameters),
        "",
        format_size(anatomy.bytes),
    )
    return table


def _flags(anatomy: Anatomy) -> list[RenderableType]:
    from rankwise.modeling.anatomy.anatomy import FLAGS

    lines: list[RenderableType] = []
    for flag, names in anatomy.flagged.items():
        shown = ", ".join(names[:_WORST]) + (f" and {len(names) - _WORST} more" if len(names) > _WORST else "")
        total = len(anatomy.targets)
        lines.append(Text(f"{flag}: {len(names)} of {total} modules ({FLAGS[flag]}): {shown}", style="yellow"))
    return lines


def _rank_use(anatomy: Anatomy) -> list[RenderableType]:
    use = anatomy.rank_use
    return [] if use is None else [Text(use.text, style="bold")]


def _checks(anatomy: Anatomy) -> list[RenderableType]:
    return [
        Text(f"ok        {check.text}", style="green")
        if check.ok
        else Text(f"DISAGREE  {check.text}", style="bold red")
        for check in anatomy.checks
    ]

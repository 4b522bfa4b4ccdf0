"""`rankwise inspect`: the anatomy of an adapter over its base, or of one that is only planned.

- What `rankwise inspect` is pointed at: the PEFT directory behind it, and the base as far as it is on this machine.
- An adapter's anatomy on a terminal: the module tree with identical layers folded, sizes, deltas, checks.
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
        from rankwise.tracking.connection import connect

        connect(settings)
    with fetch(uri, settings.tracking_uri) as fetched:
        yield _of_flavor(fetched, model, base, settings, warn)


def _of_peft(path: Path, model: str, base: str | None, settings: Settings, warn: Warn) -> Found:
    from rankwise.modeling.adapter import read_adapter_config

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
    from rankwise.flavor.load import describe_quantization, find_base
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


_QUANTIZATIONS = {name: NAMED_QUANTIZATIONS[name] for name in ("nf4", "nf4-single", "fp4", "int8", "none")}
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
        from rankwise.report.anatomy import make_page

        write_atomically(html.absolute(), make_page(view.anatomy, view.title, view.over).encode())
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
        raise click.UsageError("--target-modules names no module; give names separated by commas, or all-linear")
    return LoraSpec(
        r=r,
        lora_alpha=2 * r if alpha is None else alpha,
        lora_dropout=dropout,
        target_modules="all-linear" if names == ("all-linear",) else names,
        use_rslora=use_rslora,
    )


def _plan(base: str, lora: LoraSpec, quantization: QuantizationSpec, settings: Settings) -> _View:
    from rankwise.assets.base import find_config
    from rankwise.modeling.anatomy.reader import plan_anatomy

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
    from rankwise.modeling.anatomy.reader import adapter_anatomy

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


_WORST = 8
_BLOCKS = "▁▂▃▄▅▆▇█"
# More layers than this make a line that no terminal shows whole.
_LONGEST = 100


def render(anatomy: Anatomy, title: str, over: str, base_layer: str) -> RenderableType:
    """Everything there is to see; what disagrees comes first.

    Args:
        anatomy: What was found.
        title: What it was found in.
        over: The base, in words.
        base_layer: The class of the adapted layers in the base, `Linear4bit` for a 4-bit one.
    """
    parts: list[RenderableType] = []
    if anatomy.disagreements:
        parts += [Text(f"DISAGREE  {check.text}", style="bold red") for check in anatomy.disagreements] + [Text()]
    parts += [_tree(anatomy, title, over, base_layer), "", _sizes(anatomy)]
    if anatomy.base is not None:
        parts.append(Text("quantized: linear layers quantized, the rest in 16 bit; here: as it is loaded", style="dim"))
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
        tree.add(Text(f"beside the targets: stored rows, {anatomy.beside:,} parameters", style="cyan"))
    return tree


def _module(branch: Tree, alike: Sequence[Target], base_layer: str) -> None:
    """One module of one layer, or of many alike."""
    from rankwise.modeling.anatomy.anatomy import kind_of, span

    target = alike[0]
    (r, inputs), (outputs, _) = target.lora_A, target.lora_B
    node = branch.add(Text.assemble((kind_of(target.module), "bold"), f"  {target.parameters:,} parameters"))
    node.add(f"base_layer  {base_layer} {inputs} -> {outputs}")
    node.add(f"lora_A      {r} x {inputs}")
    node.add(f"lora_B      {outputs} x {r}")
    node.add(f"dropout     {target.dropout:g}    scaling {target.scaling:g}")
    norms = [one.delta_norm for one in alike if one.delta_norm is not None]
    ranks = [one.effective_rank for one in alike if one.effective_rank is not None]
    kept = [one.rank_99 for one in alike if one.rank_99 is not None]
    if norms and ranks and kept:
        node.add(
            f"delta       norm {span(norms)}{_sparks(norms)}\n"
            f"            effective rank {span(ranks)} of {r}{_sparks(ranks)}\n"
            f"            99 % of its energy in rank {span(kept)}"
        )


def _sparks(values: Sequence[float]) -> str:
    """One block a layer, as high as its value over the largest one; a cross for what is not finite."""
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

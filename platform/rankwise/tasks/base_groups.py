"""Which stored adapters lie over one base: those of one fingerprint and one quantization are evaluated together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from rankwise.assets.base import ResolvedBase, resolve_base
from rankwise.data.template import apply_template
from rankwise.exceptions import ConfigError
from rankwise.experiment.arm import ArmSpec
from rankwise.experiment.schema import QuantizationSpec
from rankwise.flavor.bases import describe_quantization, find_base
from rankwise.flavor.metadata import AdapterMetadata, BaseFacts, template_digest
from rankwise.modeling.base import LoadedBase, load_tokenizer
from rankwise.modeling.fingerprint import fingerprint_base
from rankwise.modeling.quiet import quiet_transformers
from rankwise.tasks.context import Context
from rankwise.tasks.setting import Setting, recorded_setting

BARE = "base"
"""How the setting's bare base is named among the models; another base is `base of URI`."""
_NO_TEMPLATE = "none"
_TEMPLATE = ("chat_template", "chat_template_revision")


@dataclass(frozen=True, kw_only=True)
class BaseIdentity:
    """A base, for people and for comparison.

    Attributes:
        source: What names it.
        revision: Its pin.
        fingerprint: Digest of its content.
        tokenizer: Digest of its tokenizer: two bases whose digests differ may cut a text into other tokens.
        quantization: How it was loaded, in words.
    """

    source: str
    revision: str
    fingerprint: str
    tokenizer: str
    quantization: str

    @classmethod
    def of(cls, base: LoadedBase) -> BaseIdentity:
        """Of a base in memory."""
        return cls(
            source=base.source,
            revision=base.revision,
            fingerprint=base.fingerprint.digest,
            tokenizer=base.fingerprint.tokenizer,
            quantization=describe_quantization(base.quantization),
        )

    def __str__(self) -> str:
        """One line."""
        return f"{self.source} ({self.quantization}, fingerprint {self.fingerprint})"


@dataclass(frozen=True, kw_only=True)
class Group:
    """Models over one base, whose rows have one form.

    Attributes:
        experiment: Of the definition, for messages.
        base: On this machine.
        arm: The setting's rows and metrics over this base.
        bare: How the base alone is named.
        other: Whether it is loaded otherwise than the adapters were trained over it.
        uris: The adapters.
    """

    experiment: str
    base: ResolvedBase
    arm: ArmSpec
    bare: str
    other: bool
    uris: list[str] = field(default_factory=list)


def is_plain_directory(uri: str) -> bool:
    """Whether a name is a PEFT directory, which says nothing of its base that could be relied on."""
    return Path(uri).is_dir() and not (Path(uri) / "MLmodel").exists()


def group_by_base(
    context: Context,
    setting: Setting,
    uris: Sequence[str],
    quantization: QuantizationSpec | None,
    metadata: Mapping[str, AdapterMetadata],
) -> list[Group]:
    """Group models by their base; the setting's own base comes first, also where no adapter lies over it.

    Adapters over one base that were trained with different chat templates are groups of their own: each reads the rows
    as it has learned to.

    Args:
        context: The stores.
        setting: On what and by what.
        uris: Stored adapters, or PEFT directories, which are taken to lie over the setting's base.
        quantization: Of all bases, in place of the recorded ones.
        metadata: What each stored adapter says of itself.

    Raises:
        BaseMismatchError: A base was found that is not the recorded one.
        AssetError: A base cannot be had.
    """
    arm = setting.arm
    recorded = {uri: found.base for uri, found in metadata.items()}
    resolved = _own_base(context, arm, recorded)
    chosen = quantization or arm.quantization
    own = Group(
        experiment=setting.spec.name,
        base=resolved,
        arm=arm.model_copy(update={"quantization": chosen}),
        bare=BARE,
        other=describe_quantization(chosen) != describe_quantization(arm.quantization),
    )
    fingerprint = fingerprint_base(resolved.path, context.settings)
    own_base = (fingerprint.digest, describe_quantization(arm.quantization))
    own_template = _template_of(arm, resolved) if metadata else _NO_TEMPLATE
    groups = {(*own_base, own_template): own}
    for uri in uris:
        if (facts := recorded.get(uri)) is None:
            own.uris.append(uri)
            continue
        template = metadata[uri].chat_template
        base = (facts.fingerprint.digest, describe_quantization(facts.quantization))
        if base == own_base and template != own_template and _recorded_template(context, uri) is None:
            template = own_template  # Whoever chose the setting knows better.
        key = (*base, template)
        if key not in groups:
            found = find_base(facts, uri, context.settings)
            used = quantization or facts.quantization
            groups[key] = Group(
                experiment=setting.spec.name,
                base=found,
                arm=_over(context, arm, uri, found, used),
                bare=f"{BARE} of {uri}",
                other=describe_quantization(used) != describe_quantization(facts.quantization),
            )
        groups[key].uris.append(uri)
    return list(groups.values())


def _template_of(arm: ArmSpec, base: ResolvedBase) -> str:
    """The digest of the chat template that an arm's rows are rendered with."""
    dataset = arm.dataset
    with quiet_transformers():
        tokenizer = load_tokenizer(base.path)
    return template_digest(apply_template(tokenizer, dataset.chat_template, dataset.chat_template_revision))


def _own_base(context: Context, arm: ArmSpec, recorded: Mapping[str, BaseFacts]) -> ResolvedBase:
    """The setting's base. Where an adapter over it says what is in it, it may lie elsewhere (`RANKWISE_BASES`)."""
    for uri, facts in recorded.items():
        if (facts.source, facts.revision) == (arm.base_model, arm.base_model_revision):
            return find_base(facts, uri, context.settings)
    return resolve_base(arm.base_model, arm.base_model_revision, context.settings, context.voice)


def _over(context: Context, arm: ArmSpec, uri: str, base: ResolvedBase, quantization: QuantizationSpec) -> ArmSpec:
    """The setting's arm over another base, with the chat template that the adapter there was trained with."""
    # Of a model that was not made by a run of this program: the base's own template.
    template = _recorded_template(context, uri) or dict.fromkeys(_TEMPLATE)
    return arm.model_copy(
        update={
            "base_model": base.source,
            "base_model_revision": base.revision,
            "quantization": quantization,
            "dataset": arm.dataset.model_copy(update=template),
        }
    )


def _recorded_template(context: Context, uri: str) -> dict[str, str | None] | None:
    """The chat template of the definition that an adapter was made from; None where none is recorded."""
    if uri.startswith(("models:", "runs:")):
        with suppress(ConfigError):
            dataset = recorded_setting(context, uri).arm.dataset
            return {name: getattr(dataset, name) for name in _TEMPLATE}
    return None

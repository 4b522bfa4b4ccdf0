"""Replaces the regular expressions of an adapter's configuration by what they match, before peft sees them.

peft runs `target_modules`, `exclude_modules` and the keys of `rank_pattern` and `alpha_pattern` as regular expressions,
without a limit. Here they run once, limited (`module_patterns`), and peft gets the names of modules.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from peft import LoraConfig

from rankwise.exceptions import AdapterConfigError, AdapterTargetError
from rankwise.modeling.adapter_config import named_by
from rankwise.modeling.module_patterns import PatternError, full_matches, is_plain, shown

ALL_LINEAR = "all-linear"
# peft compares every key with every module; beyond this it takes longer than all else that loading does.
_MANY_KEYS = 200


def resolve_targets(config: LoraConfig, modules: Sequence[str], where: str) -> LoraConfig:
    """A configuration with the names of the modules that `target_modules` and `exclude_modules` match, or their ends.

    `modules` are those of the base without adapters, `where` names the adapter in messages. A configuration without
    regular expressions is returned as it is.

    Raises:
        AdapterConfigError: A regular expression reached its limit.
        AdapterTargetError: Nothing is matched.
    """
    targets, excluded = config.target_modules, config.exclude_modules
    by_targets = isinstance(targets, str) and targets.lower() != ALL_LINEAR
    by_excluded = isinstance(excluded, str) and bool(excluded)
    if not by_targets and not by_excluded:
        return config
    left_out: set[str] | None = None
    if by_excluded:
        left_out = _matched("exclude_modules", excluded, modules, where)
    elif excluded:
        left_out = _named(excluded, modules)
    resolved = copy.deepcopy(config)
    if by_targets:
        wanted = _matched("target_modules", targets, modules, where) - (left_out or set())
        if not wanted:
            raise AdapterTargetError(
                f"{where}: the regular expression target_modules, {shown(targets)}, matches the whole name of none of "
                f"the base's {len(modules)} modules{' that are not excluded' if left_out else ''}; their names look "
                f"like {_example(modules)}"
            )
        names = _shortest(wanted, modules)
        # peft also takes a name for the end of longer names.
        surplus = _named(names, modules) - wanted
        resolved.target_modules, resolved.exclude_modules = names, surplus or None
        as_wanted = _named(names, modules) - _named(surplus, modules) == wanted
    else:
        assert left_out is not None
        resolved.exclude_modules = left_out or None
        as_wanted = _named(left_out, modules) == left_out
    if not as_wanted:
        raise AdapterConfigError(
            f"{where}: target_modules and exclude_modules select modules whose names are the ends of others' names, "
            "which a list of names cannot express; replace the regular expressions by lists of module names"
        )
    return resolved


def resolve_patterns(config: LoraConfig, modules: Sequence[str], where: str) -> LoraConfig:
    """A configuration whose `rank_pattern` and `alpha_pattern` name modules out of `modules`, those with adapters.

    Keys that are names are kept, up to a number. Otherwise each value gets one key that lists the names of its modules,
    as a regular expression without any operator but the choice.

    Raises:
        AdapterConfigError: A regular expression reached its limit.
    """
    resolved = config
    for key in ("rank_pattern", "alpha_pattern"):
        patterns = getattr(config, key) or {}
        if len(patterns) <= _MANY_KEYS and all(map(is_plain, patterns)):
            continue
        if resolved is config:
            resolved = copy.deepcopy(config)
        setattr(resolved, key, _by_name(key, patterns, modules, where))
    return resolved


def _by_name(key: str, patterns: Mapping[str, Any], modules: Sequence[str], where: str) -> dict[str, Any]:
    try:
        matches = full_matches([named_by(text) for text in patterns], modules)
    except PatternError as error:
        raise AdapterConfigError(f"{where}: {key}: {error}") from error
    # The first key that matches decides, as in peft.
    values: dict[str, Any] = {}
    for value, names in zip(patterns.values(), matches, strict=True):
        for name in names:
            values.setdefault(name, value)
    alike: dict[Any, list[str]] = {}
    for name in modules:
        if name in values:
            alike.setdefault(values[name], []).append(name)
    return {f"^(?:{'|'.join(re.escape(name) for name in names)})": value for value, names in alike.items()}


def _matched(key: str, pattern: str, modules: Sequence[str], where: str) -> set[str]:
    try:
        (names,) = full_matches([pattern], modules)
    except PatternError as error:
        raise AdapterConfigError(f"{where}: {key}: {error}") from error
    return set(names)


def _named(keys: Collection[str], modules: Sequence[str]) -> set[str]:
    """The modules that peft selects by a list: a key is a module's name, or its end after a dot."""
    known = set(keys)
    return {name for name in modules if not known.isdisjoint(_ends(name))}


def _shortest(wanted: set[str], modules: Sequence[str]) -> set[str]:
    """The shortest ends, all of one number of parts, that select just these modules, such as q_proj; or their names."""
    for parts in range(1, max(name.count(".") for name in wanted) + 1):
        ends = {".".join(name.split(".")[-parts:]) for name in wanted}
        if _named(ends, modules) == wanted:
            return ends
    return wanted


def _ends(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[start:]) for start in range(len(parts))]


def _example(modules: Sequence[str]) -> str:
    return max(modules, key=lambda name: name.count("."), default="(it has none)")

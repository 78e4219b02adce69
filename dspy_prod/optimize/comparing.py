"""Sentences about what two runs differ in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

_ABSENT: Final = object()
_AGAIN: Final = "so what it asks may differ, and be paid again"

FURTHER: Final = frozenset({"num_trials"})
"""Arguments of `compile` that only say how far an optimizer goes: its way is the same as far as the shorter one."""


def compared(
    old: Mapping[str, Any],
    new: Mapping[str, Any],
    seeds: tuple[Mapping[str, Any], Mapping[str, Any]],
    caps: tuple[Mapping[str, Any], Mapping[str, Any]],
) -> tuple[list[str], list[str]]:
    """(what must not differ and does, what may) of two descriptions, seeds and caps; in each pair the old ones first.

    Example:
        ```python
        refused, allowed = compared(old.described, new.described, (old.seeds, new.seeds), (old.caps, new.caps))
        ```
    """
    refused = [
        *_optimizer(old.get("optimizer") or {}, new.get("optimizer") or {}),
        *_program(old.get("student") or {}, new.get("student") or {}),
        *_datasets(old.get("datasets") or {}, new.get("datasets") or {}),
        *_models(old.get("lms") or {}, new.get("lms") or {}),
        *_values("the seed", *seeds),
    ]
    allowed = [
        *_metric(old.get("metric"), new.get("metric")),
        *_values("compile's", *[_further(one, other) for one, other in ((old, new), (new, old))]),
        *_values("the cap", *caps),
        *[f"{each}, {_AGAIN}" for each in _values("the version of", old.get("versions", {}), new.get("versions", {}))],
    ]
    return refused, allowed


def goes_further(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    """Whether a resumed run ends elsewhere on the same way, so that it need not ask all that it asked at the end.

    Example:
        ```python
        goes_further(old.described, new.described)
        ```
    """
    return _further(old, new) != _further(new, old)


def _further(told: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments that only say how far it goes, where both say it in numbers."""
    mine, others = (((each.get("optimizer") or {}).get("arguments") or {}) for each in (told, other))
    return {name: mine[name] for name in sorted(FURTHER) if all(type(each.get(name)) is int for each in (mine, others))}


def _optimizer(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    if old.get("class") != new.get("class"):
        return [f"the optimizer is {_short(new.get('class'))} instead of {_short(old.get('class'))}"]
    name = _short(new.get("class"))
    found = _values(f"{name}'s", old.get("settings", {}), new.get("settings", {}))
    before, after = old.get("arguments", {}), new.get("arguments", {})
    far = _further({"optimizer": old}, {"optimizer": new})
    found += _values("compile's", *[{key: each[key] for key in each if key not in far} for each in (before, after)])
    if old.get("source") != new.get("source"):
        found.append(f"the source of {name} is another")
    return found


def _program(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    if old.get("class") != new.get("class"):
        return [f"the program is {_short(new.get('class'))} instead of {_short(old.get('class'))}"]
    found = []
    before, after = old.get("predictors", {}), new.get("predictors", {})
    for name in _names(before, after):
        if name not in after:
            found.append(f"the program has no predictor {name!r} any more")
        elif name not in before:
            found.append(f"the program has a new predictor {name!r}")
        elif before[name] != after[name]:
            found.append(f"the program's predictor {name!r} has other instructions, fields, demos or settings")
    before, after = old.get("source", {}), new.get("source", {})
    changed = [_short(name) for name in _names(before, after) if before.get(name) != after.get(name)]
    return [*found, *[f"the source of {name} is another" for name in changed]]


def _datasets(old: Mapping[str, Sequence[str]], new: Mapping[str, Sequence[str]]) -> list[str]:
    found = []
    for name in _names(old, new):
        before, after = list(old.get(name) or ()), list(new.get(name) or ())
        if before == after:
            continue
        if not before or not after:
            found.append(f"the {name} was {'' if before else 'not '}given before, and is {'' if after else 'not '}now")
        elif len(before) != len(after):
            found.append(f"the {name} has {len(after):,} examples instead of {len(before):,}")
        elif sorted(before) == sorted(after):
            found.append(f"the examples of the {name} come in another order")
        else:
            places = [at for at, (one, other) in enumerate(zip(before, after, strict=True)) if one != other]
            found.append(f"{len(places):,} examples of the {name} are others, the first is number {places[0]}")
    return found


def _models(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    found = []
    for role in _names(old, new):
        before, after = old.get(role), new.get(role)
        if before == after:
            continue
        if before is None or after is None:
            found.append(f"there {'is now' if before is None else 'is no longer'} an LM for {role}")
        elif before["model"] != after["model"]:
            found.append(f"the LM for {role} is {after['model']} instead of {before['model']}")
        else:
            told = _values(f"the {role} LM's", before["arguments"], after["arguments"])
            found += told or [f"the LM for {role} is reached at another address, or has other headers or an engine"]
    return found


def _metric(old: Any, new: Any) -> list[str]:
    if old == new:
        return []
    if old is None or new is None:
        return [f"there is {'a' if old is None else 'no'} metric now"]
    if old["name"] != new["name"]:
        return [f"the metric is {_short(new['name'])} instead of {_short(old['name'])}"]
    what = "source" if old["source"] != new["source"] else "values it carries along"
    return [f"the metric {_short(new['name'])} has another {what}" if what == "source" else
            f"the metric {_short(new['name'])} has other {what}"]  # fmt: skip


def _values(what: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    found = []
    for name in _names(old, new):
        before, after = old.get(name, _ABSENT), new.get(name, _ABSENT)
        if before != after:
            found.append(f"{what} {name} is {_told(after)} instead of {_told(before)}")
    return found


def _names(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    return [*old, *[name for name in new if name not in old]]


def _told(value: Any) -> str:
    if value is _ABSENT or value is None:
        return "none"
    if isinstance(value, Mapping) and "name" in value:
        return _short(value["name"])
    if isinstance(value, Mapping) and "model" in value:
        return str(value["model"])
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _short(name: Any) -> str:
    return str(name).rpartition(".")[2] if "<locals>" not in str(name) else str(name).rpartition("<locals>.")[2]

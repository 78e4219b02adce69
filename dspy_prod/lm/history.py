"""What DSPy's history tells of a call beside what DSPy itself writes there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from dspy_prod.privacy.names import is_secret, public
from dspy_prod.records import CallRecord, usd

_CACHED: Final = {"kind": "cached", "currency": "USD"}
_UNKNOWN: Final = {"kind": "unknown", "reason": "no price is known for this model"}


def cost_details(record: CallRecord) -> dict[str, Any]:
    """Where an entry's `cost` comes from; `kind` is DSPy's `estimate` (usage times price) or `unknown`, or ours.

    Of our own: `cached`, `replayed` (a run's log answered), and `bound`, where the provider did not tell the usage
    and the most it can be is charged.
    """
    if record.cached:
        return {**_CACHED, "kind": "replayed"} if record.outcome == "replayed" else _CACHED.copy()
    if record.cost_nano is None:
        return dict(_UNKNOWN)
    return {"kind": "bound" if record.estimated else "estimate", "currency": "USD", "model": record.model}


def tell(entry: dict[str, Any], records: Sequence[CallRecord]) -> None:
    """Write into an entry what its call cost, whether the cache answered, and which route did."""
    if len(records) == 1:
        record = records[0]
        entry["cost"], entry["cached"], entry["route"] = usd(record.cost_nano), record.cached, record.route
        entry["cost_details"] = cost_details(record)
    else:
        costs = [record.cost_nano for record in records]
        entry["cost"] = None if None in costs else usd(sum(cost for cost in costs if cost is not None))
        entry["cached"] = bool(records) and all(record.cached for record in records)
        entry["route"] = records[-1].route if records else None
        entry["cost_details"] = {"candidates": [cost_details(record) for record in records]}


class Arguments(dict[str, Any]):
    """An LM's `kwargs`, its key among them as in a plain `dspy.LM`, whose repr shows none of what is secret."""

    def __repr__(self) -> str:
        return repr(public(self))


def shown(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call as the history may show them: all but what holds a secret."""
    return {name: value for name, value in kwargs.items() if not is_secret(name)}

"""Whether any call has had a name that an operator says, by the ledger: a stop of a name that is written otherwise
stops nothing."""

from __future__ import annotations

import datetime as dt
from typing import Any, Final

from dspy_prod.errors import StoreUnavailableError
from dspy_prod.records import OTHER, called, summed_as
from dspy_prod.stores.base import Store
from dspy_prod.stores.keys import apart

LOOKED_BACK: Final = dt.timedelta(days=31)
"""How far back the sums are read. A record is found however old it is."""
MOST_NAMED: Final = 8
"""Names that are told of those that are known."""
_MOST_READ: Final = 1_000
_OF_PROGRAMS: Final = ("program", "tenant")
_WAIT: Final = 1.0
"""Seconds for what was posted to be written."""


def doubt(store: Store, scope: str, value: str, now: float, route: bool = False) -> str:
    """Why a stop or an order may be of nobody: no call of that name is in the ledger. Empty where there is one.

    Empty as well where it cannot be told, because the store cannot be read or keeps no sum of each name.

    Args:
        scope: `program`, `model` or `tenant`.
        value: the name.
        now: seconds since the epoch, as the store counts them.
        route: whether a model may be named with its address, as `Controls.circuits` tells it.
    """
    name = (apart(value)[-1] or value) if route else value
    since = str((dt.datetime.fromtimestamp(now, dt.timezone.utc) - LOOKED_BACK).date())
    wanted: Any = {scope: name}
    try:
        store.flush(_WAIT)
        if store.records(limit=1, **wanted) or _summed(store, scope, summed_as(name), since):
            return ""
        if _summed(store, scope, OTHER, since):  # it may be among those
            return ""
        known = _known(store, scope, since)
    except StoreUnavailableError:
        return ""
    known.sort(key=lambda each: name not in each and each not in name)
    told = ", ".join(map(repr, known[:MOST_NAMED])) or "none yet"
    return f"No call of {scope} {name!r} is in the ledger; known: {told}{', ...' if len(known) > MOST_NAMED else ''}"


def _summed(store: Store, scope: str, value: str, since: str) -> bool:
    if store.totals(dimension=scope, since_day=since, value=value):
        return True
    return scope in _OF_PROGRAMS and bool(store.programs.sums(dimension=scope, since_day=since, value=value))


def _known(store: Store, scope: str, since: str) -> list[str]:
    """The names in the sums, those first that spent most; of very many tenants only those."""
    found = [value for value, _ in store.sums(dimension=scope, since_day=since, most=_MOST_READ)]
    if scope == "program":
        found += [each.value for each in store.programs.sums(dimension=scope, since_day=since)]
    return list(dict.fromkeys(called(value) for value in found))

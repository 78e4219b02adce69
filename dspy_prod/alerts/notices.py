"""What is told of an event, and to whom it is the same: one sentence, without secrets and without anybody's name."""

from __future__ import annotations

import datetime as dt
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import PurePath
from typing import Any, Final, NamedTuple

from dspy_prod import privacy
from dspy_prod.privacy.outward import outward
from dspy_prod.telemetry.events import EVENTS, Event

EXHAUSTED: Final = "budget_exhausted"
"""Not an event of its own: a `rejected` one that says so."""

DEFAULT: Final = (
    "budget_soft", EXHAUSTED, "budget_overrun", "breaker_opened", "breaker_closed", "calls_stopped", "calls_resumed",
    "experiment_moved", "experiment_alarm", "promotion", "store_degraded", "store_recovered", "operation_dropped",
    "hold_abandoned", "tracking_lost", "registry_stale", "signature_refused", "follow_failed",
)  # fmt: skip
"""Kinds that are told unless others are asked for."""

NEVER: Final = frozenset({"call_finished", "attempt_failed", "call_content", "rejected"})
"""Told of every call: that is for metrics and logs. Of `rejected`, there is `budget_exhausted`."""

KINDS: Final = frozenset({*EVENTS, EXHAUSTED} - NEVER)
"""Everything that can be asked for."""

_LENGTH: Final = 500
_SALT: Final = os.urandom(16)


class Notice(NamedTuple):
    """What a message is made of.

    Attributes:
        kind: of `DEFAULT`, or the name of another event.
        subject: what it is about, such as a model or a budget.
        level: `"info"`, `"warning"` or `"error"`.
        text: one sentence in plain words.
        at: when it happened (the last time), in seconds since the epoch.
        folded: how often the same has happened since it was last told, this one not counted.
        apart: tells subjects apart that are called alike, such as tenants; means nothing outside of this process.

    Example:
        ```python
        def page(notice):  # a format of your own
            return {"summary": notice.text, "severity": notice.level, "count": notice.folded + 1}


        hook = alerts.webhook("https://pager.example.com/v1", format=page)
        hook.close()
        ```
    """

    kind: str
    subject: str
    level: str
    text: str
    at: float
    folded: int = 0
    apart: int = 0

    @property
    def when(self) -> str:
        """ISO 8601, UTC."""
        return _iso(self.at)


def _iso(at: float) -> str:
    return dt.datetime.fromtimestamp(at, dt.timezone.utc).isoformat(timespec="seconds")


def kind_of(event: Event) -> str:
    """What an event is called here."""
    if event.name == "rejected" and event.data.get("reason") == "budget_exceeded":
        return EXHAUSTED
    return event.name


def notice_of(kind: str, event: Event) -> Notice:
    """An event in words."""
    data = event.data
    said = _SAID.get(kind)
    text = _others(kind, data) if said is None else said(data)
    level = EVENTS["rejected" if kind == EXHAUSTED else event.name].level if event.name in EVENTS else logging.WARNING
    word = "error" if level >= logging.ERROR else "warning" if level >= logging.WARNING else "info"
    apart = hash((_SALT, data.get("value"))) if data.get("scope") == "tenant" else 0
    return Notice(kind, _clean(_subject(data)), word, _clean(text), event.at, apart=apart)


def _subject(data: Mapping[str, Any]) -> str:
    """The first of these that an event speaks of; of a budget its own name, and not whose account of it."""
    if data.get("budget"):
        return str(data["budget"]).partition("=")[0]
    if data.get("path"):
        return PurePath(str(data["path"])).name
    if data.get("scope"):
        return _stopped_for(data)
    return next((str(data[name]) for name in ("experiment", "program", "route", "model", "run") if data.get(name)), "")


def _clean(text: str) -> str:
    redactor = privacy.active() or privacy.default()
    line = " ".join(redactor.text(outward(text)).split())
    return line if len(line) <= _LENGTH else line[: _LENGTH - 1] + "…"


def _opened(data: Mapping[str, Any]) -> str:
    after = data.get("retry_after")
    later = "" if after is None else f"; it is tried again in {after:.0f} s"
    return f"The circuit of {data['route']} is open ({data['cause']}): calls are refused{later}"


def _closed(data: Mapping[str, Any]) -> str:
    return f"The circuit of {data['route']} is closed: calls pass again"


def _stopped(data: Mapping[str, Any]) -> str:
    why = f" ({data['reason']})" if data.get("reason") else ""
    end = "" if data.get("until") is None else f", until {_iso(data['until'])}"
    return f"An operator stopped calls: {_stopped_for(data)}{why}. They are refused in every worker{end}"


def _resumed(data: Mapping[str, Any]) -> str:
    return f"Calls that an operator had stopped go on: {_stopped_for(data)}"


def _stopped_for(data: Mapping[str, Any]) -> str:
    """What an operator stopped; which tenant is nobody's business."""
    scope = str(data["scope"])
    return "all" if scope == "all" else "one tenant" if scope == "tenant" else f"{scope} {data['value']}"


def _soft(data: Mapping[str, Any]) -> str:
    cheaper = f"; calls go to {data['degrade_to']} now" if data.get("degrade_to") else ""
    return (
        f"{_budget(data)} has passed its soft threshold: {data['spent_usd']:.2f} of {data['limit_usd']:.2f} USD"
        f"{cheaper}"
    )


def _exhausted(data: Mapping[str, Any]) -> str:
    return f"{_budget(data)} is spent: calls of {data['model']} are refused"


def _budget(data: Mapping[str, Any]) -> str:
    name, mark, _ = str(data.get("budget") or "").partition("=")
    return f"The budget {name!r}{' (of one of its accounts)' if mark else ''}" if name else "A budget"


def _overrun(data: Mapping[str, Any]) -> str:
    return (
        f"A call of {data['model']} was billed {data['cost_usd']:.6f} USD, and {data['bound_usd']:.6f} were reserved: "
        "check prices="
    )


def _promotion(data: Mapping[str, Any]) -> str:
    before = "nothing" if data["from_version"] is None else f"version {data['from_version']}"
    return f"{data['action']} of {data['program']}@{data['alias']}: from {before} to version {data['to_version']}"


def _experiment(data: Mapping[str, Any]) -> str:
    void = "INVALID, nothing can be concluded: " if data.get("verdict") == "invalid" else ""
    variant = f" ({data['variant']})" if data.get("variant") else ""
    return f"Experiment {data['experiment']}: {data['what']}{variant}. {void}{data['reason']}"


def _lost(data: Mapping[str, Any]) -> str:
    why = f" ({data['error']})" if data.get("error") else ""
    return f"{data['lost']} traces and {data['messages_lost']} messages did not reach MLflow{why}"


def _degraded(data: Mapping[str, Any]) -> str:
    return f"The store cannot be written ({data['error']}); what is settled is kept and written later"


def _recovered(_: Mapping[str, Any]) -> str:
    return "The store can be written again"


_SAID: Final[Mapping[str, Callable[[Mapping[str, Any]], str]]] = {
    "breaker_opened": _opened, "breaker_closed": _closed, "calls_stopped": _stopped, "calls_resumed": _resumed,
    "budget_soft": _soft, EXHAUSTED: _exhausted, "budget_overrun": _overrun, "promotion": _promotion,
    "experiment_moved": _experiment, "experiment_alarm": _experiment, "tracking_lost": _lost,
    "store_degraded": _degraded, "store_recovered": _recovered,
}  # fmt: skip

_WHOSE: Final = frozenset({
    "user", "tenant", "session", "tags", "call_id", "record_id", "trace_id", "by", "run", "program", "experiment",
    "variant", "prompt_version", "path", "budget",
})  # fmt: skip


def _others(kind: str, data: Mapping[str, Any]) -> str:
    """Of an event that has no words of its own what the catalogue says, and its details but for whose it is."""
    meaning = EVENTS[kind].meaning if kind in EVENTS else f"{kind}."
    details = ", ".join(f"{name}={value}" for name, value in data.items() if name not in _WHOSE and value is not None)
    return f"{meaning} {details}".strip()

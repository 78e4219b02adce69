"""What is written down about a run beside its answers: what it depends on, its caps, and how it goes.

Another process learns of it here: whoever resumes the run, `dspy-prod optimizations`, and whoever wants it to stop.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Final, NamedTuple

from dspy_prod.errors import ConfigError
from dspy_prod.optimize.comparing import compared
from dspy_prod.policies.run import accounts_of
from dspy_prod.runtime.boot import boot, is_this_boot
from dspy_prod.stores.base import Store

RUNNING: Final = "running"
_HEADER: Final = "header"
_STOP: Final = "stop"


@dataclass(frozen=True)
class Header:
    """A run as it is written down.

    Attributes:
        run: its name. optimizer: name of the class.
        fingerprints, described: what it depends on, see `dspy_prod.optimize.fingerprints`.
        caps: its limits by name, as `{"usd": 5.0, "calls": None}`.
        seeds: what was pinned, as `{"seed": 0}`.
        state: `"running"`, or how it ended (`StoppedBy`).
        spent_usd: dollars so far, those of all its parts.
        started_at, ended_at: seconds since the epoch; of its last part.
        best: the best candidate so far, as JSON. warnings: what is to be told of it.
        process: what tells the process that runs it from others; filled in by `save`.
        beside: which of its answers, by place, were asked for finalists, and not by the optimizer.
        calls, replayed, score: what else a list shows of it.
    """

    run: str
    optimizer: str
    fingerprints: Mapping[str, str] = field(default_factory=dict)
    described: Mapping[str, Any] = field(default_factory=dict)
    caps: Mapping[str, Any] = field(default_factory=dict)
    seeds: Mapping[str, Any] = field(default_factory=dict)
    state: str = RUNNING
    spent_usd: float = 0.0
    started_at: float = field(default_factory=time.time)
    ended_at: float | None = None
    best: Any = None
    warnings: tuple[str, ...] = ()
    calls: int | None = None
    replayed: int | None = None
    score: float | None = None
    process: str | None = None
    beside: tuple[tuple[int, int | None], ...] = ()

    @property
    def running(self) -> bool:
        """Whether it goes on: it says so, and its process lives, as far as this machine can tell."""
        return self.state == RUNNING and _lives(self.process)

    @property
    def shown_state(self) -> str:
        """Its state; `"killed"` when it says that it goes on, and its process is gone."""
        return "killed" if self.state == RUNNING and not self.running else self.state

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON."""
        row = asdict(self)
        row["warnings"] = list(self.warnings)
        return row

    @classmethod
    def from_dict(cls, row: Mapping[str, Any]) -> Header:
        """The header that `to_dict` described; unknown keys are ignored."""
        known = {name: row[name] for name in cls.__dataclass_fields__ if name in row}
        beside = tuple([(first, end) for first, end in known.get("beside") or ()])
        return cls(**{**known, "warnings": tuple(known.get("warnings") or ()), "beside": beside})


class Differences(NamedTuple):
    """What a run would differ in from the one that it resumes, in sentences.

    Attributes:
        refused: with these it would not take the same path.
        allowed: these may change: kept answers are scored anew, more or less may be spent.
    """

    refused: list[str]
    allowed: list[str]


def save(store: Store, header: Header) -> None:
    """Write a header, in the place of the one before; a running one is marked as this process's.

    Raises:
        StoreUnavailableError: it cannot be written.

    Example:
        ```python
        headers.save(run.store, headers.Header("triage", "MIPROv2", caps={"usd": 5.0}))
        ```
    """
    if header.state == RUNNING:
        header = replace(header, process=_this_process())
    store.runs.put_note(header.run, _HEADER, json.dumps(header.to_dict(), default=_as_json))


def load(store: Store, name: str) -> Header | None:
    """The header of a run, None when there is none.

    Raises:
        StoreUnavailableError: the store cannot be read. ConfigError: the header is damaged.

    Example:
        ```python
        headers.load(store, "triage").spent_usd
        ```
    """
    text = store.runs.note(name, _HEADER)
    return None if text is None else _header(name, text)


def headers(store: Store) -> list[Header]:
    """All headers, those that began last first; damaged ones are left out.

    Example:
        ```python
        [header.run for header in headers.headers(store)]
        ```
    """
    found = []
    for name, text in store.runs.noted(_HEADER).items():
        try:
            found.append(_header(name, text))
        except ConfigError:
            continue
    return sorted(found, key=lambda each: each.started_at, reverse=True)


def names(store: Store) -> list[str]:
    """The names of all runs that have a header or answers, in order.

    Example:
        ```python
        "triage" in headers.names(store)
        ```
    """
    return sorted({*store.runs.noted(_HEADER), *store.runs.sizes()})


def remove(store: Store, name: str) -> None:
    """Forget a run: its header, its answers, and what it has spent; the ledger keeps its records.

    Example:
        ```python
        headers.remove(store, "triage")
        ```
    """
    store.runs.remove(name, accounts_of(name))


def ask_to_stop(store: Store, name: str) -> None:
    """Ask a run to stop, whatever process it is in; it returns the best so far.

    Example:
        ```python
        headers.ask_to_stop(store, "triage")
        ```
    """
    store.runs.put_note(name, _STOP, str(time.time()))


def asked_to_stop(store: Store, name: str, since: float = 0.0) -> bool:
    """Whether somebody has asked a run to stop, after `since` (seconds since the epoch), as its last part's beginning.

    Example:
        ```python
        headers.asked_to_stop(run.store, run.name, since=header.started_at)
        ```
    """
    text = store.runs.note(name, _STOP)
    return text is not None and float(text) > since


def differences(old: Header, new: Header) -> Differences:
    """What `new` would do otherwise than `old`, which it is to resume.

    Example:
        ```python
        refused, allowed = headers.differences(old, new)
        ```
    """
    return Differences(*compared(old.described, new.described, (old.seeds, new.seeds), (old.caps, new.caps)))


# -- details ---------------------------------------------------------------------------------------------------------
def _header(name: str, text: str) -> Header:
    try:
        return Header.from_dict(json.loads(text))
    except (json.JSONDecodeError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"The header of the run {name!r} is damaged ({type(error).__name__}). Remove the run: "
            f"dspy-prod optimizations rm {name}"
        ) from error


def _as_json(value: Any) -> Any:
    """A number of numpy as a number; anything else as it is shown."""
    item = getattr(value, "item", None)
    return item() if callable(item) and getattr(value, "ndim", 0) == 0 else repr(value)


def _this_process() -> str:
    return " ".join([socket.gethostname() or "-", boot(), str(os.getpid()), _begun(os.getpid()) or "-"])


def _lives(process: str | None) -> bool:
    """Whether a process lives; one of another machine is taken to."""
    parts = (process or "").split(" ")
    if len(parts) != 4:
        return False
    host, booted, pid, begun = parts
    if host != (socket.gethostname() or "-"):
        return True
    if not is_this_boot(booted):
        return False
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, ValueError):
        return False
    except OSError:  # it is somebody else's
        pass
    return begun in ("-", _begun(int(pid)) or "-")


def _begun(pid: int) -> str | None:
    """When a process began, in the machine's own count: a number is given to another one later."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None

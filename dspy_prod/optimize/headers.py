"""What is written down about a run beside its answers: what it depends on, its caps, and how it goes.

Another process learns of it here: whoever resumes the run, `dspy-prod optimizations`, and whoever wants it to stop.
"""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Final, NamedTuple

from dspy_prod.errors import ConfigError
from dspy_prod.optimize.alive import begin, dead_pid, end, lives, this_process
from dspy_prod.optimize.comparing import compared
from dspy_prod.policies.run import accounts_of
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
        process: what tells the process that runs it from others; filled in by `claim`, or by `save`.
        beside: which of its answers, by place, were asked for finalists, and not by the optimizer.
        calls, replayed, score: what else a list shows of it.
        asked_as: the name that its user gave, when it is another one with a number, as `nightly` of `nightly-2`.
        seen_at: when it was written last, as `started_at`.
        written: as it stands in the store, where it comes from there; no part of what is written.
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
    asked_as: str | None = None
    seen_at: float | None = field(default=None, compare=False)
    written: str | None = field(default=None, compare=False, repr=False)

    @property
    def running(self) -> bool:
        """Whether it goes on: it says so, and its process lives; on another machine: it wrote so a short while ago."""
        return self.state == RUNNING and lives(self.process, self.seen_at or self.started_at)

    @property
    def dead_pid(self) -> int | None:
        """The number of the process of this machine that was killed while it ran; None when nobody has that one now."""
        return dead_pid(self.process) if self.state == RUNNING else None

    @property
    def shown_state(self) -> str:
        """Its state; `"killed"` when it says that it goes on, and its process is gone."""
        return "killed" if self.state == RUNNING and not self.running else self.state

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON."""
        row = asdict(replace(self, written=None))
        del row["written"]
        row["warnings"] = list(self.warnings)
        return row

    @classmethod
    def from_dict(cls, row: Mapping[str, Any]) -> Header:
        """The header that `to_dict` described; unknown keys are ignored."""
        known = {name: row[name] for name in cls.__dataclass_fields__ if name in row and name != "written"}
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
    if header.state == RUNNING and header.process is None:
        header = replace(header, process=this_process())
    store.runs.put_note(header.run, _HEADER, _text(header))


def claim(store: Store, header: Header, before: Header | None) -> Header:
    """Write that this process runs it, unless somebody else has begun to since `before` was loaded; the header written.

    Whoever has it must `release` it.

    Raises:
        ConfigError: somebody else has. StoreUnavailableError: it cannot be written.
    """
    header = replace(header, state=RUNNING, process=begin())
    try:
        if store.runs.swap_note(header.run, _HEADER, None if before is None else before.written, _text(header)):
            return header
        raise ConfigError(
            f"BudgetedOptimizer.compile: the run {header.run!r} was just begun elsewhere. Wait for it, or end it: "
            f"dspy-prod optimizations stop {quoted(header.run)}"
        )
    except BaseException:
        release(header)
        raise


def release(header: Header) -> None:
    """It goes on in this process no longer, whatever could still be written of it."""
    end(header.process)


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
    found, _ = sound(store)
    return found


def sound(store: Store) -> tuple[list[Header], list[str]]:
    """(all headers, those that began last first; the names of runs whose headers are damaged)."""
    found, damaged = [], []
    for name, text in store.runs.noted(_HEADER).items():
        try:
            found.append(_header(name, text))
        except ConfigError:
            damaged.append(name)
    return sorted(found, key=lambda each: each.started_at, reverse=True), damaged


def latest(store: Store, name: str) -> Header | None:
    """The header of the run that was begun last under the name that its user gives; else the one of just this name.

    Raises:
        StoreUnavailableError: the store cannot be read. ConfigError: the header is damaged.
    """
    found = [each for each in headers(store) if name == (each.asked_as or each.run)]
    return found[0] if found else load(store, name)


def is_known(store: Store, name: str) -> bool:
    """Whether there is a header of this name, be it damaged."""
    return store.runs.note(name, _HEADER) is not None


def names(store: Store) -> list[str]:
    """The names of all runs that have a header or answers, in order.

    Example:
        ```python
        "triage" in headers.names(store)
        ```
    """
    return sorted({*store.runs.noted(_HEADER), *store.runs.answered()})


def remove(store: Store, name: str, *, running: bool = False) -> None:
    """Forget a run: its header, its answers, and what it has spent; the ledger keeps its records.

    Args:
        running: it may still go on somewhere. Then it is asked to stop, and what it has spent stays: it would begin to
            spend its whole cap anew.

    Example:
        ```python
        headers.remove(store, "triage")
        ```
    """
    store.runs.remove(name, None if running else accounts_of(name))
    if running:
        ask_to_stop(store, name)


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
        found = Header.from_dict(json.loads(text))
        return replace(found, started_at=float(found.started_at), written=text)
    except (ValueError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"The header of the run {name!r} is damaged ({type(error).__name__}). Remove the run: "
            f"dspy-prod optimizations rm {quoted(name)}"
        ) from error


def quoted(name: str) -> str:
    """A run's name as a shell takes it, at the end of a command."""
    return f"{'-- ' if name.startswith('-') else ''}{shlex.quote(name)}"


def _text(header: Header) -> str:
    return json.dumps(replace(header, seen_at=time.time()).to_dict(), default=_as_json)


def _as_json(value: Any) -> Any:
    """A number of numpy as a number; anything else as it is shown."""
    item = getattr(value, "item", None)
    return item() if callable(item) and getattr(value, "ndim", 0) == 0 else repr(value)

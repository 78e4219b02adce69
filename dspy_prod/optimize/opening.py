"""Where a run begins, or goes on: its name, its guard, and what an earlier part of it has left."""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

import dspy

from dspy_prod.errors import ConfigError
from dspy_prod.optimize import headers
from dspy_prod.optimize.candidates import Progress
from dspy_prod.optimize.comparing import goes_further
from dspy_prod.optimize.fingerprints import described, digests
from dspy_prod.optimize.headers import Header
from dspy_prod.optimize.task import Task
from dspy_prod.optimize.terms import Terms
from dspy_prod.policies.run import Run, accounts_of
from dspy_prod.records import NANO
from dspy_prod.stores.addresses import default_store_url
from dspy_prod.stores.base import Store
from dspy_prod.stores.opening import default_namespace, open_store

_ENDED: Final = frozenset({"completed", "target"})
"""States of runs that nobody would go on with."""

FORECAST: Final = "forecast"
"""State of a run of which only the pilot was made."""

_DATA: Final = ("trainset", "valset")


@dataclass
class Opened:
    """A run that may go.

    Attributes:
        run: its guard. header: what is written down of it; None where the store ends with its process.
        before: the header of its earlier part, when it goes on. spent: dollars of earlier parts, and of a pilot.
        warnings: what is to be told. stands: what the store says of it until it begins.
    """

    run: Run
    header: Header | None
    before: Header | None = None
    spent: float = 0.0
    warnings: list[str] = field(default_factory=list)
    stands: Header | None = None


def piloted(task: Task, terms: Terms, name: str | None, store: str | Store | None, namespace: str | None) -> Opened:
    """A run that a forecast begins; `opened` goes on with it under its name, so that the pilot counts."""
    found = open_store(store if store is not None else default_store_url(), default_namespace(namespace))
    run = _run(terms, _unused(found, name, task), found, keep=found.durable)
    return Opened(run, replace(_header(task, terms, name), run=run.name) if found.durable else None)


def note_pilot(begun: Opened, spent_usd: float) -> None:
    """Write down that a pilot was made, for whoever goes on with the run."""
    if begun.header is not None:
        headers.save(begun.run.store, replace(begun.header, state=FORECAST, spent_usd=spent_usd))


def opened(
    task: Task,
    terms: Terms,
    name: str | None,
    resume: bool | None,
    store: str | Store | None,
    namespace: str | None,
    begun: tuple[str | None, float] = (None, 0.0),
) -> Opened:
    """Begin a run, or go on with one.

    Args:
        task: what. terms: how. name: what it was called. resume: as for `BudgetedOptimizer.compile`.
        store: where. namespace: as for `LM`. begun: name and dollars of the run that a forecast of
            the same optimizer has begun.

    Raises:
        ConfigError: there is none of this name to go on with, or it is another one now, or goes on elsewhere; or one of
            this name was not finished, and nobody has said what is to become of it.
        StoreUnavailableError: the store cannot be used.
    """
    found = open_store(store if store is not None else default_store_url(), default_namespace(namespace))
    if not found.durable:
        if resume:
            raise ConfigError(
                f"BudgetedOptimizer.compile: resume: {found.url} ends with its process, so nothing was kept. Give "
                "store='sqlite:///runs.db'"
            )
        return Opened(_run(terms, begun[0] or _unused(found, name, task), found, keep=False), None, spent=begun[1])
    if resume and name is None:
        raise ConfigError("BudgetedOptimizer.compile: resume: say which run: BudgetedOptimizer(..., name=...)")
    now = _header(task, terms, name)
    latest = None if name is None else headers.latest(found, name)
    if latest is not None:
        _refuse_running(latest)
        if latest.state == FORECAST and not headers.differences(latest, now).refused:
            begun, latest = (latest.run, latest.spent_usd), None
            resume = None
    if resume:
        return _resumed(task, terms, name or "", latest, now, found)
    if latest is not None and resume is None and latest.state not in (*_ENDED, FORECAST):
        raise ConfigError(
            f"BudgetedOptimizer.compile: the run {latest.run!r} was not finished ({latest.shown_state}, "
            f"{latest.spent_usd:.4f} USD). Go on with resume=True, where its answers cost nothing again, or begin "
            "another one with resume=False"
        )
    stands = None if begun[0] is None else headers.load(found, begun[0])
    if stands is not None and stands.state != FORECAST:  # another object has gone on with what was forecast here
        begun, stands = (None, 0.0), None
    run = _run(terms, begun[0] or _unused(found, name, task), found, keep=True)
    return Opened(run, replace(now, run=run.name), spent=begun[1], warnings=_unseeded(task), stands=stands)


def _resumed(task: Task, terms: Terms, name: str, latest: Header | None, now: Header, store: Store) -> Opened:
    if latest is None:
        known = ", ".join(headers.names(store)[:10]) or "none"
        raise ConfigError(
            f"BudgetedOptimizer.compile: resume: there is no run {name!r} in {store.url}; it has: {known}"
        )
    found = headers.differences(latest, now)
    if found.refused:
        raise ConfigError(
            f"BudgetedOptimizer.compile: resume: the run {latest.run!r} would not take the same path: "
            f"{'; '.join(found.refused)}. Undo that, or begin another run with resume=False: what it asks alike costs "
            "nothing as long as the cache has it. Only caps, the metric and compile's num_trials may be others"
        )
    if latest.dead_pid is not None:
        store.runs.bury(latest.dead_pid)
    run = _run(terms, latest.run, store, keep=True)
    if run.answers is not None:
        further = goes_further(latest.described, now.described)
        run.answers.set_beside([(0, None)] if further else latest.beside)
    warnings = [*[f"since the run began: {each}" for each in found.allowed], *_unseeded(task)]
    unconfirmed = run.used().unconfirmed_usd
    if unconfirmed:
        warnings.append(
            f"{unconfirmed:.6f} USD of what earlier parts spent is an upper bound: calls were in flight when they ended"
        )
    now = replace(now, run=run.name, best=latest.best, beside=latest.beside, asked_as=latest.asked_as)
    return Opened(run, now, latest, max(latest.spent_usd, _spent(run)), warnings, latest)


def _spent(run: Run) -> float:
    """Dollars that a run has cost so far: who was killed could not write it down any more."""
    used = run.used()
    if used.usd is not None:
        return used.usd + (used.held_usd or 0.0)
    return sum(totals.cost_nano for _, _, totals in run.store.totals(dimension="run", value=run.name)) / NANO


def _refuse_running(header: Header) -> None:
    if header.running:
        raise ConfigError(
            f"BudgetedOptimizer.compile: the run {header.run!r} goes on elsewhere. Wait for it, or end it: "
            f"dspy-prod optimizations stop {headers.quoted(header.run)}"
        )


def _run(terms: Terms, name: str, store: Store, keep: bool) -> Run:
    return Run(
        name, usd=terms.budget_usd, calls=terms.max_calls, tokens=terms.max_tokens, store=store, keep_answers=keep,
        outage=terms.patience_outage,
    )  # fmt: skip


def _header(task: Task, terms: Terms, name: str | None) -> Header:
    told = described(
        task.optimizer, task.student, {each: task.arguments.get(each) for each in _DATA if each in task.arguments},
        task.metric, _lms(task), {key: value for key, value in task.arguments.items() if key not in _DATA},
    )  # fmt: skip
    caps = {"usd": terms.budget_usd, "calls": terms.max_calls, "tokens": terms.max_tokens, "seconds": terms.max_time}
    seeds = {"seed": task.arguments["seed"]} if "seed" in task.arguments else {}
    return Header("", type(task.optimizer).__name__, digests(told), told, caps, seeds, asked_as=name)


def _lms(task: Task) -> Mapping[str, Any]:
    own = {f"predictor {name}": predictor.lm for name, predictor in task.student.named_predictors()}
    return {"program": dspy.settings.lm, **{name: lm for name, lm in own.items() if lm is not None}}


def _unseeded(task: Task) -> list[str]:
    if task.traits.seeded:
        return []
    return [
        f"{type(task.optimizer).__name__} draws without a seed: resumed, it would ask other questions, and pay for them"
    ]


def _numbered(name: str, number: int) -> str:
    return name if number == 1 else f"{name}-{number}"


def _unused(store: Store, name: str | None, task: Task) -> str:
    """The name itself, or with a number where it was used; one that is made up where there is none."""
    if name is None:
        return f"{type(task.optimizer).__name__}-{uuid.uuid4().hex[:8]}"
    number = 1
    while _is_used(store, _numbered(name, number)):
        number += 1
    return _numbered(name, number)


def _is_used(store: Store, name: str) -> bool:
    return (store.durable and headers.is_known(store, name)) or bool(store.accounts(accounts_of(name), "", 1))


class Scribe:
    """Writes down how a run goes, for whoever resumes it or looks at it from elsewhere: a `Watcher`.

    Args:
        run: whose. header: as it begins. stands: what the store says of it until then.
    """

    def __init__(self, run: Run, header: Header, stands: Header | None) -> None:
        self._run, self._store, self._header, self._stands = run, run.store, header, stands
        self._beside = False
        self._written = 0.0
        self._looked = 0.0
        self._asked = False

    def claim(self) -> None:
        """Make the run this process's.

        Raises:
            ConfigError: somebody else has begun it meanwhile. StoreUnavailableError: it cannot be written.
        """
        self._header = headers.claim(self._store, self._header, self._stands)

    def begin(self, progress: Progress) -> None:
        """Write that it goes on."""
        self._write(progress)

    def update(self, progress: Progress) -> None:
        """Write how far it is, every other second; and at once where the optimizer's own questions end."""
        if progress.phase in ("finals", "test") and not self._beside and self._run.answers is not None:
            self._beside = True
            self._header = replace(self._header, beside=(*self._header.beside, (self._run.answers.count(), None)))
            self._write(progress)
        elif time.monotonic() - self._written >= 2.0:
            self._write(progress)

    def end(self, progress: Progress, report: Any) -> None:
        """Write how it ended."""
        state = report.stopped_by if report is not None else "failed"
        if self._beside and self._run.answers is not None:
            *others, (first, _) = self._header.beside
            self._header = replace(self._header, beside=(*others, (first, self._run.answers.count())))
        self._header = replace(
            self._header, state=state, ended_at=time.time(), warnings=() if report is None else tuple(report.warnings)
        )
        self._write(progress)

    def _write(self, progress: Progress) -> None:
        self._written = time.monotonic()
        best = progress.best
        told = self._header.best
        if best is not None:
            told = {"key": best.key, "score": best.score, "origin": best.origin, "prompts": dict(best.prompts)}
        self._header = replace(
            self._header, spent_usd=progress.spent_usd, calls=progress.calls, replayed=progress.replayed,
            score=None if best is None else best.score, best=told,
        )  # fmt: skip
        headers.save(self._store, self._header)

    def release(self) -> None:
        """It goes on here no longer, whatever became of `end`."""
        headers.release(self._header)

    def asked_to_stop(self) -> bool:
        """Whether somebody elsewhere wants the run to end; looked up once a second."""
        now = time.monotonic()
        if not self._asked and now - self._looked >= 1.0:
            self._looked = now
            self._asked = headers.asked_to_stop(self._store, self._header.run, since=self._header.started_at)
        return self._asked

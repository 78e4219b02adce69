"""One run of a deployment: what it finds in the journal, what is left to do, and doing it."""

from __future__ import annotations

import datetime as dt
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import dspy

from dspy_prod.privacy.outward import outward
from dspy_prod.registry.aliases.gates import Gate, GateReport, PromotionRefusedError, refused_error
from dspy_prod.registry.aliases.journal import AuditEntry, Journal, Replay, Request
from dspy_prod.registry.aliases.projection import PRODUCTION, alias_version, settled
from dspy_prod.registry.aliases.promotion import carry_out, conflict_error
from dspy_prod.registry.deployment.candidates import Candidate
from dspy_prod.registry.deployment.report import Deployment, Outcome, Step, StepResult, advice, path_of, save
from dspy_prod.registry.deployment.state import EVIDENCE, Begin, conditions_of, pinned, verdict
from dspy_prod.registry.errors import PromotionConflictError
from dspy_prod.registry.published.difference import diff
from dspy_prod.registry.published.manifest import ProgramVersion
from dspy_prod.registry.published.publishing import publish
from dspy_prod.registry.server import Server

_OUTCOMES: Final[Mapping[str, Outcome]] = {"fail": "failed", "error": "error", "inconclusive": "inconclusive"}
_log = logging.getLogger("dspy_prod")


@dataclass(frozen=True)
class Order:
    """What was asked for: the arguments of `deploy`. `until` is the last of the stages that is moved now."""

    name: str
    gate: Gate
    stages: tuple[str, ...]
    until: str
    recheck: bool
    force: bool
    reason: str | None
    by: str
    uri: str | None

    @property
    def now(self) -> tuple[str, ...]:
        """The stages that are moved now."""
        return self.stages[: self.stages.index(self.until) + 1]


class Steps:
    """Notes each step with its time and how it ended.

    Args:
        begins: is told the name of each step that begins.
        ends: is called when one has ended well.

    Attributes:
        made: the steps so far.
    """

    def __init__(self, begins: Callable[[str], object], ends: Callable[[], object]) -> None:
        self.made: list[Step] = []
        self._begins, self._ends = begins, ends

    @contextmanager
    def step(self, name: str) -> Iterator[Callable[..., None]]:
        """Make a step; what it gives is to be called with what was done in words, and the result unless `done`."""
        began = time.monotonic()
        told: tuple[StepResult, str] = ("done", "")

        def said(detail: str, result: StepResult = "done") -> None:
            nonlocal told
            told = result, detail

        self._begins(name)
        try:
            yield said
        except BaseException as error:
            said(outward(str(error)) or type(error).__name__, "stopped")
            raise
        finally:
            self.made.append(Step(name, *told, now(), time.monotonic() - began))
        self._ends()

    def earlier(self, alias: str, version: int, entry: AuditEntry | None) -> None:
        """Note that an alias has the version already, by a move of an earlier run or from before the deployment."""
        nothing = Step(alias, "skipped", f"has version {version} already", now())
        self.made.append(nothing if entry is None else Step(alias, "before", str(entry), entry.at))
        self._ends()


def now() -> dt.datetime:
    """This moment, in UTC."""
    return dt.datetime.now(dt.timezone.utc)


class Run:
    """One run of a deployment, which notes its steps in `steps`; raises as `deploy`."""

    def __init__(self, order: Order, server: Server, candidate: Candidate, steps: Steps) -> None:
        self._order, self._server, self._candidate, self._steps = order, server, candidate, steps
        self._started, self._began = now(), time.monotonic()
        self._journal = Journal(server, order.name)
        self._version = candidate.version
        self._after: dict[str, int | None] = {}
        self._replay = self._settled()
        found = None
        if candidate.version is not None and not order.recheck:
            found = Begin.found(self._replay, order.stages, candidate.version.version)
        self._begin = found or Begin.now(self._replay, order.stages)
        before = self._begin.before
        self._previous = before[PRODUCTION] if PRODUCTION in before else alias_version(server, order.name, PRODUCTION)
        self._gate = pinned(order.gate, server, order.name, before)
        self._conditions = conditions_of(self._gate)
        self._report: GateReport | None = None
        self._forced = False
        self._outcome: Outcome = "interrupted"
        self._error: str | None = None

    def go(self) -> None:
        """Do what is left to do; raises as `deploy`."""
        version, pending = self._version, list(self._order.now)
        if version is not None:
            pending = [each for each in pending if not self._begin.has_passed(self._replay, each, version.version)]
            for alias in self._order.stages:
                if alias not in pending and self._passed(alias):
                    entry = self._begin.first and self._begin.move(self._replay, alias, version.version)
                    self._steps.earlier(alias, version.version, entry)
        self._refuse_foreign_moves(pending)
        earlier = None if version is None else verdict(self._replay, version.version, self._conditions)
        if not pending and not self._order.recheck:
            self._report = None if earlier is None else earlier[0]
            self._outcome = self._ended("unchanged")
            return
        report, evaluated = self._judged(None if self._order.recheck else earlier)
        if version is None:
            version = self._published(report)
        if evaluated:  # which may have taken hours
            self._replay = self._settled()
            self._refuse_foreign_moves(pending)
        for number, alias in enumerate(pending):
            whole = number == 0 and (evaluated or self._begin.first is None)
            self._move(alias, version, report, {"gate": report.to_dict()} if whole else {})
        self._outcome = self._ended("deployed" if pending else "unchanged")

    def _ended(self, outcome: Outcome) -> Outcome:
        """What became of it, where nothing went wrong: it waits while a later stage has another version."""
        later = self._order.stages[len(self._order.now) :]
        return outcome if all(map(self._passed, later)) else "waiting"

    def _passed(self, alias: str) -> bool:
        """Whether a stage has been given the version."""
        return self._version is not None and self._begin.has_passed(self._replay, alias, self._version.version)

    def end(self, error: BaseException) -> None:
        """Note what ended it early."""
        self._error = outward(str(error)) or type(error).__name__
        if isinstance(error, PromotionRefusedError):
            self._outcome = _OUTCOMES[error.report.result]
        elif isinstance(error, PromotionConflictError):
            self._outcome = "conflict"

    def report(self, directory: str | Path | None) -> Deployment:
        """What was done, written to files too; a folder that cannot be written is no reason to fail any more."""
        version = None if self._version is None else self._version.version
        difference, changes = self._difference()
        order = self._order
        found = Deployment(
            order.name, version, self._candidate.said, self._begin.id, self._outcome, order.stages,
            self._begin.first is not None, self._forced, order.reason, order.by, self._started,
            time.monotonic() - self._began, tuple(self._steps.made), self._report, self._begin.before,
            dict(self._after), self._previous, difference, changes, self._error,
        )  # fmt: skip
        found = replace(found, advice=advice(found))
        if directory is None:
            return found
        path = path_of(Path(directory), order.name, version)
        found = replace(found, files=(str(path), str(path.with_suffix(".md"))))
        try:
            save(found, path)
        except OSError as error:
            _log.warning("The report of the deployment of %s cannot be written: %s", found.title, error)
            return replace(found, files=())
        return found

    def _settled(self) -> Replay:
        """The journal, once it and the aliases of all stages agree."""
        order = self._order
        replays = [settled(self._server, order.name, alias, self._journal) for alias in order.stages]
        self._after = {alias: replays[-1].version(alias) for alias in order.stages}
        return replays[-1]

    def _refuse_foreign_moves(self, pending: list[str]) -> None:
        """Whoever moved an alias since the deployment began has decided about it.

        Once everything is done only the last alias counts: later deployments go through the earlier ones.
        """
        stages = self._order.stages
        for alias in stages if pending else [each for each in stages if self._passed(each)][-1:]:
            actual = self._replay.version(alias)
            done = alias not in pending and self._passed(alias)
            wanted = self._version.version if done and self._version is not None else self._begin.before[alias]
            if actual == wanted:
                continue
            error = conflict_error(self._order.name, alias, wanted or 0, actual)
            last = self._replay.last(alias)
            if done and last is not None:
                error.args = (f"{self._order.name}@{alias} had got version {wanted}, and was moved since: {last}",)
            raise error

    def _judged(self, earlier: tuple[GateReport, AuditEntry] | None) -> tuple[GateReport, bool]:
        """(the gate's report, which lets the candidate pass; whether it was evaluated now)."""
        order, candidate = self._order, self._candidate
        with self._steps.step("gate") as said:
            if earlier is not None and self._holds(*earlier):
                report, entry = earlier
                self._report, self._forced = report, report.result != "pass"
                said(f"{report}, on {entry.at:%Y-%m-%d %H:%M} UTC", "reused")
                return report, False
            judged: ProgramVersion | dspy.Module | None = self._version or candidate.loaded
            assert judged is not None
            report = self._report = self._gate.check(self._server, judged, candidate.program)
            self._forced = report.result == "inconclusive" and order.force
            if report.result == "pass" or self._forced:
                said(f"{report}{', overruled' if self._forced else ''}")
                return report, True
            if self._version is not None:
                evidence = self._evidence(self._version, report, {"gate": report.to_dict()})
                number, alias = self._version.version, order.stages[0]
                self._journal.append(Request("refused", alias, number, None, order.by, order.reason, evidence=evidence))
            raise refused_error(order.stages[0], self._version or candidate.said, report)

    def _holds(self, report: GateReport, entry: AuditEntry) -> bool:
        """Whether an earlier verdict lets the candidate pass."""
        ours = entry.forced and entry.evidence[EVIDENCE]["id"] == self._begin.id
        return report.result == "pass" or (report.result == "inconclusive" and (self._order.force or ours))

    def _published(self, report: GateReport) -> ProgramVersion:
        with self._steps.step("publish") as said:
            loaded = self._candidate.loaded
            assert loaded is not None
            metrics = {name: value for name, value in report.metrics.items() if math.isfinite(value)}
            order = self._order
            made = publish(loaded, order.name, metrics=metrics, message=order.reason, tracking_uri=order.uri)
            self._version = made
            said(str(made))
            return made

    def _move(self, alias: str, version: ProgramVersion, report: GateReport, more: Mapping[str, Any]) -> None:
        order, expected = self._order, self._begin.before[alias]
        request = Request(
            "promote", alias, version.version, expected or 0, order.by,
            order.reason or f"deployment {self._begin.id[:8]}", self._forced, self._evidence(version, report, more),
        )  # fmt: skip
        with self._steps.step(alias) as said:
            try:
                actual = settled(self._server, order.name, alias, self._journal).version(alias)
                if actual != expected:
                    raise conflict_error(order.name, alias, expected or 0, actual)
                entry = carry_out(self._server, order.name, self._journal, request)
            except PromotionConflictError as error:
                self._after[alias] = error.actual
                raise
            self._after[alias] = version.version
            said(str(entry))

    def _evidence(self, version: ProgramVersion, report: GateReport, more: Mapping[str, Any]) -> dict[str, Any]:
        about = self._begin.evidence(self._conditions, report)
        return {"metrics": dict(version.metrics), **more, EVIDENCE: about}

    def _difference(self) -> tuple[str, dict[str, str]]:
        """The difference to what production had; a report without it is a report all the same."""
        if self._version is None:
            return "The candidate is not published.", {}
        if self._previous is None:
            return "Production had no version before.", {}
        try:
            found = diff(self._order.name, self._previous, self._version, tracking_uri=self._order.uri)
        except Exception as error:
            return outward(f"It could not be told: {type(error).__name__}: {error}"), {}
        return str(found), {each.name: each.status for each in found.predictors}

"""The shadow stage: candidates answer some of the live calls once more, and nobody sees what they say.

The caller has control's answer and waits for nothing: what is to be asked stands in a short queue, which a thread of
its own empties; what finds it full is left out, so that traffic never piles up here. Candidates ask with low priority,
within a budget and a deadline of their own, at the expense of no user and tenant, and no failure of theirs reaches
anybody. What a limit, a budget or a deadline keeps from being answered tells nothing of a candidate: such calls make no
pair, and are counted.
"""

from __future__ import annotations

import copy
import json
import logging
import random
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Final, NamedTuple

import dspy

from dspy_prod.context.assignments import Assignment
from dspy_prod.context.current import CallContext, assigned, call_context, current, use
from dspy_prod.errors import ConfigError, StoreUnavailableError
from dspy_prod.experiments.aside import Aside, settings_here
from dspy_prod.experiments.declaration import Declaration, still_there
from dspy_prod.experiments.pairs import Pair, kept_under
from dspy_prod.experiments.purse import Piece, Purse
from dspy_prod.experiments.variants import Variant
from dspy_prod.options.experiments import Rollout
from dspy_prod.production.collecting import Records
from dspy_prod.production.reasons import REFUSALS, reason_of
from dspy_prod.production.report import CallReport, report_of
from dspy_prod.records import NANO
from dspy_prod.runtime.switch import disabled
from dspy_prod.stores.base import Store
from dspy_prod.stores.trials import PAUSED, RUNNING, Call, Decision, Exposure, Outcome, Trial, Trials

_UNKNOWN: Final = -1.0
"""Dollars that are not known, as they are kept."""

CONTROL: Final = ("control_failed", "control_fell_back", "control_usd")
"""What is kept of control's answer in a pair, as outcomes."""

PATIENCE: Final = 120.0
"""Seconds a candidate has for its answer, whatever the caller's deadline was."""

SPENT: Final = "shadow_spent"
"""The line of the audit that says since when there is no money for shadows."""

OURS: Final = REFUSALS - {"circuit_open"}
"""Why a call was not answered for a reason that is neither its program's nor its upstream's."""

_log = logging.getLogger("dspy_prod")


def list_nano(report: CallReport | None, records: Records) -> int | None:
    """What a call would have cost without caches, in nano-USD; None where that is not known, as of what an earlier
    release has cached.

    Args:
        report: of its answer, which tells of LMs that are not ours, too; None where it has none. records: of its LM
            calls.
    """
    if report is not None and report.list_cost_usd is not None:
        return round(report.list_cost_usd * NANO)
    costs = [each.list_nano for each in records]
    unpriced = report is not None and report.cost_usd is None
    return None if unpriced or None in costs else sum([each or 0 for each in costs])


def run_of(experiment: str, salt: str) -> str:
    """The run that the shadows of an experiment belong to; one of the same name that is made later has its own."""
    return f"shadow of {experiment} ({salt[:8]})"


class Answered(NamedTuple):
    """How control answered a call: whether it failed or its fallback did, and dollars at list price, if known."""

    failed: bool
    fell_back: bool
    usd: float | None


class _Asked(NamedTuple):
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    control: Answered
    context: CallContext
    settings: dict[str, Any]


class Shadow:
    """Asks candidates once more what control was asked.

    Args:
        experiment: its name. store: where pairs and the budget are kept. trials: the store's.
        salt: the experiment's. candidates: the variants beside control.
        rollout: says how many calls, and what they may cost.
    """

    def __init__(
        self, experiment: str, salt: str, store: Store, candidates: Sequence[Variant], rollout: Rollout
    ) -> None:
        self._name, self._trials, self._rollout = kept_under(experiment, salt), store.trials, rollout
        self._salt, self._looked = salt, False
        self._found: tuple[Trial, Declaration] | None = None
        self._experiment, self._candidates = experiment, tuple(candidates)
        self._purse, self._run_name = None, run_of(experiment, salt)
        self._short_of: set[str] = set()  # candidates whose calls the money left does not cover
        self._spent = rollout.shadow_usd is not None and disabled()
        if self._spent:
            _log.warning("DSPY_PROD_DISABLED is set: shadows of %s could not be capped, so there are none", experiment)
        elif rollout.shadow_usd is not None:
            self._purse = Purse(self._run_name, usd=rollout.shadow_usd, store=store)
        self._aside: Aside[_Asked] = Aside("dspy_prod-shadow", self._work)
        self._trials.create(self._name, "{}", {None: 0.0, **dict.fromkeys(CONTROL, 0.0)}, grace=1.0)
        if still_there(self._trials, experiment, salt) is None:  # removed just now, before there was this to remove
            self._trials.remove(self._name)

    def offer(self, args: tuple[Any, ...], kwargs: dict[str, Any], control: Answered, context: CallContext) -> None:
        """Have a call asked once more, perhaps. Never waits."""
        if self._spent or random.random() >= self._rollout.shadow_share:
            return
        try:
            given, named = copy.deepcopy((args, kwargs))  # the caller may go on with what he gave
        except Exception as error:
            _log.warning("A call of %s cannot be asked once more: %s", self._experiment, type(error).__name__)
            return
        self._aside.offer(_Asked(given, named, control, context, settings_here()))

    def count_left_out(self) -> int:
        """Calls for which there was no room, in this process."""
        return self._aside.left_out

    def wait(self, timeout: float = 10.0) -> bool:
        """Wait until nothing is left to be asked."""
        return self._aside.wait(timeout)

    def _work(self, asked: _Asked) -> None:
        for variant in self._candidates:
            if variant.name not in self._short_of and self._is_wanted(variant, RUNNING):
                self._ask(variant, asked)

    def _is_wanted(self, variant: Variant, *states: str) -> bool:
        """Whether the experiment is there, in one of these states and in its shadow stage, with this candidate in it.

        What was known last holds while the store cannot be read.
        """
        with suppress(StoreUnavailableError):
            self._found, self._looked = still_there(self._trials, self._experiment, self._salt), True
        if self._found is None:
            return not self._looked
        trial, declaration = self._found
        return trial.state in states and not trial.stage and variant.name not in declaration.dropped

    def _ask(self, variant: Variant, asked: _Asked) -> None:
        """Ask one candidate, and keep the pair."""
        records = Records(None)
        failed = fell_back = refused = False
        raised: BaseException | None = None
        report: CallReport | None = None
        run = None if self._purse is None else Piece(self._purse)
        began = time.monotonic()
        outer = asked.context._replace(
            records=records, guards=(), run=self._run_name, node=None, trace_id=None, priority="low",
            deadline=began + PATIENCE, aside=True,
        )  # fmt: skip
        place = Assignment(self._experiment, variant.name, "shadow", asked.context.user)
        with dspy.context(**asked.settings), use(assigned(outer, place)):
            with call_context(run=run) if run is not None else use(current()):
                try:
                    report = report_of(variant.program(*asked.args, **asked.kwargs))
                    fell_back = report is not None and report.status == "fallback"
                    refused = fell_back and report is not None and report.reason in OURS
                except BaseException as error:  # it is what a user would have seen; nobody else cancels it here
                    failed, refused, raised = True, reason_of(error) in OURS, error
                    _log.debug("The shadow of %s failed", variant.name, exc_info=error)
        if not self._is_wanted(variant, RUNNING, PAUSED):
            return  # it ended meanwhile
        refused = refused and not records.has_hung(raised, report)  # it was sent: then it has failed
        if self._purse is not None and run is not None:
            refused |= run.has_refused
            self._purse.see(run, variant.name)
            if self._purse.is_used_up(variant.name):
                self._end(variant.name)
        unit, at = uuid.uuid4().hex, self._trials.now()
        cached = any(each.cached for each in records)
        latency = None if cached else time.monotonic() - began
        self._trials.expose(Exposure(self._name, unit, 0, variant.name, self._rollout.shadow_share / 2, at))
        if refused:
            return  # a unit without a call is counted, and no pair
        self._trials.call(Call(self._name, unit, at, failed, fell_back, list_nano(report, records), latency))
        for name, value in zip(CONTROL, asked.control, strict=True):
            kept = _UNKNOWN if value is None else float(value)
            self._trials.outcome(Outcome(self._name, unit, name, kept, at))

    def _end(self, candidate: str) -> None:
        """A candidate is not asked from now on; the audit says why. Others are, while the money lasts for them."""
        self._short_of.add(candidate)
        self._spent = len(self._short_of) == len(self._candidates)
        usd, trials, name = self._rollout.shadow_usd, self._trials, self._experiment
        why = f"the shadow stage's budget of {usd:g} USD is used up: {candidate} is asked nothing more"
        _log.warning("Experiment(%r): %s", name, why)
        try:
            there = still_there(trials, name, self._salt) is not None  # else the audit is of the next one of its name
            told = [json.loads(line.evidence) for line in trials.decisions(name) if line.what == SPENT]
            if there and all(each.get("candidate", candidate) != candidate for each in told):
                told_now = json.dumps({"reason": why, "usd": usd, "candidate": candidate})
                trials.decide(name, Decision(SPENT, "shadow", told_now))
        except StoreUnavailableError as error:  # the next process that meets the cap tells it
            _log.warning("That the shadows of %s are at their cap cannot be kept now: %s", name, error)


def refuse_side_effects(where: str, variants: Sequence[Variant], rollout: Rollout) -> None:
    """Refuse a shadow stage of programs that use tools: a refund would be paid twice.

    Raises:
        ConfigError: names the variant and the module.
    """
    if not rollout.shadow or rollout.shadow_tools == "allow":
        return
    for variant in variants:
        for path, module in variant.program.program.named_sub_modules():
            if _uses_tools(module):
                raise ConfigError(
                    f"{where}: variants[{variant.name!r}] uses tools in {path} ({type(module).__name__}), so that a "
                    "shadow stage would do twice whatever they do. Leave the stage out, or say "
                    "Rollout(shadow_tools='allow') where tools only read"
                )


def _uses_tools(module: Any) -> bool:
    if getattr(module, "tools", None) or type(module).__name__ in ("CodeAct", "ProgramOfThought"):
        return True
    fields = getattr(getattr(module, "signature", None), "fields", None) or {}
    return any("dspy.adapters.types.tool" in repr(field.annotation) for field in fields.values())


def pairs_of(trials: Trials, name: str, after: int) -> tuple[list[tuple[str, Pair | None]], int]:
    """(candidate, pair) of each pair from the one after number `after` on, and the number of the last.

    None is the pair of a call that was refused.

    Args:
        trials: the store's. name: what they are kept under. after: where to go on.
    """
    calls = {unit.number: unit for unit in trials.matured(name, None, after)}
    control = {field: {unit.number: unit for unit in trials.matured(name, field, after)} for field in CONTROL}
    found: list[tuple[str, Pair | None]] = []
    last = after
    for number in sorted(calls):
        if not all(number in each for each in control.values()):
            break  # not all of it has been written yet
        last = number
        values = [control[field][number].values.mean for field in CONTROL]
        told, arm = calls[number].first_call, calls[number].arm
        if not told.calls:
            found.append((arm, None))
        elif None not in values:
            failed, fell_back, usd = (value or 0.0 for value in values)
            dollars = None if usd < 0 or told.unpriced else (usd, told.list_nano / 1e9)
            found.append((arm, Pair((bool(failed), told.failed > 0), (bool(fell_back), told.fell_back > 0), dollars)))
    return found, last

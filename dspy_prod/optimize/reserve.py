"""What a run keeps back while the optimizer searches, so that finalists can be evaluated completely afterwards.

Nothing is kept that could not be enough: half of an evaluation helps nobody, while the search may still find something,
and whoever goes on with the run under a higher cap pays for none of its answers again.
"""

from __future__ import annotations

import threading
import time
from math import inf
from typing import Final, NamedTuple

from dspy_prod.optimize.camera import Camera
from dspy_prod.optimize.choosing import finalists
from dspy_prod.optimize.seen import Seen
from dspy_prod.optimize.sums import Sum, Sums
from dspy_prod.optimize.task import Task
from dspy_prod.optimize.terms import Terms
from dspy_prod.policies.run import Run

Amounts = dict[str, float]
"""By what is capped: "usd", "calls", "tokens", "seconds"."""

_LONGER: Final = 1.6
"""By how much a candidate's prompts, with demonstrations and rules, are taken to be longer than the given program's."""

_KNOWN: Final = 5
"""Answers of a candidate from which on it is known how long its own are."""

_MOST: Final = 0.5
"""Share of what the baseline has left that is kept at most for what nobody has seen yet."""

_LEAST: Final = 1e-9
"""The smallest cap there is, in dollars."""

_FEW: Final = 3
"""Calls for each thread: with no more left than that, a search is nearly over."""


class Lacking(NamedTuple):
    """What a candidate lacks to be evaluated completely.

    Attributes:
        whole: all that is not used for it yet. unheld: without what its calls on their way hold already.
    """

    whole: Amounts
    unheld: Amounts


class Reserve:
    """Measures what the baseline took, and keeps back as much for each complete evaluation to come.

    Args:
        terms: the caps. task: tells how many evaluations are to come. sums: what was used. camera: what was answered.

    Attributes:
        calls_left: about how many calls the search may make until it meets the caps.
    """

    def __init__(self, terms: Terms, task: Task, sums: Sums, camera: Camera) -> None:
        self._terms, self._task, self._sums, self._camera = terms, task, sums, camera
        self._began = time.monotonic()
        self._one: Amounts = {}
        self._at_first: Amounts | None = None
        self._calls_each = 1.0  # calls of LMs for an answer of the program
        self.calls_left = inf
        self._keeping = threading.Lock()
        self._due = self._over = False

    def keep(self, run: Run, ends: float | None, *, final: bool = False) -> float | None:
        """Lower the caps by the reserve, and tell when the search has to end, on the monotonic clock.

        Once only the test set is thought of, or nothing is kept any more, the search has no say.

        Args:
            run: whose caps. ends: when all has to end. final: only the test set is left to be thought of.
        """
        with self._keeping:  # whoever looked before another must not have the last word on the caps
            if self._over and not final:
                return ends
            self._over = final
            found = self._keep(run, ends, final)
        self._catch_up(run, ends)
        return found

    def look(self, run: Run, ends: float | None) -> None:
        """Keep what is needed now, since an LM has answered; whoever is at it does it once more instead.

        So nobody waits here, not even for himself: a finaliser may come in between that looks, too.

        Args:
            run: whose caps. ends: when all has to end.
        """
        self._due = True
        self._catch_up(run, ends)

    def _catch_up(self, run: Run, ends: float | None) -> None:
        while self._due and self._keeping.acquire(blocking=False):
            try:
                self._due = False
                if not self._over:
                    self._keep(run, ends, final=False)
            finally:
                self._keeping.release()  # then look again: somebody may have found it taken

    def _keep(self, run: Run, ends: float | None, final: bool) -> float | None:
        lacking = [] if self._at_first is None else self._lack()  # first: answers that come meanwhile are spent, too
        left = self._left(run, ends)
        if self._at_first is None:  # right after the baseline
            self._at_first, self._one = left, self._whole(ends)
            base = self._sums.snapshot()[2].get("baseline", Sum())
            self._calls_each = max(1.0, (base.answers + base.cached + base.replayed) / len(self._camera.keys))
            lacking = self._lack()
        if self._terms.reserve != "auto" and not final:
            kept = {name: each * self._terms.reserve for name, each in self._at_first.items()}
        else:
            kept = self._tests(left)
            if not final:
                room = {name: left[name] - kept[name] for name in left}
                kept = _sum(kept, self._for_finalists(room, lacking))
        self._allow(run, kept)
        self.calls_left = self._calls_within({name: left[name] - kept[name] for name in left})
        return None if ends is None else ends - kept["seconds"]

    def covers(self, run: Run, ends: float | None, seen: Seen) -> bool:
        """Whether what is left is enough to evaluate a candidate completely."""
        lacking, left = self._lacking(seen), self._left(run, ends)
        tests = self._tests(left)
        return _within(lacking.whole, {name: left[name] - tests[name] for name in left})

    def free(self, run: Run) -> None:
        """Give the reserve to whoever calls now, for good."""
        with self._keeping:
            self._over = True
            self._allow(run, dict.fromkeys(("usd", "calls", "tokens"), 0.0))

    # -- how much ------------------------------------------------------------------------------------------------------
    def _for_finalists(self, room: Amounts, lacking: list[Lacking]) -> Amounts:
        """What the evaluations to come need: of candidates that were seen, else of one that may come."""
        traits = self._task.traits
        kept = dict.fromkeys(room, 0.0)
        if not traits.finalists:
            return kept
        taken, many = kept, 0
        for each in lacking:
            more = _sum(taken, each.whole)
            if many < traits.finalists and _within(more, room):
                kept, taken, many = _sum(kept, each.unheld), more, many + 1
        if lacking:
            return kept
        assert self._at_first is not None
        if traits.late:  # as much as it was at first, for what is returned at the end
            most = {name: each * _MOST for name, each in self._at_first.items()}
            whole = min([traits.finalists, *(int(most[name] / one) for name, one in self._one.items() if one)])
            kept = {name: one * whole for name, one in self._one.items()}
        else:
            kept = {name: min(one, room[name] * _MOST) for name, one in self._one.items()}
        searching = {name: room[name] - kept[name] for name in room}
        over = self._calls_within(searching) < _FEW * (self._task.num_threads or 1)
        return dict.fromkeys(room, 0.0) if over else kept

    def _lack(self) -> list[Lacking]:
        """What each finalist lacks, the best one first."""
        if not self._task.traits.finalists:
            return []
        return [self._lacking(each) for each in finalists(self._camera, None, None, self._task.rounds)]

    def _lacking(self, seen: Seen) -> Lacking:
        """What the answers take that a candidate has not given yet."""
        missing, flying = self._camera.missing(seen), self._camera.flying(seen)
        part = missing / len(self._camera.keys)
        whole = {name: one * part for name, one in self._one.items()}
        unheld = dict(whole)
        sum_ = self._sums.of(seen.index)
        if sum_.answers >= _KNOWN:
            asked = self._calls_each * missing
            own = {"usd": sum_.usd, "calls": float(sum_.calls), "tokens": float(sum_.tokens)}
            each = {name: own[name] / sum_.answers for name in own if name in whole}
            whole.update({name: one * asked for name, one in each.items()})
            unheld.update({name: one * max(0.0, asked - flying) for name, one in each.items()})
        return Lacking(whole, unheld)

    def _tests(self, left: Amounts) -> Amounts:
        """What the given program and the best one take on the test set, where that is not too much for all of it."""
        assert self._at_first is not None
        share = 2 * len(self._task.testset) / max(1, len(self._task.selection[0]))
        whole = {name: one * share for name, one in self._one.items()}
        if not _within(whole, {name: each * _MOST for name, each in self._at_first.items()}):
            return dict.fromkeys(left, 0.0)
        return {name: min(each, left[name]) for name, each in whole.items()}

    # -- measuring -----------------------------------------------------------------------------------------------------
    def _whole(self, ends: float | None) -> Amounts:
        """What an evaluation of the selection set takes, by that of the given program."""
        base, terms = self._sums.snapshot()[2].get("baseline", Sum()), self._terms
        found = {
            "usd": (terms.budget_usd, _scaled(base.usd, base) * _LONGER),
            "calls": (terms.max_calls, _scaled(base.calls, base)),
            "tokens": (terms.max_tokens, _scaled(base.tokens, base) * _LONGER),
            "seconds": (ends, time.monotonic() - self._began),
        }
        return {name: one for name, (cap, one) in found.items() if cap is not None}

    def _left(self, run: Run, ends: float | None) -> Amounts:
        terms, used = self._terms, run.used()
        found = {"usd": (terms.budget_usd, used.usd), "calls": (terms.max_calls, used.calls),
                 "tokens": (terms.max_tokens, used.tokens), "seconds": (ends, time.monotonic())}  # fmt: skip
        return {name: max(0.0, cap - (spent or 0)) for name, (cap, spent) in found.items() if cap is not None}

    def _calls_within(self, amounts: Amounts) -> float:
        """How many calls such amounts are enough for, by those so far."""
        total = self._sums.snapshot()[0]
        each = {"usd": total.usd, "calls": float(total.calls), "tokens": float(total.tokens)}
        known = [amounts[name] * total.calls / used for name, used in each.items() if used and name in amounts]
        return min(known, default=inf)

    def _allow(self, run: Run, kept: Amounts) -> None:
        terms = self._terms
        usd, calls, tokens = terms.budget_usd, terms.max_calls, terms.max_tokens
        if (usd, calls, tokens) != (None, None, None):
            run.allow(
                usd=None if usd is None else max(_LEAST, usd - kept["usd"]),
                calls=None if calls is None else max(1, int(calls - kept["calls"])),
                tokens=None if tokens is None else max(1, int(tokens - kept["tokens"])),
            )


def _sum(one: Amounts, other: Amounts) -> Amounts:
    return {name: each + other[name] for name, each in one.items()}


def _within(amounts: Amounts, room: Amounts) -> bool:
    return all(each <= room[name] for name, each in amounts.items())


def _scaled(used: float, sum_: Sum) -> float:
    """What the whole would have taken, had no answer of it been known before."""
    known = sum_.cached + sum_.replayed
    return used * (sum_.answers + known) / sum_.answers if sum_.answers else used

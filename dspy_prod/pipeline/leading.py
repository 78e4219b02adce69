"""Who leads: of the processes that share a cache, one asks upstream for all; and which followers its outcome is for."""

from __future__ import annotations

from collections.abc import Callable, Generator
from math import inf
from typing import Any, Final

from dspy_prod.context.current import CallContext
from dspy_prod.errors import BudgetExceededError
from dspy_prod.pipeline.call import Asker, Call
from dspy_prod.pipeline.effects import Wait
from dspy_prod.pipeline.plan import caps_on, pause_until, rules_on
from dspy_prod.pipeline.refusals import too_late
from dspy_prod.pipeline.routes import Route
from dspy_prod.policies.budget import BudgetRule
from dspy_prod.policies.cache import ResponseCache
from dspy_prod.policies.entries import Entry, store_key
from dspy_prod.policies.run import claims_of
from dspy_prod.policies.singleflight import Home, gone

PAUSE: Final = 0.002
"""Seconds after which it is looked first whether another process has its answer; then each time half as long again."""
LONGEST: Final = 0.05
"""Seconds between two looks, at most."""


class Lead:
    """The part of one call, which leads those of its own process that ask the same.

    Args:
        own: where the call runs.

    Attributes:
        shared: other processes may ask the same.
    """

    __slots__ = ("_cache", "_key", "_led", "_name", "_own", "shared")

    def __init__(self, cache: ResponseCache, key: bytes, own: Home = None) -> None:
        self._own = own
        self.shared = cache.shared(key)
        self._cache = cache
        self._key = key
        self._name = store_key(key) if self.shared else b""
        self._led = False

    def wait(self, call: Call) -> Generator[Wait, Any, Entry | None]:
        """Wait while another process asks upstream; its answer, or None when it is this one's turn.

        Raises:
            DeadlineExceededError: the call's deadline came before.
        """
        monotonic = call.pipeline.clock.monotonic
        found = self._look()
        if found is False:
            began = now = monotonic()
            pause = PAUSE
            try:
                while found is False:
                    if now >= call.deadline:
                        raise too_late(call, "while waiting for an identical call of another process")
                    yield Wait(None, min(call.deadline, now + pause))
                    pause = min(pause * 1.5, LONGEST)
                    now = monotonic()
                    found = self._look(waited=True)
            finally:
                call.waited += monotonic() - began
        if isinstance(found, Entry):
            return found
        return None

    def _look(self, waited: bool = False) -> Entry | bool:
        self._led = True  # before it is known: who is interrupted just then leads, and must end it
        found = self._cache.lead(self._key, self._name, waited, self)
        self._led = found is True
        return found

    def gone(self) -> bool:
        """Whether the event loop of the call is closed beneath it."""
        return gone(self._own)

    def end(self, verdict: bool = False) -> None:
        """Ask upstream no more, see `stores.base.Flights.leave`. Posted."""
        if self._led:
            self._cache.leave(self._name, verdict, self)
            self._led = False  # last: should this be interrupted, it is done again


def shared_by(call: Call) -> Callable[[Asker], bool] | None:
    """Whether the outcome of a call holds for a follower too; None: for all of them.

    A budget may have made it another one than that of a follower who draws on another account, who has more time might
    have got what this call had none for; and who is not counted as this call is might ask a route that it left.
    """
    fate = call.fate
    if fate is None:
        return None
    wall, model = call.pipeline.clock.time(), call.pipeline.primary.model
    accounts = [(rule, _drawn_on(rule, call.context, model, wall)) for rule in fate.budgets]

    def fits(other: Asker) -> bool:
        if any(pause_until(other, since) > until for until, since in fate.short):
            return False
        for rule, account in accounts:
            theirs = [each for each in other.pipeline.every_budget() if each.options == rule.options]
            if not any(_drawn_on(each, other.context, model, wall) == account for each in theirs):
                return False
        return all(_leaves_too(other, route, call) for route in fate.left)

    return fits


def _leaves_too(other: Asker, route: Route, call: Call) -> bool:
    """Whether another caller would leave a route that a call left, as far as both are counted alike."""
    routes = call.pipeline.routes  # those of the other are as many; what a budget degraded to is in neither
    theirs = other.pipeline.routes[routes.index(route)] if route in routes else route
    if other.context.aside != call.context.aside:
        return False
    *counted, patience = _counted(call, route)
    *like, longest = _counted(other, theirs)
    return like == counted and longest <= patience and _dear(theirs) == _dear(route)


def _counted(asker: Asker, route: Route) -> tuple[bool, bool, float]:
    """(whether a call's money is counted on a route, its tokens, seconds its budgets let it wait there)."""
    pipeline, context = asker.pipeline, asker.context
    rules = [rule for rule in rules_on(pipeline.budgets, route) if not (context.aside and rule.personal)]
    runs = {claim.dimension for claim in claims_of(context.guards)} if context.guards else set()
    waits = [rule.options.max_wait for rule in rules if rule.options.max_wait is not None]
    money = bool(rules) or bool(caps_on(pipeline.caps, route)) or "usd" in runs
    return money, "tokens" in runs, min(waits, default=inf)


def _drawn_on(rule: BudgetRule, context: CallContext, model: str, wall: float) -> str | None:
    """The account that a call draws on; "" where a budget caps single calls."""
    if rule.caps:
        return ""
    if context.aside and rule.personal:
        return None
    try:
        return rule.account(context, model, wall).key
    except BudgetExceededError:
        return None


def _dear(route: Route) -> tuple[int | None, ...] | None:
    """By what the cost of an attempt is bounded on a route, None where no price is known."""
    rates = route.rates()
    if rates is None:
        return None
    return rates.max_input_tokens, rates.max_output_tokens, rates.bound(_MANY, 0), rates.bound(0, _MANY)


_MANY: Final = 1_000_000

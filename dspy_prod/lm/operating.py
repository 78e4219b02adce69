"""What an operator asks of an LM or embedder in service, and may do to it: circuits, pauses, budgets, costs, cache."""

from __future__ import annotations

import asyncio
import datetime as dt
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast, get_args

from dspy_prod.errors import ConfigError
from dspy_prod.lm.arguments import budget_options
from dspy_prod.lm.beneath import Beneath
from dspy_prod.options import Budget
from dspy_prod.pipeline.identities import lift, operate
from dspy_prod.pipeline.pipeline import Pipeline, clear_answers
from dspy_prod.pipeline.routes import Route
from dspy_prod.policies.breaker.transitions import OperatorMove
from dspy_prod.policies.sharing import steer
from dspy_prod.runtime.reaper import REAPER
from dspy_prod.runtime.switch import disabled
from dspy_prod.telemetry.tap import TAP

if TYPE_CHECKING:
    from dspy_prod.status.costs_report import CostsReport
    from dspy_prod.status.health import Health
    from dspy_prod.status.ledger import Ledger


class Operated:
    """The part of an LM, or of an embedder, that is for operators."""

    @property
    def ledger(self) -> Ledger:
        """The records of every attempt, in this store and namespace."""
        from dspy_prod.status.ledger import Ledger

        pipeline = cast("Beneath", self).pipeline
        return Ledger(pipeline.store, pipeline.clock)

    def costs(
        self, by: str | None = None, *, since: dt.date | dt.timedelta | None = None, limit: int | None = None
    ) -> Any:
        """What was spent: a `CostSummary`, or sums by `"day"`, `"model"`, `"user"`, `"tenant"`, `"tag:<key>"`, ...

        It is what this store and namespace has spent, LMs and embedders together; `by="model"` tells them apart.

        Args:
            by: what to sum by.
            since: the first day (UTC) of the sums, or so long ago, e.g. `timedelta(days=7)`; default: all. Alone, it
                sums day by day. Sums are kept by whole days, so more calls take no longer to read.
            limit: at most so many sums: the dearest, or the last days.

        Raises:
            ValueError: an unknown `by`, a negative limit. TypeError: a `since` that tells no day.
            StoreUnavailableError: some records could not be written yet, so the sums would be too low.
        """
        from dspy_prod.status.costs import costs_since

        return costs_since(cast("Beneath", self).pipeline, by, since, limit)

    def health(self) -> Health:
        """State of breaker, limiter, cache and costs, and one overall status."""
        from dspy_prod.status.health import health

        return health([cast("Beneath", self).pipeline])

    def cache_clear(self) -> None:
        """Forget every cached answer and vector of this store and namespace."""
        clear_answers(cast("Beneath", self).pipeline.store)

    def set_budget(self, budget: Budget | Sequence[Budget] | Mapping[str, Any]) -> None:
        """Change the settings of its budgets while they are in use.

        They hold at once for every LM and embedder of this process that shares the budget, and for other processes that
        share the store from their next admission on (those of `per="call"` from the call after). What is spent stays
        spent; who waits for money is served if the limit was raised, and refused if it can no longer cover the call.
        They stay in force, also for those built later with the settings of before, until other settings are said.
        Listeners hear `budget_changed`. Another `per`, `scope` or `timezone` begins accounts of its own, which is
        warned of.

            lm.set_budget(dspy_prod.Budget(usd=20, per="day"))

        Args:
            budget: new settings, for the budgets of the same names; those not named stay as they are.

        Raises:
            ConfigError: it has no budget of that name.
            StoreUnavailableError: the store cannot keep the settings; they are as before.
        """
        if not disabled():
            pipeline = cast("Beneath", self).pipeline
            steer(pipeline.store, pipeline.every_budget(), budget_options(budget))

    def breaker(self, move: OperatorMove, route: str | None = None, *, reason: str = "") -> None:
        """Move circuit breakers by hand, in every worker.

        This reaches every process that uses the same store and namespace, before its next call, and those that begin
        later: for every LM that calls the same model at the same address, with whatever key or headers. On a memory
        store there is only this process. `health()` shows the state, and listeners of each process hear
        `breaker_opened` or `breaker_closed` with the operator as its cause. From a shell: `dspy-prod breaker`.

        Args:
            move: `"force_open"` refuses every call, and `"disable"` admits every call and counts none, until
                `"reset"` closes the circuit and forgets what was counted.
            route: `"primary"`, or the model of a route; default: all routes of this LM.
            reason: for callers, listeners and the journal.

        Raises:
            ConfigError: an unknown move, or no such route with a breaker.
            StoreUnavailableError: the other workers cannot be told; in this process the circuits are moved.
        """
        if move not in get_args(OperatorMove):
            raise ConfigError(f"breaker({move!r}): use one of {', '.join(map(repr, get_args(OperatorMove)))}")
        lm = cast("Beneath", self)
        guarded = [each for each in _routes(lm) if each.breaker is not None]
        for place in _places(guarded, route, f"breaker({move!r}, {route!r}): there is no such circuit breaker"):
            operate(lm.pipeline.store, place, move, reason)

    def resume(self, route: str | None = None) -> None:
        """Lift the pause that a provider's 429, Retry-After or rate-limit headers brought about: calls go again.

        The provider is believed again from its next answer on. A lowered rate stays and grows back in use. Holds for
        every key of the model's address that this process uses, and through a shared store for all its processes
        where an `rpm`, `tpm` or `concurrency` is set: without any, each process has pauses of its own. Listeners hear
        `pause_lifted` where there was one.

            lm.resume()

        Args:
            route: `"primary"`, or the model of a route; default: all routes of this LM.

        Raises:
            ConfigError: no such route.
            StoreUnavailableError: the store cannot keep it.
        """
        lm = cast("Beneath", self)
        places = _places(_routes(lm), route, f"resume({route!r}): there is no such route")
        for place, model in places.items():
            if lift(lm.pipeline.store, place):
                lm.pipeline.bus.emit("pause_lifted", lm.pipeline.clock.time(), route=model)

    def costs_report(
        self, *, since: dt.date | dt.timedelta | None = None, by: Sequence[str] | None = None
    ) -> CostsReport:
        """What this LM's store and namespace has spent, with charts of each day by what it was spent on.

            lm.costs_report(since=timedelta(days=90)).to_html("costs.html")

        Args:
            since: the first day (UTC), or so long ago; default: the last 30 days with today.
            by: what to sum by, as in `costs(by=...)`; default: model, version, user, tenant, variant and program.

        Raises:
            ConfigError: an unknown dimension. TypeError: a `since` that tells no day.
            StoreUnavailableError: some records could not be written yet, so the sums would be too low.
        """
        from dspy_prod.status.costs_report import report

        pipeline = cast("Beneath", self).pipeline
        return report(pipeline.store, pipeline.clock, since=since, by=by)

    def close(self) -> None:
        """Flush the ledger and the traces, and close pooled connections. It stays usable, and calls under way go on.

        While tracking is on, it waits at most `tracking.enable(exit_timeout=...)` seconds for MLflow.
        """
        REAPER.flush()
        lm = cast("Beneath", self)
        lm.pipeline.store.flush(5.0)
        tap = TAP.active
        if tap is not None:
            tap.flush()
        for pipeline in pipelines_of(lm):
            pipeline.close()

    async def aclose(self) -> None:
        """Asynchronous `close`, for this event loop's connections too."""
        for pipeline in pipelines_of(cast("Beneath", self)):
            await pipeline.aclose()
        await asyncio.to_thread(self.close)


def pipelines_of(lm: Beneath) -> list[Pipeline]:
    """That of an LM, and those of its variants, which calls with settings of their own have made."""
    return [lm.pipeline, *(variant.pipeline for variant in lm._variants.all())]


def _routes(lm: Beneath) -> list[Route]:
    return [each for pipeline in pipelines_of(lm) for each in pipeline.every_route()]


def _places(routes: list[Route], wanted: str | None, problem: str) -> dict[str, str]:
    """Address and model of the wanted routes, each with its model."""
    places = {each.place: each.model for each in routes if wanted in (None, each.name, each.model)}
    if not places:
        known = ", ".join(sorted({repr(name) for each in routes for name in (each.name, each.model)}))
        raise ConfigError(f"{problem}; known: {known or 'none'}")
    return places

"""What an operator may do to an LM in service: move its circuit breakers, lift its pauses, and report its costs."""

from __future__ import annotations

import datetime as dt
from collections.abc import Sequence
from typing import TYPE_CHECKING, cast, get_args

from dspy_prod.errors import ConfigError
from dspy_prod.lm.beneath import Beneath
from dspy_prod.pipeline.identities import lift, operate
from dspy_prod.pipeline.routes import Route
from dspy_prod.policies.breaker.transitions import OperatorMove

if TYPE_CHECKING:
    from dspy_prod.status.costs_report import CostsReport


class Operated:
    """The part of an LM that is for operators."""

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


def _routes(lm: Beneath) -> list[Route]:
    """Those of an LM, and of the variants of it that calls with settings of their own have made."""
    pipelines = (lm.pipeline, *(variant.pipeline for variant in lm._variants.all()))
    return [each for pipeline in pipelines for each in pipeline.every_route()]


def _places(routes: list[Route], wanted: str | None, problem: str) -> dict[str, str]:
    """Address and model of the wanted routes, each with its model."""
    places = {each.place: each.model for each in routes if wanted in (None, each.name, each.model)}
    if not places:
        known = ", ".join(sorted({repr(name) for each in routes for name in (each.name, each.model)}))
        raise ConfigError(f"{problem}; known: {known or 'none'}")
    return places

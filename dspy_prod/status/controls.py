"""What an operator says to all workers of a namespace: what to stop, how its circuits stand, what its budgets are.

Everything here holds for every process that uses the same store and namespace, at its next call, and for those that
begin later; it stays until it is taken back. On a memory store there is only this process.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable
from typing import Any, Final, get_args

from dspy_prod.errors import ConfigError
from dspy_prod.options import Budget
from dspy_prod.pipeline.identities import operate
from dspy_prod.policies.breaker import circuit
from dspy_prod.policies.breaker.transitions import OperatorMove
from dspy_prod.policies.fleet import Fleet, fleet_of
from dspy_prod.policies.orders import Stop, operator
from dspy_prod.privacy.redactor import claimed
from dspy_prod.status.models import CircuitHealth, StopHealth
from dspy_prod.status.names import doubt
from dspy_prod.stores.addresses import default_store_url
from dspy_prod.stores.base import Store
from dspy_prod.stores.board import Note
from dspy_prod.stores.opening import default_namespace, open_store

SCOPES: Final = ("program", "model", "tenant", "all")
MOST_STOPS: Final = 500
"""Stops in force at once, of a namespace."""
LONGEST_REASON: Final = 500
"""Characters."""


def controls(store: str | Store | None = None, namespace: str | None = None) -> Controls:
    """What an operator says to all workers that use a store and a namespace.

        dspy_prod.controls().stop(program="triage", reason="answers in the wrong language")

    Args:
        store: as of an LM; default: `$DSPY_PROD__STORE` or `$DSPY_PROD_STORE`, else `sqlite:///.dspy_prod/state.db`.
        namespace: default: `$DSPY_PROD__NAMESPACE` or `$DSPY_PROD_NAMESPACE`, else the directory's name.

    Raises:
        ConfigError: the store's URL cannot be understood. StoreUnavailableError: the store cannot be used.
    """
    return Controls(open_store(store if store is not None else default_store_url(), default_namespace(namespace)))


class Controls:
    """See `controls`. Every change is durable when it returns, and written into the journal with who made it.

    Args:
        store: whose workers are spoken to.
        by: who speaks, for the journal; default: the user of this process.

    Every method raises StoreUnavailableError where the store cannot keep or tell it.

    Example:
        >>> controls = Controls(lm.pipeline.store, by="the night shift")  # doctest: +SKIP
        >>> controls.stop(tenant="acme", reason="unpaid", duration=3600)  # doctest: +SKIP
    """

    def __init__(self, store: Store, by: str | None = None) -> None:
        self.store = store
        self.by = by or operator()

    def __repr__(self) -> str:
        return f"Controls(namespace={self.store.namespace!r})"

    @property
    def _fleet(self) -> Fleet:
        return fleet_of(self.store)

    # -- stops -------------------------------------------------------------------------------------------------------
    def stop(
        self,
        *,
        program: str | None = None,
        model: str | None = None,
        tenant: str | None = None,
        everything: bool = False,
        reason: str = "",
        duration: float | dt.timedelta | None = None,
    ) -> StopHealth:
        """Send nothing more for a program, a model, a tenant or at all.

        Calls for it raise `StoppedError` before they wait for anything; those in line, and retries, are refused before
        they are sent, and those under way end by themselves. Of a stopped model the next route is asked. Answers that
        the cache has are still given: nothing is sent for them. Said again it holds with the new reason and time.

            controls.stop(model="openai/gpt-4o", reason="wrong prices", duration=600)

        Args:
            program: a `Production`'s name, or `call_context(program=...)`. model: as routes name it.
            tenant: as in `call_context(tenant=...)`. everything: all calls of the namespace.
            reason: for callers and the journal.
            duration: seconds, or a timedelta, after which they go on by themselves; default: until `resume`.

        Raises:
            ConfigError: not exactly one of the four, no such duration, or as many stops as there may be.
        """
        scope, value = _target(program, model, tenant, everything)
        now = self.store_time()
        until = None if duration is None else now + _seconds(duration)
        others = [each for each in self._fleet.stops() if (each.scope, each.value) != (scope, value)]
        if len(others) >= MOST_STOPS:
            raise ConfigError(f"{MOST_STOPS} stops are in force already; resume some, or stop everything")
        stop = Stop(scope, value, _short(reason), self.by, now, until)
        self._fleet.stop(stop)
        self._fleet.look()
        return _shown(stop)

    def resume(
        self,
        *,
        program: str | None = None,
        model: str | None = None,
        tenant: str | None = None,
        everything: bool = False,
    ) -> bool:
        """Let go on what was stopped; whether it was. `everything` takes back that stop alone, no program's."""
        scope, value = _target(program, model, tenant, everything)
        found = self._fleet.resume(scope, value, self.by)
        self._fleet.look()
        return found

    def doubt(
        self,
        *,
        program: str | None = None,
        model: str | None = None,
        tenant: str | None = None,
        route: str | None = None,
    ) -> str:
        """Why what is said of a name may concern nobody; empty where calls of that name are known.

        A stop of a name that nobody has is kept, since calls of it may come yet, but one that is only written otherwise
        (`gpt-4o-mini` for `openai/gpt-4o-mini`) stops nothing.

            print(controls.doubt(model="gpt-4o-mini"))  # "No call of model 'gpt-4o-mini' is in the ledger; known: ..."

        Args:
            program, model, tenant: as of `stop`. route: as of `breaker`.

        Returns:
            A sentence that names those that are known; empty, too, where the store cannot tell.

        Raises:
            ConfigError: not exactly one of the four.
        """
        if route is not None and (program, model, tenant) == (None, None, None):
            found = any(route in (each.model, each.route) for each in self.circuits() if not each.by)
            return "" if found else doubt(self.store, "model", route, self.store_time(), route=True)
        if route is not None:
            raise ConfigError("Name one of program=, model=, tenant= or route=")
        return doubt(self.store, *_target(program, model, tenant, False), self.store_time())

    def stops(self) -> list[StopHealth]:
        """What is stopped now, the latest first."""
        return [_shown(stop) for stop in self._fleet.stops()]

    # -- circuits ----------------------------------------------------------------------------------------------------
    def breaker(self, move: OperatorMove, route: str, reason: str = "") -> None:
        """Move the circuits of a route in every worker.

        Args:
            move: `"force_open"` refuses every call, and `"disable"` admits every call and counts none, until
                `"reset"` closes the circuit and forgets what was counted.
            route: a model, wherever it is served, or its address and model as `circuits()` tells it.
            reason: for callers and the journal.

        Raises:
            ConfigError: an unknown move, or an empty route.
        """
        if move not in get_args(OperatorMove):
            raise ConfigError(f"breaker({move!r}): use one of {', '.join(map(repr, get_args(OperatorMove)))}")
        if not route:
            raise ConfigError("breaker(route=''): name a model, such as route='openai/gpt-4o-mini'")
        operate(self.store, route, move, _short(reason), self.by)

    def circuits(self) -> list[CircuitHealth]:
        """The circuits that any worker has opened since, and what operators have said of others."""
        view, now = self._fleet.look(), self.store_time()
        found = [
            CircuitHealth(
                model=str(row.get("model")), route=str(row.get("place")), state=circuit.state(row),
                cause=str(row.get("cause", "")), probes=len(row.get("probes", ())),
                retry_after=max(0.0, row["until"] - now) if circuit.state(row) == "open" else 0.0, by="",
            )
            for row in view.circuits.values()
        ]  # fmt: skip
        for order in view.orders.values():
            if order.move != "reset":
                forced = order.move == "force_open"
                found.append(
                    CircuitHealth(
                        model=order.target, route=order.target, state="forced_open" if forced else "disabled",
                        cause=order.cause, probes=0, retry_after=None if forced else 0.0, by=order.by,
                    )
                )  # fmt: skip
        return sorted(found, key=lambda each: (each.state == "closed", each.model, each.route))

    # -- budgets -----------------------------------------------------------------------------------------------------
    def set_budget(self, name: str, usd: float) -> Budget:
        """Give a budget another limit, for all who share it; what is spent stays, and who waits for money is served.

        A process that is started with another limit in its code sets that again: change it there too.

        Args:
            name: as `dspy-prod budgets` lists it. usd: the new limit.

        Raises:
            ConfigError: there is no such budget in the namespace, or no such limit.
        """
        known = {terms.in_force.title: terms.in_force for terms in self.store.terms()}
        if name not in known:
            names = ", ".join(map(repr, sorted(known))) or "none"
            raise ConfigError(f"There is no budget {name!r} in namespace {self.store.namespace!r}; known: {names}")
        before = known[name]
        budget = Budget(**{**{field: getattr(before, field) for field in Budget.model_fields}, "usd": usd})
        self.store.steer(budget)
        note = ("budget set", name, self.by, f"{before.usd:g} USD to {usd:g} USD")
        self._fleet.note(note)
        return budget

    # -- what was done -----------------------------------------------------------------------------------------------
    def journal(self, limit: int = 100) -> list[Note]:
        """What operators and circuits have done, newest first; about the last thousand entries are kept."""
        return self._fleet.board.journal(limit)

    def store_time(self) -> float:
        """Seconds since the epoch, as the store counts them."""
        return self._fleet.board.now()


def stopped(stores: Iterable[Store]) -> list[StopHealth]:
    """What is stopped in some stores."""
    return [_shown(stop) for store in stores for stop in fleet_of(store).stops()]


def _target(program: Any, model: Any, tenant: Any, everything: bool) -> tuple[str, str]:
    named = {"program": program, "model": model, "tenant": tenant}
    given = {scope: value for scope, value in named.items() if value is not None}
    if len(given) + bool(everything) != 1:
        raise ConfigError("Name one of program=, model=, tenant= or everything=True")
    if everything:
        return "all", ""
    ((scope, value),) = given.items()
    if not isinstance(value, str) or not value:
        raise ConfigError(f"{scope}={value!r} must be a name")
    return scope, claimed(value) if scope == "tenant" else value


def _seconds(duration: Any) -> float:
    seconds = duration.total_seconds() if isinstance(duration, dt.timedelta) else duration
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not 0 < seconds < 1e9:
        raise ConfigError(f"duration={duration!r} must be a positive number of seconds, or a timedelta")
    return float(seconds)


def _short(reason: str) -> str:
    if not isinstance(reason, str):
        raise ConfigError(f"reason={reason!r} must be text")
    return " ".join(reason.split())[:LONGEST_REASON]


def _shown(stop: Stop) -> StopHealth:
    since = dt.datetime.fromtimestamp(stop.since, dt.timezone.utc)
    until = None if stop.until is None else dt.datetime.fromtimestamp(stop.until, dt.timezone.utc)
    return StopHealth(scope=stop.scope, value=stop.value, reason=stop.reason, by=stop.by, since=since, until=until)

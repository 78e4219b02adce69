"""Which budget accounts a call draws on: windows, scopes, and the soft threshold.

The arithmetic (reserve, settle, refuse) is one atomic step of the store, see `stores/admission/core.py`.
"""

from __future__ import annotations

import datetime as dt
import logging
import threading
import weakref
from math import inf
from typing import Any, Final, NamedTuple, Protocol
from zoneinfo import ZoneInfo

from dspy_prod.context.current import PROCESS_RUN, CallContext
from dspy_prod.errors import BudgetExceededError
from dspy_prod.options import Budget
from dspy_prod.runtime.clock import SYSTEM_CLOCK
from dspy_prod.runtime.forking import reset_after_fork
from dspy_prod.stores.base import Account, Terms
from dspy_prod.stores.keys import BETWEEN, NOBODY, apart, joined
from dspy_prod.telemetry.events import BUS

_log = logging.getLogger("dspy_prod")

_MAX_CACHED_ACCOUNTS: Final = 10_000


class Follower(Protocol):
    """Who has to know when the options of a budget change."""

    def budgets_changed(self) -> None: ...

    def __hash__(self) -> int: ...


class _Window(NamedTuple):
    id: str
    ends_at: float
    accounts: dict[Any, Account]  # by scope value
    options: Budget
    begins_at: float


class BudgetRule:
    """One budget: from the context of a call to its account.

    Rules are shared by all LMs that name the same budget in the same store and namespace. Their options change with
    the terms in that store; the store holds every admission to the limit in force, this only says where to look.

    Attributes:
        options: the settings in force, as far as this process has heard.
        limit: their limit in nano-USD.
        caps: they cap single calls, which have a `Purse` and no account.
    """

    def __init__(self, options: Budget) -> None:
        self._lock = threading.Lock()
        self._revision = 0
        self._followers: weakref.WeakSet[Follower] = weakref.WeakSet()
        self._take(options)
        reset_after_fork(self)

    def _take(self, options: Budget) -> None:
        self.options = options
        self.limit = options.limit_nano
        self.caps = options.per == "call"
        self._zone = ZoneInfo(options.timezone)
        # Replaced as one: a call sees one window and its settings, or the other.
        self._current = _Window("", -inf, {}, options, inf)
        self._soft = None if options.soft is None else int(self.limit * options.soft)
        self._softened: set[str] = set()

    def hear(self, terms: Terms) -> None:
        """Go by the settings in force from now on, and tell the listeners if they are others than before."""
        with self._lock:
            before, now = self.options, terms.in_force
            if terms.revision < self._revision:
                return
            self._revision = terms.revision
            if now == before:
                return
            self._take(now)
            followers = list(self._followers)
        for follower in followers:
            follower.budgets_changed()
        changed = [name for name in Budget.model_fields if getattr(now, name) != getattr(before, name)]
        if not {"per", "scope", "timezone"}.isdisjoint(changed) and not self.caps:
            _log.warning(
                "The budget %r is now per %s and %s (%s), and its accounts begin anew: what was spent per %s and %s "
                "stays on those of before. Lower usd= by it where it has to count",
                now.title, now.per, now.scope, now.timezone, before.per, before.scope,
            )  # fmt: skip
        BUS.emit(
            "budget_changed", SYSTEM_CLOCK.time(), budget=now.title, limit_usd=now.usd, before_usd=before.usd,
            changed=changed,
        )  # fmt: skip

    def follow(self, follower: Follower) -> None:
        """Tell a pipeline from now on when the options change, for as long as it lives."""
        with self._lock:  # pipelines are made while others hear of changes
            self._followers.add(follower)

    def _after_fork(self) -> None:
        self._lock = threading.Lock()

    def account(self, context: CallContext, model: str, wall: float) -> Account:
        """The account a call draws on.

        Args:
            context: the call's context.
            model: the route's model, for `scope="model"`.
            wall: seconds since the epoch.

        Raises:
            BudgetExceededError: the scope's value is missing and the budget requires it.
        """
        window, ends_at, accounts, options, begins_at = self._current
        if not begins_at <= wall < ends_at:  # a clock that went ahead may be set back
            window, ends_at, accounts, options, begins_at = self._turn(wall)
        value = _scope_value(options, context, model)
        place: Any = (context.run or PROCESS_RUN, value) if options.per == "run" else value
        account = accounts.get(place)
        if account is None:
            account = _account(options, place if isinstance(place, tuple) else (place,), window, ends_at - begins_at)
            if len(accounts) >= _MAX_CACHED_ACCOUNTS:
                accounts.clear()
            accounts[place] = account
        return account

    @property
    def personal(self) -> bool:
        """Whether each user, or tenant, has an account of its own."""
        return self.options.scope in ("user", "tenant")

    @property
    def prefix(self) -> str:
        """How the keys of all accounts of this budget begin."""
        return _prefix(self.options)

    def found(self, key: str, window: str, ends_in: float) -> Account:
        """The account behind a key that a store has."""
        return _account(self.options, self._place(key, window), window, ends_in)

    def who(self, key: str, window: str) -> str | None:
        """Whose account it is: the run if there is one, and the scope's value; None for that of all.

        All who do not say who they are share `anonymous`; somebody of that name is shown in quotes.
        """
        place = self._place(key, window)
        if self.options.scope == "global":
            place = place[:-1]
        return _shown(place) or None

    def _place(self, key: str, window: str) -> tuple[str | None, ...]:
        return apart(key[len(self.prefix) : -len(window) - 1])

    @property
    def ends_at(self) -> float:
        """When the window of the latest account ends, in seconds since the epoch."""
        return self._current.ends_at

    def ends_in(self, wall: float) -> float:
        """Seconds until the window that holds `wall` ends; `inf` where it has no end."""
        return self.window(wall)[1] - wall

    def soft_passed(self, account: str, spent: int) -> bool:
        """Note what an account has spent, not what it holds; True the first time it is at the soft threshold."""
        if self._soft is None or spent < self._soft or account in self._softened:
            return False
        with self._lock:
            if len(self._softened) >= _MAX_CACHED_ACCOUNTS:
                self._softened.clear()
            self._softened.add(account)
        return True

    def degraded(self, account: str) -> str | None:
        """The cheaper model to use for the rest of the window, once the soft threshold is passed."""
        return self.options.degrade_to if account in self._softened else None

    def window(self, wall: float) -> tuple[str, float]:
        """(id, end in seconds since the epoch) of the window that holds `wall`."""
        name, _, ends_at = self._bounds(wall)
        return name, ends_at

    def _bounds(self, wall: float) -> tuple[str, float, float]:
        """(id, begin, end) of the window that holds `wall`."""
        per = self.options.per
        if per in ("total", "run", "call"):
            return per, -inf, inf
        if per == "hour":
            start = int(wall // 3600) * 3600
            name = dt.datetime.fromtimestamp(start, dt.timezone.utc).strftime("%Y-%m-%dT%HZ")
            return name, float(start), start + 3600.0
        local = dt.datetime.fromtimestamp(wall, self._zone)
        midnight = local.replace(hour=0, minute=0, second=0, microsecond=0, fold=0)
        if per == "day":
            return local.strftime("%Y-%m-%d"), midnight.timestamp(), _next_day(midnight, 1).timestamp()
        first = midnight.replace(day=1)
        return local.strftime("%Y-%m"), first.timestamp(), _next_day(first, 32).replace(day=1).timestamp()

    def _turn(self, wall: float) -> _Window:
        with self._lock:
            if not self._current.begins_at <= wall < self._current.ends_at:
                self._softened = set()
                name, begins_at, ends_at = self._bounds(wall)
                self._current = _Window(name, ends_at, {}, self.options, begins_at)
            return self._current


def _scope_value(options: Budget, context: CallContext, model: str) -> str | None:
    scope = options.scope
    if scope == "global":
        return "-"
    if scope == "model":
        return model
    if scope == "tenant":
        value = context.tenant
    elif scope == "user":
        value = context.user
    else:
        value = dict(context.tags).get(scope[4:])
    if value is not None:
        return value
    if options.require:
        field = f'tags={{"{scope[4:]}": ...}}' if scope.startswith("tag:") else f"{scope}=..."
        raise BudgetExceededError(
            f"The budget {options.title!r} requires every call to say its {scope}; "
            f"wrap the call in dspy_prod.call_context({field})",
            budget=options.title,
            limit_usd=options.usd,
            missing=scope,
        )
    return None


def _account(options: Budget, place: tuple[str | None, ...], window: str, ends_in: float) -> Account:
    title = options.title if options.scope == "global" else f"{options.title}={_shown(place)}"
    key = f"{_prefix(options)}{joined(*place)}{BETWEEN}{window}"
    return Account(key, options.limit_nano, title, ends_in, options.title)


def _prefix(options: Budget) -> str:
    return f"{joined(options.title)}{BETWEEN}"


def _shown(place: tuple[str | None, ...]) -> str:
    """An account's place for people; a part that could be taken for something else stands in quotes."""
    return BETWEEN.join([NOBODY if part is None else _quoted(part, alone=len(place) == 1) for part in place])


def _quoted(part: str, alone: bool) -> str:
    doubtful = part == NOBODY or part[:1] in ("'", '"') or (not alone and BETWEEN in part)
    return repr(part) if doubtful else part


def _next_day(midnight: dt.datetime, days: int) -> dt.datetime:
    # Civil arithmetic: a day with a clock change is 23 or 25 hours long.
    naive = midnight.replace(tzinfo=None) + dt.timedelta(days=days)
    return naive.replace(tzinfo=midnight.tzinfo)

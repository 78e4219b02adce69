"""Which budget accounts a call draws on: windows, scopes, and the soft threshold.

The arithmetic (reserve, settle, refuse) is one atomic step of the store, see `stores/admission/core.py`.
"""

from __future__ import annotations

import datetime as dt
import threading
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from math import inf
from typing import Any, Final, Protocol
from urllib.parse import unquote
from zoneinfo import ZoneInfo

from dspy_prod.context.current import PROCESS_RUN, CallContext
from dspy_prod.errors import BudgetExceededError, ConfigError
from dspy_prod.options import Budget
from dspy_prod.records import NANO
from dspy_prod.runtime.clock import SYSTEM_CLOCK
from dspy_prod.runtime.forking import RegistryLock, reset_after_fork
from dspy_prod.stores.base import Account, Store, Terms
from dspy_prod.telemetry.events import BUS

ANONYMOUS: Final = "anonymous"
"""What the one bucket is called of all calls that do not say whose they are."""

_MAX_CACHED_ACCOUNTS: Final = 10_000


class Follower(Protocol):
    """Who has to know when the options of a budget change."""

    def budgets_changed(self) -> None: ...

    def __hash__(self) -> int: ...


class BudgetRule:
    """One budget: from the context of a call to its account.

    Rules are shared by all LMs that name the same budget in the same store and namespace. Their options change with
    the terms in that store; the store holds every admission to the limit in force, this only says where to look.

    Attributes:
        options: the settings in force, as far as this process has heard.
        limit: their limit in nano-USD.
        caps: they cap single calls, which have a `Purse` and no account.
        followers: pipelines that have to know when the options change.
    """

    def __init__(self, options: Budget) -> None:
        self._lock = threading.Lock()
        self._revision = 0
        self.followers: weakref.WeakSet[Follower] = weakref.WeakSet()
        self._take(options)
        reset_after_fork(self)

    def _take(self, options: Budget) -> None:
        self.options = options
        self.limit = options.limit_nano
        self.caps = options.per == "call"
        self._zone = ZoneInfo(options.timezone)
        # (window id, its end, accounts by scope value), replaced as one: a call sees one window or the other
        self._current: tuple[str, float, dict[Any, Account]] = ("", -inf, {})
        self._soft = None if options.soft is None else int(self.limit * options.soft)
        self._softened: set[str] = set()

    def hear(self, terms: Terms) -> None:
        """Go by the settings in force from now on, and tell the listeners if they are others than before."""
        with self._lock:
            before, now = self.options, terms.in_force
            if terms.revision < self._revision or now == before:
                return
            self._revision = terms.revision
            self._take(now)
        for follower in list(self.followers):
            follower.budgets_changed()
        changed = [name for name in Budget.model_fields if getattr(now, name) != getattr(before, name)]
        BUS.emit(
            "budget_changed", SYSTEM_CLOCK.time(), budget=now.title, limit_usd=now.usd, before_usd=before.usd,
            changed=changed,
        )  # fmt: skip

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
        options = self.options
        window, ends_at, accounts = self._current
        if wall >= ends_at:
            window, ends_at, accounts = self._turn(wall)
        value = self._scope_value(context, model)
        place: Any = (context.run or PROCESS_RUN, value) if options.per == "run" else value
        account = accounts.get(place)
        if account is None:
            account = self._account(place if isinstance(place, tuple) else (place,), window, ends_at - wall)
            if len(accounts) >= _MAX_CACHED_ACCOUNTS:
                accounts.clear()
            accounts[place] = account
        return account

    def _account(self, place: tuple[str | None, ...], window: str, ends_in: float) -> Account:
        options = self.options
        shown = "|".join([ANONYMOUS if part is None else part for part in place])
        title = options.title if options.scope == "global" else f"{options.title}={shown}"
        key = f"{self.prefix}{'|'.join(map(_written, place))}|{window}"
        return Account(key, self.limit, title, ends_in, options.title)

    @property
    def prefix(self) -> str:
        """How the keys of all accounts of this budget begin."""
        return f"{_written(self.options.title)}|"

    def found(self, key: str, window: str, ends_in: float) -> Account:
        """The account behind a key that a store has."""
        return self._account(self._place(key, window), window, ends_in)

    def who(self, key: str, window: str) -> str | None:
        """Whose account it is: the run if there is one, and the scope's value; None for that of all."""
        place = self._place(key, window)
        if self.options.scope == "global":
            place = place[:-1]
        return "|".join([ANONYMOUS if part is None else part for part in place]) or None

    def _place(self, key: str, window: str) -> tuple[str | None, ...]:
        written = key[len(self.prefix) : -len(window) - 1].split("|")
        return tuple([None if part == ANONYMOUS else unquote(part) for part in written])

    @property
    def ends_at(self) -> float:
        """When the window of the latest account ends, in seconds since the epoch."""
        return self._current[1]

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
        per = self.options.per
        if per in ("total", "run", "call"):
            return per, inf
        if per == "hour":
            start = int(wall // 3600) * 3600
            return dt.datetime.fromtimestamp(start, dt.timezone.utc).strftime("%Y-%m-%dT%HZ"), start + 3600.0
        local = dt.datetime.fromtimestamp(wall, self._zone)
        midnight = local.replace(hour=0, minute=0, second=0, microsecond=0, fold=0)
        if per == "day":
            return local.strftime("%Y-%m-%d"), _next_day(midnight, 1).timestamp()
        first = midnight.replace(day=1)
        return local.strftime("%Y-%m"), _next_day(first, 32).replace(day=1).timestamp()

    def _turn(self, wall: float) -> tuple[str, float, dict[Any, Account]]:
        with self._lock:
            if wall >= self._current[1]:
                self._softened = set()
                self._current = (*self.window(wall), {})
            return self._current

    def _scope_value(self, context: CallContext, model: str) -> str | None:
        scope = self.options.scope
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
        if self.options.require:
            field = f'tags={{"{scope[4:]}": ...}}' if scope.startswith("tag:") else f"{scope}=..."
            raise BudgetExceededError(
                f"The budget {self.options.title!r} requires every call to say its {scope}; "
                f"wrap the call in dspy_prod.call_context({field})",
                budget=self.options.title,
                limit_usd=self.options.usd,
            )
        return None


def _written(part: str | None) -> str:
    """A part of a key, so that no two accounts have one key, and somebody called "anonymous" is not nobody."""
    if part is None:
        return ANONYMOUS
    if part == ANONYMOUS:
        return "%61" + part[1:]
    return part.replace("%", "%25").replace("|", "%7C") if "%" in part or "|" in part else part


class Purse:
    """What one call has spent, with all its attempts on all routes and its `n` answers.

    Attributes:
        answers: how many answers were asked for.
    """

    __slots__ = ("_costs", "answers")

    def __init__(self, answers: int = 1) -> None:
        self.answers = answers
        self._costs: list[int] = []

    @property
    def spent(self) -> int:
        """Nano-USD; an attempt that was left and has not ended counts with its bound."""
        return sum(self._costs)

    def charge(self, cost: int, place: int | None) -> int:
        """Note what an attempt came to, in the place of what was said of it before; the place it has."""
        if place is None:
            self._costs.append(cost)
            return len(self._costs) - 1
        self._costs[place] = cost
        return place

    def check(self, rule: BudgetRule, bound: int, answers: int, *, model: str, route: str) -> None:
        """Refuse an attempt that could take its call beyond a cap.

        Args:
            rule: the cap.
            bound: the most that the attempt can cost, in nano-USD.
            answers: how many answers are still to be paid for, this one included.
            model, route: where it would be sent.

        Raises:
            BudgetExceededError: what was spent and the bounds of all answers to come are more than the limit.
        """
        needed = bound * answers
        spent = self.spent
        if spent + needed <= rule.limit:
            return
        each = f" for its {answers} answers" if answers > 1 else ""
        before = f"{spent / NANO:.6f} USD are spent by its earlier attempts, and " if spent else ""
        raise BudgetExceededError(
            f"Budget {rule.options.title!r} allows {rule.limit / NANO:.6f} USD for one call; {before}this one may cost "
            f"up to {needed / NANO:.6f} USD{each}. Raise the budget, lower max_tokens, or shorten the prompt",
            model=model,
            route=route,
            budget=rule.options.title,
            limit_usd=rule.limit / NANO,
            spent_usd=spent / NANO,
            bound_usd=needed / NANO,
        )


def _next_day(midnight: dt.datetime, days: int) -> dt.datetime:
    # Civil arithmetic: a day with a clock change is 23 or 25 hours long.
    naive = midnight.replace(tzinfo=None) + dt.timedelta(days=days)
    return naive.replace(tzinfo=midnight.tzinfo)


_RULES: weakref.WeakValueDictionary[tuple[str, str, str], BudgetRule] = weakref.WeakValueDictionary()
_RULES_LOCK = RegistryLock()


_QUOTED: Final = ContextVar("dspy_prod_quoted_budgets", default=False)


@contextmanager
def quoted() -> Iterator[None]:
    """The settings of budgets inside are a copy's or a file's: they hold only where nobody has said any."""
    token = _QUOTED.set(True)
    try:
        yield
    finally:
        _QUOTED.reset(token)


def quoted_rules(store: Store, budgets: Iterable[Budget]) -> tuple[BudgetRule, ...]:
    """The rules for budgets of another LM."""
    with quoted():
        return tuple([shared_rule(store, budget) for budget in budgets])


def steer(store: Store, rules: Iterable[BudgetRule], budgets: Iterable[Budget]) -> None:
    """Put other settings in force for some of these rules, by name: all of them, or none when one is unknown.

    Raises:
        ConfigError: no rule has that name.
        StoreUnavailableError: the store cannot keep the settings.
    """
    budgets, known = list(budgets), {rule.options.title for rule in rules}
    for budget in budgets:
        if budget.title not in known:
            names = ", ".join(map(repr, sorted(known))) or "none"
            raise ConfigError(
                f"This LM has no budget called {budget.title!r}; it has {names}. Give the new settings the name of one "
                "of them, Budget(name=...), or use lm.copy(budget=...) for other budgets"
            )
    for budget in budgets:
        store.steer(budget)


def shared_rule(store: Store, options: Budget) -> BudgetRule:
    """The rule for a budget, shared by everything in this process that names it.

    Args:
        store: where its accounts and its terms are kept.
        options: the settings an LM is built with. They hold from now on, for all who share the budget, if they are
            others than those that one was built with before. `quoted` ones hold only while nobody has said any.
    """
    place = _place(store)
    with _RULES_LOCK:
        key = (*place, options.title)
        rule = _RULES.get(key)
        if rule is None:
            rule = _RULES[key] = BudgetRule(options)
    store.on_terms(partial(_heard, place))
    store.declare(options, not _QUOTED.get())
    terms = store.known_terms(options.title)
    if terms is not None:
        rule.hear(terms)
    return rule


def refresh(store: Store) -> None:
    """Hear what other processes have said about budgets since this one made its last call."""
    for terms in store.terms():
        _heard(_place(store), terms)


def _place(store: Store) -> tuple[str, str]:
    return (store.url, store.namespace) if store.durable else (str(id(store)), "")


def _heard(place: tuple[str, str], terms: Terms) -> None:
    rule = _RULES.get((*place, terms.in_force.title))
    if rule is not None:
        rule.hear(terms)

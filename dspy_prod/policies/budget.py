"""Which budget accounts a call draws on: windows, scopes, and the soft threshold.

The arithmetic (reserve, settle, refuse) is one atomic step of the store, see `stores/core.py`.
"""

from __future__ import annotations

import datetime as dt
import threading
import weakref
from math import inf
from typing import Final
from zoneinfo import ZoneInfo

from dspy_prod.context.current import PROCESS_RUN, CallContext
from dspy_prod.errors import BudgetExceededError, ConfigError
from dspy_prod.options import Budget
from dspy_prod.runtime.forking import RegistryLock, reset_after_fork
from dspy_prod.stores.base import Account, Store

ANONYMOUS: Final = "anonymous"
"""The scope value of calls that do not say theirs; one bucket for all of them."""

_MAX_CACHED_ACCOUNTS: Final = 10_000


class BudgetRule:
    """One budget: from the context of a call to its account.

    Rules are shared by all LMs that name the same budget in the same store and namespace.
    """

    def __init__(self, options: Budget) -> None:
        self.options = options
        self.limit = options.limit_nano
        self._zone = ZoneInfo(options.timezone)
        self._lock = threading.Lock()
        # (window id, its end, accounts by scope value), replaced as one: a call sees one window or the other
        self._current: tuple[str, float, dict[str, Account]] = ("", -inf, {})
        self._soft = None if options.soft is None else int(self.limit * options.soft)
        self._softened: set[str] = set()
        reset_after_fork(self)

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
        if options.per == "run":
            value = f"{context.run or PROCESS_RUN}|{value}"
        account = accounts.get(value)
        if account is None:
            title = options.title if options.scope == "global" else f"{options.title}={value}"
            account = Account(f"{options.title}|{value}|{window}", self.limit, title, ends_at - wall)
            if len(accounts) >= _MAX_CACHED_ACCOUNTS:
                accounts.clear()
            accounts[value] = account
        return account

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
        if per in ("total", "run"):
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

    def _turn(self, wall: float) -> tuple[str, float, dict[str, Account]]:
        with self._lock:
            if wall >= self._current[1]:
                self._softened = set()
                self._current = (*self.window(wall), {})
            return self._current

    def _scope_value(self, context: CallContext, model: str) -> str:
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
        return ANONYMOUS


def _next_day(midnight: dt.datetime, days: int) -> dt.datetime:
    # Civil arithmetic: a day with a clock change is 23 or 25 hours long.
    naive = midnight.replace(tzinfo=None) + dt.timedelta(days=days)
    return naive.replace(tzinfo=midnight.tzinfo)


_RULES: weakref.WeakValueDictionary[tuple[str, str, str], BudgetRule] = weakref.WeakValueDictionary()
_RULES_LOCK = RegistryLock()


def shared_rule(store: Store, options: Budget) -> BudgetRule:
    """The rule for a budget, shared by everything in this process that names it.

    Raises:
        ConfigError: another budget of that name is in use with different settings.
    """
    key = (store.url, store.namespace, options.title) if store.durable else (str(id(store)), "", options.title)
    with _RULES_LOCK:
        rule = _RULES.get(key)
        if rule is None:
            rule = _RULES[key] = BudgetRule(options)
        elif rule.options != options:
            raise ConfigError(
                f"The budget {options.title!r} is already in use with other settings ({rule.options!r}). "
                "Give one of them its own name=..., use the same settings, or separate them with namespace=..."
            )
        return rule

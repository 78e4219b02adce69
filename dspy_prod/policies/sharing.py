"""Which rule a budget is: one for all who name it in the same store, and how its settings reach it.

The store keeps the settings (`stores/admission/terms.py`); the rules of this process hear of them.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Final

from dspy_prod.errors import ConfigError
from dspy_prod.options import Budget
from dspy_prod.policies.budget import BudgetRule
from dspy_prod.runtime.forking import RegistryLock
from dspy_prod.stores.base import Store, Terms

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

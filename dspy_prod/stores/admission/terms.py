"""The settings of budgets, as all who share one keep them. Part of the admission core.

A reservation is held to the limit in force when it is decided, not to the one that its caller knew.
"""

from __future__ import annotations

from collections.abc import Callable

from dspy_prod.options import Budget
from dspy_prod.stores.base import Account, Terms


class TermsBook:
    """The terms a core knows; `load` finds those that a durable store has on disk.

    Attributes:
        limits: the limits in force in nano-USD, by the budget's title, as far as they were asked for.
        dirty: titles a durable store has to write back.
    """

    def __init__(self, load: Callable[[str], Terms | None] | None) -> None:
        self._load = load
        self._known: dict[str, Terms] = {}
        self._told: dict[str, Terms] = {}
        self._learned: dict[str, Terms] = {}  # and not told yet, because it may still be rolled back
        self.limits: dict[str, int] = {}
        self.dirty: set[str] = set()

    def limit(self, account: Account) -> int:
        """The limit in force for an account, in nano-USD; its own where nobody declared its budget."""
        if not account.budget:  # a run's
            return account.limit
        limit = self.limits.get(account.budget)
        if limit is None:
            terms = self.find(account.budget)
            limit = account.limit if terms is None else terms.in_force.limit_nano
        return limit

    def find(self, title: str) -> Terms | None:
        """The terms of a budget, None while nobody declared it."""
        terms = self._known.get(title)
        if terms is None and self._load is not None:
            terms = self._load(title)
            if terms is not None:
                self._learn(terms)
        return terms

    def declare(self, budget: Budget, anew: bool) -> bool:
        """An LM is built with a budget. What differs from what the last one was built with is in force from now on;
        the same again leaves in force what `steer` said meanwhile.

        Args:
            budget: the settings.
            anew: somebody says so now; else they are a copy's, and hold only while nobody else has said anything.

        Returns:
            Whether other terms are in force than before.
        """
        terms = self.find(budget.title)
        if terms is not None and (terms.built == budget or not anew):
            return False
        self._put(Terms(budget, budget, 1 if terms is None else terms.revision + 1))
        return True

    def steer(self, budget: Budget) -> bool:
        """These settings are in force from now on, whatever LMs were built with; False when they are already."""
        terms = self.find(budget.title)
        if terms is not None and terms.in_force == budget:
            return False
        self._put(Terms(budget, budget, 1) if terms is None else Terms(terms.built, budget, terms.revision + 1))
        return True

    def look_again(self) -> None:
        """Others wrote: find what they said of budgets that cap single calls, for which no account asks."""
        for title, told in self._told.copy().items():
            if told.in_force.per == "call":
                self.find(title)

    def all(self) -> list[Terms]:
        """The terms known here."""
        return list(self._known.values())

    def take_news(self) -> list[Terms]:
        """Terms that are others than those told last; called once they are durable."""
        if not self._learned:
            return []
        news = [terms for title, terms in self._learned.items() if self._told.get(title) != terms]
        self._told.update(self._learned)
        self._learned = {}
        return news

    def forget(self) -> None:
        """Drop everything that was not told: a durable store's terms are loaded again when needed."""
        self._known.clear()
        self._learned.clear()
        self.limits.clear()
        self.dirty.clear()

    def carry_over(self) -> None:
        """The file is gone: everything known has to be written again, but for what others have said since."""
        assert self._load is not None
        for title, told in self._told.items():
            stored = self._load(title)
            if stored is None or stored.revision < told.revision:
                self._known[title] = told
                self.dirty.add(title)
            else:  # learned when it is needed
                self._known.pop(title, None)
                self.limits.pop(title, None)
                self.dirty.discard(title)

    def _put(self, terms: Terms) -> None:
        if self._load is not None:
            self.dirty.add(terms.in_force.title)
        self._learn(terms)

    def _learn(self, terms: Terms) -> None:
        title = terms.in_force.title
        self._known[title] = terms
        self._learned[title] = terms
        self.limits[title] = terms.in_force.limit_nano

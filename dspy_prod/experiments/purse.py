"""What unseen work of an experiment may cost: a run whose pieces know what they were refused, whatever became of the
refusal, and which says when there is no money left for calls as they are."""

from __future__ import annotations

import threading
from math import inf
from typing import Final

from dspy_prod.errors import BudgetExceededError
from dspy_prod.policies.run import Dimension, Run
from dspy_prod.runtime.forking import reset_after_fork
from dspy_prod.stores.base import Refusal, Store

IN_A_ROW: Final = 5
"""Calls that the money left did not cover, one after the other, by which it is known to be used up: a single one may be
larger than others are."""


class Purse(Run):
    """The run of one piece of work after another, each of which asks under a `Piece` of it."""

    _granted = _amount = 0

    def __init__(self, name: str, *, usd: float, store: str | Store) -> None:
        super().__init__(name, usd=usd, store=store)
        self._short: dict[str, int] = {}

    def see(self, piece: Piece, who: str = "") -> None:
        """A piece has ended. One that was granted nothing, as its answers came from a cache, says nothing of the money
        left.

        Args:
            who: whose it was: calls of one may be small enough for what is left, and those of another not.
        """
        if piece.is_short:
            self._short[who] = self._short.get(who, 0) + 1
        elif piece.has_paid and not piece.has_refused:
            self._short[who] = 0

    def is_used_up(self, who: str = "") -> bool:
        """Whether so many pieces of somebody's were short, one after the other, that it is not for the size of one."""
        return self._short.get(who, 0) >= IN_A_ROW

    def covers(self, left: float) -> bool:
        """Whether so much is enough for a usual call, as far as is known: for the mean of what was held for those that
        this process was granted."""
        with self._lock:
            return not self._granted or left * self._granted >= self._amount

    def paid(self, amount: int) -> None:
        """So much was held for a call that was granted."""
        with self._lock:
            self._granted, self._amount = self._granted + 1, self._amount + amount


class Piece(Run):
    """A purse for one piece of work. A thread that the piece has left behind tells nothing of the next one.

    A fallback, or code that handles errors, may answer what it refuses: such an answer tells nothing.

    Attributes:
        has_paid: a call was granted. has_refused: one was refused.
        is_short: one was for what is spent. Where it was for what calls under way hold, there may be money once they
            end.
        left: what was left when it was, nano-USD.
    """

    has_paid = has_refused = is_short = False
    left = inf

    def __init__(self, purse: Purse) -> None:
        self.__dict__.update(purse.__dict__)  # it is the same run: whatever is counted is counted there
        self._purse = purse
        self._lock = threading.RLock()
        reset_after_fork(self)

    def granted(self, name: Dimension, amount: int) -> None:
        """As of `Run`."""
        self.has_paid = True
        self._purse.paid(amount)

    def refused(self, name: Dimension, refusal: Refusal, model: str, route: str) -> BudgetExceededError:
        """As of `Run`."""
        self.has_refused = True
        if refusal.spent + refusal.amount > refusal.limit:
            self.is_short, self.left = True, refusal.limit - refusal.spent
        return super().refused(name, refusal, model, route)

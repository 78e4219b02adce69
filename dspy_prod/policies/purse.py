"""A cap on single calls: what one call has spent, and whether another attempt could take it beyond the limit."""

from __future__ import annotations

from dspy_prod.errors import BudgetExceededError
from dspy_prod.policies.budget import BudgetRule
from dspy_prod.records import NANO


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

"""Where a fuzzer's choices come from: chance, a script that repeats them, or hypothesis. Zero is the plain choice.

Every generator asks for whole numbers alone, so that one list of numbers is an example: it is saved, made smaller by
`shrunk`, and run again.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

T = TypeVar("T")


class Draws:
    """Choices, each remembered.

    Args:
        source: gives a number from 0 (included) to n (excluded).
    """

    def __init__(self, source: Callable[[int], int]) -> None:
        self._source = source
        self.made: list[int] = []

    def below(self, number: int) -> int:
        """One of 0, 1, ... `number` - 1."""
        choice = self._source(number)
        self.made.append(choice)
        return choice

    def pick(self, options: Sequence[T]) -> T:
        """One of them; the first is the plain one."""
        return options[self.below(len(options))]

    def one_in(self, number: int) -> bool:
        """Whether the rare thing happens."""
        return self.below(number) == number - 1


def by_chance(seed: int) -> Draws:
    """Choices of a generator of random numbers."""
    chance = random.Random(seed).random
    return Draws(lambda number: int(chance() * number))


def by_script(script: Sequence[int]) -> Draws:
    """Choices made before; plain ones when they are used up."""
    left = iter(script)
    return Draws(lambda number: next(left, 0) % number)


def by_hypothesis(data: Any) -> Draws:
    """Choices of `hypothesis.strategies.data()`, which hypothesis makes smaller by itself.

    All are drawn from one range: how long a compressed answer is depends on its number, and hypothesis wants the same
    choice to have the same limits in each run.
    """
    from hypothesis import strategies as st

    return Draws(lambda number: int(data.draw(st.integers(0, 2**20 - 1))) % number)


def shrunk(script: Sequence[int], fails: Callable[[Sequence[int]], bool], tries: int = 400) -> list[int]:
    """A shorter and plainer script that still fails.

    Args:
        script: one that fails.
        fails: whether another does.
        tries: how often it is asked.
    """
    best = list(script)
    left = tries

    def better(candidate: list[int]) -> bool:
        nonlocal best, left
        if left <= 0 or candidate == best:
            return False
        left -= 1
        if not fails(candidate):
            return False
        best = candidate
        return True

    size = max(1, len(best) // 2)
    while size and left > 0:
        start = 0
        while start < len(best) and left > 0:
            if not better(best[:start] + best[start + size :]):
                start += size
        size //= 2
    for position in range(len(best)):
        for value in (0, 1):
            if position < len(best) and best[position] > value:
                better([*best[:position], value, *best[position + 1 :]])
    while best and best[-1] == 0:  # what is used up is plain anyway
        best.pop()
    return best

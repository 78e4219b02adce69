"""The race of one candidate against the best program so far: a bet after each answer, until it is lost or complete.

The bets are those of Waudby-Smith and Ramdas, "Estimating means of bounded random variables by betting" (2023), for
drawing without replacement. They are placed on the answers less what earlier candidates lead to expect of each example,
which takes most of the noise away.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from typing import Final

FIXED: Final = (0.05, 0.15, 0.35, 0.7)
"""Bets, as shares of the largest possible one, that get a part of the money each."""
ON_FIXED: Final = 0.3
"""The part of the money on them together; the rest follows what was seen so far."""
LARGEST: Final = 0.9
"""Of the stake that could lose everything at once."""
PRIOR_SD: Final = 0.08
"""How far candidates' means lie from each other, before anything is known."""
PSEUDO: Final = 10
"""How many answers the variance that is expected beforehand is worth."""
BELOW: Final = 1e-4
"""How far the predicted mean stays below the incumbent's: a hundredth of a point, the last digit DSPy shows."""


class Heat:
    """The race of one candidate against the incumbent. Made by `Contest.heat`.

    Attributes:
        order: the examples' places in the selection set, in the order in which they are to be asked.
        best: the incumbent's mean on the selection set.

    Answers may be told by any thread, in any order. They are looked at in the drawn order, since those that come fast
    may be better or worse than others; what follows a missing one waits for it. Those that come after the decision are
    kept.
    """

    def __init__(
        self,
        order: Sequence[int],
        means: Sequence[float],
        best: float,
        *,
        delta: float,
        margin: float = 0.0,
        spoil: Callable[[float], None] = lambda score: None,
    ) -> None:
        self.order, self.best = list(order), best
        self._means, self._delta, self._spoil = means, delta, spoil
        n = len(self.order)
        self._least = n * (best + margin)  # the sum of scores of somebody at least as good
        self._sure = self._least - 1e-9 * n  # what rounding of sums cannot reach
        self._rest = self._least - math.fsum(means)  # what the differences must add up to, from here on
        # Looking back from the end: the largest difference among the examples that are still to come.
        self._reach = [0.0] * n
        largest = -math.inf
        for at in range(n - 1, -1, -1):
            largest = max(largest, 1.0 - means[self.order[at]])
            self._reach[at] = largest
        spread = math.fsum(mean * (1 - mean) for mean in means) / n
        self._variance = max(spread, 0.01)
        self._squares = PSEUDO * self._variance
        self._told: dict[int, float] = {}
        self._failed: set[int] = set()
        self._at, self._points, self._differences = 0, 0.0, 0.0
        self._followed = 1.0 - ON_FIXED
        self._fixed = [ON_FIXED / len(FIXED)] * len(FIXED)
        self._lost, self._stopped = False, False
        self._lock = threading.Lock()

    def tell(self, index: int, score: float) -> None:
        """The candidate's score on an example. What was told first counts.

        Args:
            index: the example's place in the selection set.
            score: from 0 to 1; another one, or one that is no number, ends racing.
        """
        score = float(score)
        if not 0 <= score <= 1:
            self.stop()
            self._spoil(score)
            return
        with self._lock:
            if index not in self._told and index not in self._failed:
                self._told[index] = score
                self._look()

    def fail(self, index: int) -> None:
        """There is no score for this example, since asking failed. It never counts against the candidate: the bets take
        it for a perfect answer."""
        with self._lock:
            if index not in self._told and index not in self._failed:
                self._failed.add(index)
                self._look()

    def stop(self) -> None:
        """Drop the candidate no more, if it was not yet."""
        self._stopped = True

    @property
    def dropped(self) -> bool:
        """Whether the candidate is given up, so that no more examples need be asked. Where answers that were on their
        way made it complete all the same, it is not: its score is known."""
        return self._lost and len(self._told) + len(self._failed) < len(self.order)

    @property
    def money(self) -> float:
        """What the bettor has made of 1; the candidate is dropped where it reaches `1 / delta`."""
        return self._followed + sum(self._fixed)

    @property
    def answered(self) -> dict[int, float]:
        """The scores so far, by the example's place in the selection set."""
        with self._lock:
            return dict(self._told)

    @property
    def looked(self) -> int:
        """How many examples were asked, those included that failed."""
        with self._lock:
            return len(self._told) + len(self._failed)

    @property
    def predicted(self) -> float:
        """The mean that is expected on the whole selection set. Of a dropped candidate it stays below the incumbent's,
        so that no optimizer takes it for the better one."""
        with self._lock:
            told = self._told
            rest = len(self.order) - len(told)
            if not rest:
                return math.fsum(told.values()) / len(told)
            missing = [mean for index, mean in enumerate(self._means) if index not in told]
            seen = math.fsum(score - self._means[index] for index, score in told.items())
            mean = seen / (len(told) + self._variance / PRIOR_SD**2)
            rest_score = math.fsum(min(1.0, max(0.0, each + mean)) for each in missing)
            predicted = (math.fsum(told.values()) + rest_score) / len(self.order)
            return max(0.0, min(predicted, self.best - BELOW)) if self._lost else predicted

    def _look(self) -> None:
        """Bet on the answers that are next in the drawn order."""
        order, n = self.order, len(self.order)
        while self._at < n and not self._lost and not self._stopped:
            index = order[self._at]
            if index in self._failed:
                score = 1.0
            elif index in self._told:
                score = self._told[index]
            else:
                return
            self._bet(score - self._means[index])
            self._at += 1
            self._points += score
            hopeless = self._at < n and self._points + (n - self._at) < self._sure
            self._lost = hopeless or self.money >= 1.0 / self._delta

    def _bet(self, difference: float) -> None:
        # The mean of the differences to come, were the candidate exactly as good as the incumbent.
        at = self._at
        mean = self._rest / (len(self.order) - at)
        room = self._reach[at] - mean
        if room > 1e-12:
            largest = LARGEST / room
            edge = mean - self._differences / (at + self._variance / PRIOR_SD**2)
            variance = self._variance
            follow = min(largest, edge / (variance + edge * edge)) if edge > 0 else 0.0
            gain = mean - difference
            self._followed *= 1.0 + follow * gain
            for each, share in enumerate(FIXED):
                self._fixed[each] *= 1.0 + share * largest * gain
        self._rest -= difference
        self._differences += difference
        self._squares += difference * difference
        count = PSEUDO + at + 1
        centre = self._differences / count
        self._variance = max(self._squares / count - centre * centre, 1e-4)

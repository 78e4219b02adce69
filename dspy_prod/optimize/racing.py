"""Racing: a program that cannot become the best is not evaluated to the end, and the best one is almost never lost.

Optimizers hand over one candidate at a time, when the best program so far is known completely. So each new one runs a
heat against that incumbent alone. Its examples are drawn in an order of its own, and after each answer a bettor stakes
money against "this one is at least as good as the incumbent". If that is true, the game is fair or worse for him, and
he multiplies his money by 10 at most one time in ten, however often it is counted (Ville's inequality). So where he
does, the candidate is dropped. The bets are those of Waudby-Smith and Ramdas, "Estimating means of bounded random
variables by betting" (2023), for drawing without replacement. They are placed on the answers less what earlier
candidates lead to expect of each example, which takes most of the noise away.
"""

from __future__ import annotations

import math
import random
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Raced:
    """What racing did in a run.

    Attributes:
        delta: with this probability at most, over the shuffles, the best program was dropped.
        margin: by so much a program had to be better for that promise to hold.
        evaluated: answers that were asked for, of complete evaluations and of heats.
        saved: answers that were not.
        dropped: how many candidates were dropped.
    """

    delta: float
    margin: float
    evaluated: int
    saved: int
    dropped: int


class Contest:
    """The races of a run: the complete evaluations so far, and a heat for each candidate that comes.

    What is promised: with a probability of at least `1 - delta`, the program that full evaluation of everything would
    have picked is not dropped. At `delta=0.1`: at least nine times in ten, you get the very program that you would have
    got without racing. It holds exactly, for any scores from 0 to 1, however alike the candidates are and however many
    there are: only the best one's own heat can lose it. It is about candidates as they came. An optimizer that makes
    new candidates out of the scores of earlier ones (MIPROv2, COPRO) may make others when it sees predicted scores.

    The promise needs scores from 0 to 1. When another one is seen, racing ends and `warning` says so.

    Args:
        n: how many examples the selection set has.
        delta: how likely the best program may be lost, over 0 and under 1.
        margin: programs that are better by less than this may be dropped, from 0; 0.01 is a point.
        seed: of the orders in which examples are drawn. Equal seeds and keys draw alike.

    Raises:
        ValueError: an argument is out of its range.

    Example:
        >>> contest = Contest(3, delta=0.1)
        >>> contest.complete("given", [1.0, 1.0, 1.0])
        >>> heat = contest.heat("other")
        >>> heat.tell(heat.order[0], 0.0)  # even two perfect answers would not help
        >>> heat.dropped, contest.saved
        (True, 2)
    """

    def __init__(self, n: int, *, delta: float, margin: float = 0.0, seed: int = 0) -> None:
        if n < 1:
            raise ValueError(f"n must be at least 1, not {n}: a race needs examples")
        if not 0 < delta < 1:
            raise ValueError(f"delta must lie between 0 and 1, not {delta}: racing=0.9 means delta=0.1")
        if not margin >= 0:
            raise ValueError(f"margin must be 0 or more, not {margin}")
        self.n, self.delta, self.margin, self.seed = n, delta, margin, seed
        self.warning: str | None = None
        self._rows: dict[str, list[float]] = {}
        self._heats: dict[str, Heat] = {}
        self._summaries: dict[str, tuple[int, tuple[dict[int, float], float]]] = {}
        self._lock = threading.RLock()

    def complete(self, key: str, row: Sequence[float]) -> None:
        """A candidate was evaluated on every example.

        Args:
            key: what identifies the candidate.
            row: its scores, in the order of the selection set.

        Raises:
            ValueError: the row has another length than the selection set.
        """
        if len(row) != self.n:
            raise ValueError(f"row has {len(row)} scores, but the selection set has {self.n} examples")
        with self._lock:
            for score in row:
                if not 0 <= score <= 1:
                    self._spoil(score)
                    return
            self._rows[key] = [float(score) for score in row]

    def heat(self, key: str) -> Heat | None:
        """The heat of a candidate that is to be evaluated; None when it must be evaluated completely.

        That is so while nobody else is complete, when it is complete itself, after a score outside 0 to 1, and when it
        had a heat that neither dropped it nor came to its end: a second chance to lose would break the promise. A
        candidate that was dropped before gets the same heat again, which is over.
        """
        with self._lock:
            if self.warning or not self._rows or key in self._rows:
                return None
            known = self._heats.get(key)
            if known is not None:
                return known if known.dropped else None
            means, best = self._expected(), max(math.fsum(row) for row in self._rows.values()) / self.n
            order = list(range(self.n))
            random.Random(f"{self.seed}/{key}").shuffle(order)
            heat = Heat(order, means, best, delta=self.delta, margin=self.margin, spoil=self._spoil)
            self._heats[key] = heat
            return heat

    @property
    def saved(self) -> int:
        """How many evaluations of an example were not made."""
        return self.raced.saved

    @property
    def raced(self) -> Raced:
        """What racing did so far."""
        with self._lock:
            heats = {key: heat for key, heat in self._heats.items() if key not in self._rows}
            looked = {key: heat.looked for key, heat in heats.items()}
            dropped = [key for key, heat in heats.items() if heat.dropped]
            return Raced(
                delta=self.delta,
                margin=self.margin,
                evaluated=len(self._rows) * self.n + sum(looked.values()),
                saved=sum(self.n - looked[key] for key in dropped),
                dropped=len(dropped),
            )

    def _expected(self) -> list[float]:
        """What a new candidate is expected to score on each example: the level of the earlier ones, and how each
        example differs from it, shrunk as by one more candidate to whom all examples are alike."""
        rows = [(dict(enumerate(row)), math.fsum(row) / self.n) for row in self._rows.values()]
        rows += [self._summary(key) for key, heat in self._heats.items() if key not in self._rows and heat.looked]
        level = math.fsum(mean for _, mean in rows) / len(rows)
        sums, counts = [0.0] * self.n, [1] * self.n
        for row, mean in rows:
            for index, score in row.items():
                sums[index] += score - mean
                counts[index] += 1
        return [level + total / count for total, count in zip(sums, counts, strict=True)]

    def _summary(self, key: str) -> tuple[dict[int, float], float]:
        heat = self._heats[key]
        known = self._summaries.get(key)
        if known is None or known[0] != heat.looked:
            known = self._summaries[key] = heat.looked, (heat.answered, heat.predicted)
        return known[1]

    def _spoil(self, score: float) -> None:
        with self._lock:
            if self.warning is None:
                self.warning = (
                    f"racing ended: it needs scores from 0 to 1, and the metric gave {score!r}. All candidates are "
                    "evaluated completely from now on. Scale the metric, or leave racing out"
                )
            for heat in self._heats.values():
                heat.stop()


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
        """Whether the candidate is given up, so that no more examples need be asked."""
        return self._lost

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

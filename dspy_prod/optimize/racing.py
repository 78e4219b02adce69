"""Racing: a program that cannot become the best is not evaluated to the end, and the best one is almost never lost.

Optimizers hand over one candidate at a time, when the best program so far is known completely. So each new one runs a
heat against that incumbent alone. Its examples are drawn in an order of its own, and after each answer a bettor stakes
money against "this one is at least as good as the incumbent". If that is true, the game is fair or worse for him, and
he multiplies his money by 10 at most one time in ten, however often it is counted (Ville's inequality). So where he
does, the candidate is dropped. How he bets is in `heat`.
"""

from __future__ import annotations

import math
import random
import threading
from collections.abc import Sequence
from dataclasses import dataclass

from dspy_prod.optimize.heat import Heat

__all__ = ["Contest", "Heat", "Raced"]


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

"""What proposers and judges say in a rehearsal: real answers to a few questions of each kind, given to all others."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable
from typing import Any, Final

from dspy_prod.optimize.pilot import Kind, Pilot, model_of

REALLY_ASKED: Final = (1, 2, 5, 12, 30)
"""Which questions of one kind a proposer is really asked. Several, because its answers grow with what it is shown."""

RealAnswer = Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]


class Samples:
    """Real answers of proposers and judges, shared by the rehearsals of all seeds.

    Args:
        pilot: what was really answered already. real: asks an LM; None asks nobody.

    Attributes:
        asked: how many questions were really asked.
    """

    def __init__(self, pilot: Pilot, real: RealAnswer | None) -> None:
        self._real = real
        self._found: dict[tuple[str, Kind], dict[int, str]] = defaultdict(dict)
        self._lock = threading.Lock()
        self.asked = 0
        for kind, answers in pilot.others.items():
            for number, answer in enumerate(answers, 1):
                self._found["", kind][number] = answer.text

    def text(self, lm: Any, kind: Kind, number: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
        """What the LM really says to question `number` of its kind, or said to one before; None: nobody knows."""
        known = self._found["", kind] or self._found[model_of(lm), kind]
        if known is self._found[model_of(lm), kind] and number in REALLY_ASKED and number not in known:
            with self._lock:
                if number not in known and self._real is not None:
                    said = self._real(lm, args, kwargs)
                    if said:
                        self.asked += 1
                        known[number] = said
        if not known:
            return None
        earlier = [each for each in known if each <= number]
        return known[max(earlier)] if earlier else known[min(known)]

"""What is done to a fleet while it calls: threads that do one thing after another, drawn by chance."""

from __future__ import annotations

import random
import threading
import traceback
from collections import Counter
from collections.abc import Mapping

from tests.chaos.fleet.fleet import Fleet
from tests.chaos.fleet.stores import Injection


def killed(fleet: Fleet, dice: random.Random, over: threading.Event) -> None:
    """A worker is killed, and replaced."""
    fleet.kill(dice)


def stopped(fleet: Fleet, dice: random.Random, over: threading.Event) -> None:
    """A worker stands still for seconds."""
    fleet.pause(dice, dice.uniform(1.0, 10.0), over)


class Trouble:
    """Threads that trouble a fleet.

    Attributes:
        faults: how often each thing was done.
        failures: what went wrong with the doing.
    """

    def __init__(self, fleet: Fleet) -> None:
        self.faults: Counter[str] = Counter()
        self.failures: list[str] = []
        self._fleet = fleet
        self._over = threading.Event()
        self._threads: list[threading.Thread] = []

    def begin(
        self, kinds: Mapping[str, Injection], dice: random.Random, pauses: tuple[float, float], most: int = 1_000_000
    ) -> None:
        """Do `most` of these, one after another, with pauses between them; each kind comes before any comes again."""

        def live() -> None:
            left: list[str] = []
            done = 0
            while done < most and not self._over.wait(dice.uniform(*pauses)):
                left = left or dice.sample(list(kinds), len(kinds))
                kind = left.pop()
                self.faults[kind] += 1
                done += 1
                try:
                    kinds[kind](self._fleet, dice, self._over)
                except Exception:
                    self.failures.append(f"{kind}: {traceback.format_exc()[-1_500:]}")

        if kinds:
            self._threads.append(threading.Thread(target=live, daemon=True))
            self._threads[-1].start()

    def end(self) -> None:
        """Undo what is being done, and do no more."""
        self._over.set()
        for thread in self._threads:
            thread.join(60)
            if thread.is_alive():
                self.failures.append("a fault did not end")

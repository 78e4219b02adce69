"""The circuit of a route as all workers share it: a row of the store's board, and every change of it.

These are the moves of `transitions.py`, each decided on the row as it is then, so that of several workers that see the
same failure one moves the circuit. What each worker counts while the circuit is closed stays with the worker.

A row:
- `at`, `n`: store time of the latest change, and how many there were; of two rows the later holds.
- `state` (closed, open or half_open), `generation` (one more with every move), `cause`.
- `since`, `until`: when it opened, and until when it is, in store time. `interval`: seconds of the next trip.
- `probes`: those that are out, over all workers: id to the end of its lease. `successes`, `slow`: of those that ended.
- `model`, `place`: what an operator calls it by.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, NamedTuple

from dspy_prod.options import CircuitBreaker
from dspy_prod.stores.board import Change, Decide, Row

KIND: Final = "circuit"

SLACK: Final = 0.05
"""Seconds by which two workers' readings of the store's time may differ."""


class Whose(NamedTuple):
    """Of what route a circuit is, and who moves it."""

    model: str
    place: str
    worker: str


def generation(row: Row | None) -> int:
    """The number of moves a row has seen; 0 of none."""
    return 0 if row is None else int(row["generation"])


def state(row: Row | None) -> str:
    """The state that a row tells; a circuit that nobody has moved is closed."""
    return "closed" if row is None else str(row["state"])


def order(row: Row) -> tuple[float, int]:
    """Of two rows the one with the higher order is the later."""
    return float(row["at"]), int(row["n"])


def stamped(decide: Decide, row: Row | None, now: float) -> Change | None:
    """What `decide` makes of a row, with its order."""
    change = decide(row, now)
    if change is None or change.row is None:
        return change
    at, n = (now, 0) if row is None else order(row)
    return change._replace(row={**change.row, "at": max(at, now), "n": n + 1})


class Moves:
    """The changes of one circuit, each a `Decide` of the board once its first arguments are bound."""

    def __init__(self, options: CircuitBreaker, whose: Whose) -> None:
        self._options = options
        self._whose = whose

    def trip(
        self, known: int, cause: str, interval: float, following: float, row: Row | None, now: float
    ) -> Change | None:
        """A worker has seen too many failures; nothing where another one has moved the circuit before.

        Args:
            known: the row's generation that the worker knows.
            interval, following: seconds to stay open now, and with the next trip in a row.
        """
        if generation(row) != known or state(row) != "closed":
            return None
        return self._opened(row, cause, interval, following, now)

    def claim(self, probe: int, row: Row | None, now: float) -> Change | None:
        """Take a probe, where the circuit is open long enough, or half-open with a probe to spare.

        It is taken if the row that comes back has it.
        """
        if row is None or state(row) == "closed":
            return None
        probes: Mapping[str, float] = {}
        moved = state(row) == "open"
        if moved:
            if row["until"] - now > SLACK:
                return None
        else:
            probes = row["probes"]
            hung = sum(end - now <= SLACK for end in probes.values())
            if hung:
                return self.overdue(row, now)
            if len(probes) >= self._options.half_open_probes:
                return None
        probes = {**probes, str(probe): now + self._options.probe_lease}
        if not moved:
            return Change({**row, "probes": probes})
        known = generation(row) + 1
        fresh = {**row, "state": "half_open", "generation": known, "probes": probes, "successes": 0, "slow": 0}
        return Change(fresh, self._note("half-open", row["cause"]))

    def overdue(self, row: Row | None, now: float, interval: float | None = None) -> Change | None:
        """Re-open where a probe's lease has run out: it hangs, or its worker died."""
        if row is None or state(row) != "half_open":
            return None
        if not any(end - now <= SLACK for end in row["probes"].values()):
            return None
        cause = f"a probe did not report within {self._options.probe_lease:g} s"
        return self._opened(row, cause, interval or row["interval"], self._following(row), now)

    def succeeded(self, probe: int, is_slow: bool, jittered: float, row: Row | None, now: float) -> Change | None:
        """A probe was answered."""
        left = self._left(probe, row)
        if left is None:
            return None
        assert row is not None
        options = self._options
        successes, slow = row["successes"] + 1, row["slow"] + is_slow
        if successes < options.success_threshold:
            return Change({**row, "probes": left, "successes": successes, "slow": slow})
        if slow and slow / successes >= options.slow_call_rate:
            cause = f"{slow} of {successes} probes took over {options.slow_call_duration:g} s"
            return self._opened(row, cause, row["interval"] * jittered, self._following(row), now)
        return _closed(row, self._note("closed", f"{successes} probes succeeded"))

    def failed(
        self, probe: int, cause: str, interval: float, following: float, row: Row | None, now: float
    ) -> Change | None:
        """A probe failed: the circuit opens again."""
        if row is None or self._left(probe, row) is None:
            return None
        return self._opened(row, cause, interval, following, now)

    def released(self, probe: int, row: Row | None, now: float) -> Change | None:
        """A probe ended in a way that says nothing."""
        left = self._left(probe, row)
        return None if left is None or row is None else Change({**row, "probes": left})

    def _left(self, probe: int, row: Row | None) -> dict[str, float] | None:
        """The other probes; None where this one is none any more: it was written off, or the circuit was moved."""
        if row is None or state(row) != "half_open" or str(probe) not in row["probes"]:
            return None
        return {each: end for each, end in row["probes"].items() if each != str(probe)}

    def _following(self, row: Row) -> float:
        return min(2 * float(row["interval"]), self._options.max_recovery_timeout)

    def _opened(self, row: Row | None, cause: str, interval: float, following: float, now: float) -> Change:
        fresh: dict[str, Any] = {
            "state": "open", "generation": generation(row) + 1, "cause": cause, "since": now, "until": now + interval,
            "interval": following, "probes": {}, "successes": 0, "slow": 0, "model": self._whose.model,
            "place": self._whose.place,
        }  # fmt: skip
        return Change(fresh, self._note("opened", cause))

    def _note(self, what: str, cause: str) -> tuple[str, str, str, str]:
        return what, self._whose.model, self._whose.worker, cause


def reset(by: str, reason: str, row: Row | None, now: float) -> Change | None:
    """An operator closes a circuit, whatever its settings."""
    if row is None or state(row) == "closed":
        return None
    return _closed(row, ("closed", str(row["model"]), by, reason))


def _closed(row: Row, note: tuple[str, str, str, str]) -> Change:
    fresh = {
        **row, "state": "closed", "generation": generation(row) + 1, "cause": "", "probes": {}, "successes": 0,
        "slow": 0, "interval": None,
    }  # fmt: skip
    return Change(fresh, note)

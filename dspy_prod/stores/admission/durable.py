"""What a durable store asks of its core when another process wrote, the file is gone, or a batch is not committed."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping

from dspy_prod.stores.admission.granting import Granting, shared
from dspy_prod.stores.admission.holds import Hold
from dspy_prod.stores.base import PENDING, AccountState, Reservation

_NOTHING: Mapping[str, AccountState] = {}


def held_by(holds: Iterable[Hold]) -> dict[str, int]:
    """Nano-USD that these hold, by account."""
    held: dict[str, int] = {}
    for hold in holds:
        for key in hold.accounts:
            held[key] = held.get(key, 0) + hold.amount
    return held


class Durable(Granting):
    """The core's part for stores that keep `changes`; the memory store uses none of it."""

    def forget(self) -> None:
        """Drop what another process may have changed: accounts and limiters are loaded again when needed."""
        self.accounts.forget()
        self.terms.forget()
        self._guests.clear()
        self._limiters = {key: state for key, state in self._limiters.items() if not shared(state.limit)}

    def carry_over(self, remembered: Mapping[str, AccountState] = _NOTHING) -> None:
        """What the store kept was deleted or replaced while in use: bring along what this process knows of it.

        Args:
            remembered: what accounts held, as far as that is known beside what is in memory here.
        """
        changes, book, backing = self.changes, self.accounts, self._backing
        assert changes is not None
        assert backing is not None
        found = {hold.id: hold for hold in backing.load_own()}  # an older copy counts them among what is held
        own, there = held_by(self.holds.values()), held_by(found.values())
        changes.stray = {id: hold for id, hold in found.items() if id not in self.holds}
        for key in {*book.entries, *own, *there, *remembered}:
            stored = backing.load_account(key) or AccountState()
            known = remembered.get(key, stored)
            entry = book.get(key)
            entry.spent = max(entry.spent, stored.spent, known.spent)
            entry.unconfirmed = max(entry.unconfirmed, stored.unconfirmed, known.unconfirmed)
            entry.held = max(0, stored.held - there.get(key, 0)) + own.get(key, 0)
            book.dirty.add(key)
        self.terms.carry_over()
        changes.added.update(self.holds)
        changes.limiters.update(key for key, state in self._limiters.items() if shared(state.limit))

    def heads(self) -> Iterator[Reservation]:
        """Who is served next, in every line."""
        for line in (*self._lines.values(), *self._parked.values()):
            head = line.head()
            if head is not None:
                yield head

    def serve(self, now: float) -> None:
        """Serve every line: another process may have freed something, or said something."""
        self.terms.look_again()
        for key in list(self._lines):
            self._serve_limiter(key, now)
        for key in list(self._parked):
            self._serve_account(key, now)

    def written(self) -> None:
        """Everything but the verdicts and what they concern is durable, see `Changes`."""
        self.appended.clear()
        self.replaced.clear()
        self.accounts.written()
        self.terms.dirty.clear()

    def again(self, fresh: Collection[Reservation]) -> None:
        """Return to what was last committed, because others changed what this batch was decided on.

        Who had waited before it waits again, in his old place.

        Args:
            fresh: those whom the batch admits; they are in no line, for it is run once more.
        """
        changes = self.changes
        assert changes is not None
        waited = [each for each, _, _ in changes.verdicts if each not in fresh and each.state == PENDING]
        ends = [hold.lease_until for hold in changes.removed.values()]
        self._next_lease = min([self._next_lease, *ends])
        self.undo()
        for reservation in fresh:
            self._leave(reservation)
        for reservation in waited:
            if reservation.limit_key is not None:
                self._line(reservation.limit_key).push(reservation)
            else:
                self._park(reservation, reservation.accounts[0].key)

    def _leave(self, reservation: Reservation) -> None:
        key = reservation.limit_key
        if key is not None and key in self._lines and self._lines[key].remove(reservation):
            return
        for account in reservation.accounts:
            parked = self._parked.get(account.key)
            if parked is not None and parked.remove(reservation):
                if not parked:
                    del self._parked[account.key]
                return

    def undo(self) -> list[Reservation]:
        """Return to what was last committed, because this batch could not be; the reservations it had decided."""
        changes = self.changes
        assert changes is not None
        changes.undo()
        for id in changes.added:
            self.holds.pop(id, None)
        self.holds.update(changes.removed)
        reservations = [reservation for reservation, _, _ in changes.verdicts]
        changes.clear()
        self.appended.clear()
        self.replaced.clear()
        self.accounts.undo()
        self.forget()
        return reservations

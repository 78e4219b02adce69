"""What a durable store asks of its core when another process wrote, the file is gone, or a batch is not committed."""

from __future__ import annotations

from dspy_prod.stores.admission.granting import Granting, shared
from dspy_prod.stores.base import AccountState, Reservation


class Durable(Granting):
    """The core's part for stores that keep `changes`; the memory store uses none of it."""

    def forget(self) -> None:
        """Drop what another process may have changed: accounts and limiters are loaded again when needed."""
        self.accounts.forget()
        self.terms.forget()
        self._guests.clear()
        self._limiters = {key: state for key, state in self._limiters.items() if not shared(state.limit)}

    def carry_over(self) -> None:
        """The file was deleted or replaced while in use: bring along what this process knows of it."""
        changes, book, backing = self.changes, self.accounts, self._backing
        assert changes is not None
        assert backing is not None
        own: dict[str, int] = {}
        for hold in self.holds.values():
            for key in hold.accounts:
                own[key] = own.get(key, 0) + hold.amount
        for key in {*book.entries, *own}:
            stored = backing.load_account(key) or AccountState()
            entry = book.get(key)
            entry.spent = max(entry.spent, stored.spent)
            entry.unconfirmed = max(entry.unconfirmed, stored.unconfirmed)
            entry.held = stored.held + own.get(key, 0)
            book.dirty.add(key)
        self.terms.carry_over()
        changes.added.update(self.holds)
        changes.limiters.update(key for key, state in self._limiters.items() if shared(state.limit))

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
        self.accounts.dirty.clear()
        self.terms.dirty.clear()

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
        self.forget()
        return reservations

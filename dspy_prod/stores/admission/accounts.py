"""Budget accounts: what is spent, held and unconfirmed, in nano-USD. Part of the admission core."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from heapq import nlargest
from math import inf
from typing import Final

from dspy_prod.stores.base import Account, AccountState

PRUNE_AFTER: Final = 7200.0
"""Seconds for which an account is kept after its window has ended for sure (late settlements still find it)."""

PRUNED_AT_ONCE: Final = 2_000
"""Accounts looked at in one step; calls wait for it."""

NOTED_FOR: Final = 3600.0
"""Seconds after which it is noted again that an account is in use. Less than `PRUNE_AFTER`, which makes up for it."""

_MOST_NOTED: Final = 50_000


class AccountEntry:
    """One account.

    Attributes:
        ends_at: store time at which its window has ended, whatever is done to the wall clock; `inf` while unknown.
        note_at: store time from which a use of it moves `ends_at`.
    """

    __slots__ = ("ends_at", "held", "note_at", "spent", "unconfirmed")

    def __init__(self) -> None:
        self.spent = 0
        self.held = 0
        self.unconfirmed = 0
        self.ends_at = inf
        self.note_at = -inf


class AccountBook:
    """The accounts a core has in memory; `load` finds the ones that a durable store has on disk.

    `dirty` collects the keys a durable store has to write back.
    """

    def __init__(self, load: Callable[[str], AccountState | None] | None) -> None:
        self._load = load
        self.entries: dict[str, AccountEntry] = {}
        self.dirty: set[str] = set()
        self._unseen: list[str] = []  # by the round of `prune` that is under way
        self._noted: dict[str, tuple[float, float]] = {}  # `note_at` and `ends_at`, also of what is not in memory
        self._unwritten: list[str] = []  # noted in the batch that is under way

    def get(self, key: str) -> AccountEntry:
        """The account, loaded or new."""
        entry = self.entries.get(key)
        if entry is None:
            entry = AccountEntry()
            stored = self._load(key) if self._load is not None else None
            if stored is not None:
                entry.spent, entry.held, entry.unconfirmed = stored
            self.entries[key] = entry
        return entry

    def use(self, account: Account, now: float) -> None:
        """Note that a call draws on an account: from now on its window lasts as long as a whole one at most.

        How much of it is left by the wall clock does not count, because that clock may be set back: what was spent
        would be forgotten within the same window, and could be spent once more.
        """
        entry = self.get(account.key)
        if now <= entry.note_at:
            return
        noted = self._noted.get(account.key)
        if noted is not None and now <= noted[0]:  # only forgotten in memory since
            entry.note_at, entry.ends_at = noted
            return
        ends_at = now + account.ends_in
        entry.note_at = now + NOTED_FOR
        entry.ends_at = ends_at if entry.ends_at == inf else max(entry.ends_at, ends_at)
        if self._load is None or ends_at == inf:
            return
        if len(self._noted) >= _MOST_NOTED:
            self._noted.clear()
        self._noted[account.key] = entry.note_at, entry.ends_at
        self._unwritten.append(account.key)
        if entry.spent or entry.held:  # also where the call is refused
            self.dirty.add(account.key)

    def state(self, key: str) -> AccountState:
        """What the account holds; an unknown one holds nothing, and is not created."""
        entry = self.entries.get(key)
        if entry is not None:
            return AccountState(entry.spent, entry.held, entry.unconfirmed)
        stored = self._load(key) if self._load is not None else None
        return stored or AccountState()

    def hold(self, keys: tuple[str, ...], amount: int) -> tuple[int, ...]:
        """Reserve on each account; what each has spent so far, without what is held."""
        spent = []
        for key in keys:
            entry = self.entries[key]
            entry.held += amount
            spent.append(entry.spent)
        if self._load is not None:
            self.dirty.update(keys)
        return tuple(spent)

    def charge(self, keys: tuple[str, ...], held: int, cost: int, estimated: bool) -> None:
        """Turn a reservation of `held` into a charge of `cost`."""
        for key in keys:
            entry = self.get(key)
            entry.spent += cost
            entry.held = max(0, entry.held - held)
            if estimated:
                entry.unconfirmed += cost
        if self._load is not None:
            self.dirty.update(keys)

    def mend(self, keys: tuple[str, ...], was: int, was_estimated: bool, cost: int, estimated: bool) -> None:
        """Replace an earlier charge of `was`; accounts that are forgotten since their window ended stay so."""
        for key in keys:
            if key not in self.entries and (self._load is None or self._load(key) is None):
                continue
            entry = self.get(key)
            entry.spent += cost - was
            entry.unconfirmed += (cost if estimated else 0) - (was if was_estimated else 0)
            if self._load is not None:
                self.dirty.add(key)

    def prune(self, now: float, keep: Collection[str]) -> bool:
        """Forget accounts whose window ended, so that memory does not grow with users times days.

        Looks at `PRUNED_AT_ONCE` accounts; True when it has not yet come round to all.
        """
        old, unseen = now - PRUNE_AFTER, self._unseen
        if not unseen:
            unseen.extend(self.entries)
        for _ in range(min(PRUNED_AT_ONCE, len(unseen))):
            key = unseen.pop()
            entry = self.entries.get(key)
            over = entry is not None and entry.ends_at < old and not entry.held
            if over and key not in keep and key not in self.dirty:
                del self.entries[key]
        return bool(unseen)

    def drop(self, prefix: str) -> None:
        """Forget the accounts whose keys begin so, those excepted that hold something."""
        for key in [key for key, entry in self.entries.items() if key.startswith(prefix) and not entry.held]:
            del self.entries[key]
            self.dirty.discard(key)

    def written(self) -> None:
        """What was to be written back is durable."""
        self.dirty.clear()
        self._unwritten.clear()

    def undo(self) -> None:
        """What was to be written back is not: it is noted again by whoever comes next."""
        for key in self._unwritten:
            self._noted.pop(key, None)
        self._unwritten.clear()

    def forget(self) -> None:
        """Drop everything: a durable store's accounts are loaded again when needed."""
        self.entries.clear()
        self.dirty.clear()
        self._unseen.clear()


def worst(known: Iterable[tuple[str, AccountEntry]], prefix: str, suffix: str, most: int) -> list[str]:
    """The keys that begin and end so, of those accounts that spent most first. Needs no lock if `known` is a copy."""
    found = [item for item in known if item[0].startswith(prefix) and item[0].endswith(suffix)]
    return [key for key, _ in nlargest(most, found, key=lambda item: item[1].spent)]

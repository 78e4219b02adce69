"""What a core changed, and what it was decided on, as one commit says it."""

from __future__ import annotations

from math import isinf
from typing import Any, Final

from dspy_prod.privacy.visible import carried
from dspy_prod.stores.admission.accounts import PRUNE_AFTER, AccountEntry
from dspy_prod.stores.admission.core import AdmissionCore
from dspy_prod.stores.admission.granting import shared
from dspy_prod.stores.base import GRANTED, REFUSED
from dspy_prod.stores.keys import BETWEEN
from dspy_prod.stores.redis.asking import KEPT_FOR
from dspy_prod.stores.redis.batch import Batch
from dspy_prod.stores.redis.commits import Commit
from dspy_prod.stores.redis.connection import Connection
from dspy_prod.stores.redis.holds import hold_json, limit_json, terms_json
from dspy_prod.stores.redis.known import Known

KEEP_ABANDONED: Final = 7 * 86_400_000
"""Milliseconds for which a late settlement still replaces the charge of an abandoned hold."""
_MOST: Final = 2**63 - 1
_EXACT: Final = 2**52
"""Nano-USD from which on Lua's numbers do not tell whether a limit suffices."""
_FIELDS: Final = 1000
_FOR_EVER: Final = 0
_UNKNOWN: Final = -1


class Changed:
    """Adds what a core changed to a commit.

    Args:
        connection: whose namespace it is. owner: the process. known: what the core was told.
        batch, commit: what is added to.
    """

    def __init__(self, connection: Connection, owner: str, known: Known, batch: Batch, commit: Commit) -> None:
        self._connection = connection
        self._owner = owner
        self._known = known
        self._batch = batch
        self._commit = commit

    def add(self, core: AdmissionCore, now: float) -> None:
        """Everything but what stands in the ledger."""
        changes, commit = core.changes, self._commit
        assert changes is not None
        self._limiters(core, commit)
        self._accounts(core, now, commit)
        self._terms(core, commit)
        self._holds(core)
        for id in changes.forgiven:
            key = self._connection.key("abandoned", id)
            commit.forgiven.append(commit.key(key))
            self._batch.call("DEL", key)
        for hold in changes.abandoned.values():
            self._batch.call("SET", self._connection.key("abandoned", hold.id), hold_json(hold), "PX", KEEP_ABANDONED)

    def _accounts(self, core: AdmissionCore, now: float, commit: Commit) -> None:
        changes, book = core.changes, core.accounts
        assert changes is not None
        bounds = dict(changes.bounds)
        # What is held never falls below nothing, so what is taken off for the dead must be seen in it first.
        exact: set[str] = set(book.dirty) if changes.reaped or changes.stray is not None else set()
        for reservation, state, refusal in changes.verdicts:
            if state == GRANTED and reservation.share is None:
                for account in reservation.accounts:
                    limit = core.terms.limit(account)
                    bounds[account.key] = min(limit, bounds.get(account.key, limit))
            elif state == REFUSED and refusal is not None and refusal.reason == "budget_exceeded":
                exact.update(account.key for account in reservation.accounts)
        for key in {*book.dirty, *exact}:
            entry = book.entries.get(key) if key in book.dirty else None
            self._account(key, entry, key in exact, bounds.get(key), now)

    def _account(self, key: str, entry: AccountEntry | None, exact: bool, bound: int | None, now: float) -> None:
        """One that changed (`entry`), or that a decision went by: it must be as it was, or suffice for `bound`."""
        known, commit = self._known, self._commit
        *before, version = known.accounts.get(key) or (0, 0, 0, "")
        exact = exact or (bound is not None and bound > _EXACT)
        row: list[Any] = [commit.key(self._connection.key("account", key)), version, exact]
        row.append("" if bound is None or exact else str(bound))
        if entry is None:
            row += ["0", "0", "0", False]
        else:
            after = [max(-_MOST, min(each, _MOST)) for each in (entry.spent, entry.held, entry.unconfirmed)]
            row += [str(new - old) for new, old in zip(after, before, strict=True)]
            window, (lasts, ends_at) = known.window(key), _lasts(key, entry.ends_at, now)
            row += [lasts, carried(key), 0 if window is None else commit.key(window), ends_at]
        commit.contends = commit.contends or exact or bound is not None
        commit.accounts.append(row)
        commit.names.append(key)

    def _limiters(self, core: AdmissionCore, commit: Commit) -> None:
        changes = core.changes
        assert changes is not None
        for key in changes.limiters:
            state = core.limiter_state(key)
            if state is not None and shared(state.limit):
                told, settings = state.dump(), limit_json(state.limit)
                self._limiter(key, commit, commit.text(told), commit.text(settings))
                commit.limits.append((key, told, settings))
        for reservation, verdict, refusal in changes.verdicts:
            late = verdict == REFUSED and refusal is not None and refusal.reason == "rate_limited"
            name = reservation.limit_key
            if late and name is not None and name not in changes.limiters and name in self._known.limiters:
                self._limiter(name, commit, 0, 0)
                commit.limits.append((name, b"", b""))

    def _limiter(self, key: str, commit: Commit, *places: int) -> None:
        row = self._known.limiters.get(key)
        commit.limiters.append(
            [commit.key(self._connection.key("limiter", key)), "" if row is None else row[2], *places]
        )
        commit.contends = True

    def _terms(self, core: AdmissionCore, commit: Commit) -> None:
        for title in core.terms.dirty:
            terms = core.terms.find(title)
            if terms is not None:
                commit.told = True
                self._batch.call("HSET", self._connection.key("terms"), carried(title), terms_json(terms))

    def _holds(self, core: AdmissionCore) -> None:
        changes = core.changes
        assert changes is not None
        single, several = (self._connection.key(kind, self._owner) for kind in ("holds", "drawn"))
        for id, hold in (*changes.removed.items(), *(changes.stray or {}).items()):
            self._batch.call("HDEL", single if hold.drawn is None else several, carried(id))
        kept = {single: [], several: []}  # type: dict[str, list[bytes | str]]
        for hold in (*changes.added.values(), *(each for each in changes.resized if each.id not in changes.added)):
            if hold.id in core.holds:
                kept[single if hold.drawn is None else several] += (carried(hold.id), hold_json(hold))
        for key, pairs in kept.items():
            for at in range(0, len(pairs), _FIELDS):
                self._batch.call("HSET", key, *pairs[at : at + _FIELDS])
            if pairs:
                self._batch.call("EXPIRE", key, KEPT_FOR)


def _lasts(key: str, ends_at: float, now: float) -> tuple[int, float]:
    """Milliseconds for which an account is kept, and when its window may be taken to have ended.

    What counts for ever is kept for ever. What counts for a run is kept as the run is: its keys begin with no budget's
    name where they are of the run's own caps. Of any other the end is not known here: it keeps the one that it has.
    """
    if isinf(ends_at):
        window, ends_at = key.rpartition(BETWEEN)[2], now + KEPT_FOR
        if window == "total":
            return _FOR_EVER, ends_at
        if window not in ("run", "call") and not key.startswith(BETWEEN):
            return _UNKNOWN, ends_at
    ends_at = max(ends_at, now)
    return int((ends_at + PRUNE_AFTER - now) * 1000), ends_at

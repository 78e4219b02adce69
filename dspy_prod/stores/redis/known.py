"""What a process knows of what is in Redis, and how new that is."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Final

from dspy_prod.errors import StoreUnavailableError
from dspy_prod.options import RateLimit
from dspy_prod.stores.admission.core import AdmissionCore
from dspy_prod.stores.base import AccountState, Terms
from dspy_prod.stores.redis.accounts import FIELDS, beginning, state_of, window_of
from dspy_prod.stores.redis.asking import KEPT_FOR
from dspy_prod.stores.redis.commits import Commit
from dspy_prod.stores.redis.connection import Connection
from dspy_prod.stores.redis.holds import limit_of, terms_of
from dspy_prod.stores.redis.timing import RedisTime

META: Final = ("born", "n", "terms")
_SPARE: Final = 10_000
_UNKNOWN: Final = "?"
"""In place of a version: it was changed since, and by how much is not known."""


class Known:
    """Accounts, limiters and terms as the server told them last.

    Attributes:
        accounts: spent, held, unconfirmed and version, by key; an empty version: there is none.
        limiters: state, settings and version, by key; None where there is none.
        terms: by the titles of budgets.
        news: something is other than what the core has in memory.
    """

    def __init__(self, connection: Connection, timing: RedisTime) -> None:
        self.accounts: dict[str, tuple[int, int, int, str]] = {}
        self.limiters: dict[str, tuple[bytes, bytes, str] | None] = {}
        self.terms: dict[str, Terms] = {}
        self.news = False
        self._connection = connection
        self._timing = timing
        self._meta = connection.key("meta")
        self._born = self._lost = ""  # which data it is, and which was known when it was lost
        self._seen = self._fresh = 0  # the newest commit heard of; up to which nothing known here is old
        self._current: set[tuple[str, str]] = set()  # what was read when the newest commit heard of was ...
        self._current_at = 0
        self._terms = self._newest_terms = ""  # versions: of what is known, and the newest heard of

    # -- which data it is ----------------------------------------------------------------------------------------------
    def open(self, born: str) -> bool:
        """Hear which data the server has, `born` where it has none; False where it is not what is known here."""
        self._read(("PING",))  # to connect takes longer than to answer, and would tell the time less well
        key, sent = self._meta, self._timing.monotonic()
        _, _, meta, time = self._read(
            ("HSETNX", key, "born", born), ("EXPIRE", key, KEPT_FOR), ("HMGET", key, *META), ("TIME",)
        )
        self._timing.heard(*_parts(time), sent)
        born, n, terms = _text(meta[0]), int(meta[1] or 0), _text(meta[2])
        if self._born and (born != self._born or n < self._seen):
            return False
        self._born, self._seen = born, n
        if not self.accounts and not self.limiters:
            self._fresh = n
        self._hear_terms(terms)
        return True

    def lose(self) -> dict[str, AccountState]:
        """All of it was another's; what accounts held there."""
        before = {key: AccountState(*row[:3]) for key, row in self.accounts.items() if row[3]}
        self.accounts.clear()
        self.limiters = {key: (*row[:2], "") for key, row in self.limiters.items() if row is not None}
        self.terms.clear()
        self._lost = self._born or self._lost
        self._born = self._terms = self._newest_terms = ""
        self._seen = self._fresh = 0
        self.news = True
        return before

    @property
    def older(self) -> bool:
        """Whether the server has an older copy of what was lost. Who writes to it first gives it another name.

        Else it would soon be as new as what other processes have seen, and they would not notice.
        """
        return bool(self._lost) and self._born == self._lost

    def named(self, born: str) -> None:
        """The server's data has another name now."""
        self._born, self._lost = born, ""

    def catch_up(self) -> None:
        """Read the terms of budgets that were said meanwhile."""
        self._hear_terms(self._newest_terms)

    def forget(self) -> None:
        """Keep nothing of what can be read again."""
        self.accounts.clear()
        self.limiters.clear()

    def head(self, terms: bool) -> dict[str, Any]:
        """What the script is told of what is known."""
        return {"born": self._born, "seen": self._seen, "terms": (self._terms or "0") if terms else False}

    # -- reading -------------------------------------------------------------------------------------------------------
    def account(self, key: str) -> AccountState | None:
        row = self.accounts.get(key)
        if row is None:
            self.look([key], [], part=True)
            row = self.accounts[key]
        return AccountState(*row[:3]) if row[3] else None

    def limiter(self, key: str) -> tuple[bytes, RateLimit] | None:
        if key not in self.limiters:
            self.look([], [key], part=True)
        row = self.limiters[key]
        return None if row is None else (row[0], limit_of(row[1]))

    def beginning(self, prefix: str) -> list[tuple[str, AccountState]]:
        return beginning(self._connection, prefix)

    def window(self, key: str) -> str | None:
        return window_of(self._connection, key)

    @property
    def behind(self) -> bool:
        """Whether others have written what is not known here."""
        return self._fresh != self._seen

    def current(self, accounts: Iterable[str], limiters: Iterable[str]) -> bool:
        """Whether nothing newer was heard of since all of these were read."""
        if not self.behind:
            return True
        if self._current_at != self._seen:
            return False
        wanted = (*(("account", key) for key in accounts), *(("limiter", key) for key in limiters))
        return self._current.issuperset(wanted)

    def _have_read(self, accounts: Iterable[str], limiters: Iterable[str]) -> None:
        if self._current_at != self._seen:
            self._current.clear()
            self._current_at = self._seen
        self._current.update(("account", key) for key in accounts)
        self._current.update(("limiter", key) for key in limiters)

    def stale(self) -> bool:
        """Whether others have written meanwhile."""
        (n,) = self._read(("HGET", self._meta, "n"))
        self._seen = max(self._seen, int(n or 0))
        return self.behind or self.news

    def look(
        self, accounts: Sequence[str], limiters: Sequence[str], part: bool = False, turn: tuple[Any, ...] = ("PING",)
    ) -> bool:
        """Read these; False where the server has other data now.

        Args:
            part: others that are known may be old, and still count.
            turn: a command that the server answers when it is our turn.
        """
        key, sent = self._connection.key, self._timing.monotonic()
        _, meta, time, *rows = self._read(
            turn,
            ("HMGET", self._meta, *META),
            ("TIME",),
            *(("HMGET", key("account", each), *FIELDS) for each in accounts),
            *(("HMGET", key("limiter", each), "d", "c", "v") for each in limiters),
        )
        self._timing.heard(*_parts(time), sent)
        born, n = _text(meta[0]), int(meta[1] or 0)
        if born != self._born or n < self._seen:
            return False
        self._seen = n
        if not part:
            self._fresh = n
            self.accounts.clear()
            self.limiters.clear()
            self.news = True
        self._put(accounts, rows[: len(accounts)])
        for each, row in zip(limiters, rows[len(accounts) :], strict=True):
            self._put_limiter(each, row)
        self._have_read(accounts, limiters)
        self._hear_terms(_text(meta[2]))
        return True

    def _put(self, keys: Sequence[str], rows: Sequence[list[Any]]) -> None:
        for key, row in zip(keys, rows, strict=True):
            fresh = (*state_of(key, row), _text(row[3]))
            if self.accounts.get(key) not in (None, fresh):
                self.news = True
            self.accounts[key] = fresh

    def _put_limiter(self, key: str, row: list[Any]) -> None:
        before, fresh = self.limiters.get(key), None if row[2] is None else (row[0], row[1], _text(row[2]))
        if before is not None and before != fresh:
            self.news = True
        self.limiters[key] = fresh

    def _hear_terms(self, version: str) -> None:
        if version == self._terms:
            return
        (rows,) = self._read(("HGETALL", self._connection.key("terms")))
        pairs = rows.items() if isinstance(rows, dict) else zip(rows[::2], rows[1::2], strict=True)
        found = {title.decode("utf-8", "replace"): terms_of(text) for title, text in pairs}
        self.terms = {title: terms for title, terms in found.items() if terms is not None}
        self._terms = self._newest_terms = version
        self.news = True

    def _read(self, *commands: tuple[Any, ...]) -> list[Any]:
        return self._connection.read(commands)

    # -- what an answer to a commit tells ------------------------------------------------------------------------------
    def heard(self, parts: Sequence[bytes], sent: float, own: bool) -> None:
        """The server told its data's version, and its time.

        Args:
            own: the newest commit is ours.
        """
        _, n, terms, seconds, micros = parts
        self._newest_terms = "" if terms == b"0" else _text(terms)
        self._timing.heard(seconds, micros, sent)
        if own and self._fresh == self._seen and int(n) == self._seen + 1:
            self._fresh = int(n)
        self._seen = max(self._seen, int(n))

    def found(self, commit: Commit, terms: bytes, accounts: Sequence[list[Any]], limiters: Sequence[Any]) -> None:
        """Not applied: this is how it is now."""
        self._put(commit.names, accounts)
        for (key, _, _), row in zip(commit.limits, limiters, strict=True):
            if row:
                self._put_limiter(key, row)
        self._have_read(commit.names, [key for key, _, _ in commit.limits])
        self._hear_terms("" if terms == b"0" else _text(terms))

    def wrote(self, commit: Commit, n: str, accounts: Sequence[list[Any]] | None, core: AdmissionCore) -> None:
        """Applied: this is how it is now; without `accounts`, as the core has it, and perhaps others' besides."""
        for place, key in enumerate(commit.names):
            entry = core.accounts.entries.get(key)
            if accounts is not None:
                row = accounts[place]
                try:
                    fresh = (*state_of(key, row), _text(row[3]))
                except StoreUnavailableError:  # who reads it next is told; what was applied, was
                    self.accounts.pop(key, None)
                    self.news = True
                    continue
                if entry is not None and (entry.spent, entry.held, entry.unconfirmed) != fresh[:3]:
                    entry.spent, entry.held, entry.unconfirmed = fresh[:3]
                    self.news = self.news or core.waiting() > 0
                self.accounts[key] = fresh
            elif entry is not None:
                self.accounts[key] = entry.spent, entry.held, entry.unconfirmed, _UNKNOWN
        if len(self.accounts) > 2 * len(core.accounts.entries) + _SPARE:  # the core has forgotten some
            self.accounts = {key: row for key, row in self.accounts.items() if key in core.accounts.entries}
        for key, told, settings in commit.limits:
            if told:
                self.limiters[key] = told, settings, n
        if commit.told:
            self.terms.update({terms.in_force.title: terms for terms in core.terms.all()})
            self._terms = self._newest_terms = n


def _text(value: bytes | None) -> str:
    return "" if value is None else value.decode("utf-8", "replace")


def _parts(time: Any) -> tuple[Any, Any]:
    seconds, micros = time
    return seconds, micros

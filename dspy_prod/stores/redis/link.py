"""The tables' connection: opened when needed, and noticed when the server has other data than before.

The lower half of `tables.py`.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping

from dspy_prod.errors import StoreUnavailableError
from dspy_prod.stores.base import AccountState
from dspy_prod.stores.durable.tables import ChangedError, DoubtError
from dspy_prod.stores.redis.commits import Commits
from dspy_prod.stores.redis.connection import Connection
from dspy_prod.stores.redis.known import Known


class Link:
    """See `RedisTables`, whose attributes these are."""

    connection: Connection
    path: str
    _commits: Commits
    _known: Known
    _leased: bool

    def __init__(self) -> None:
        self._opened = False
        self._lost = False
        self._remembered: dict[str, AccountState] = {}

    def open(self) -> None:
        """Find out which data this is, where that is not known since the last connection."""
        if self._opened:
            return
        if not self._known.open(uuid.uuid4().hex):
            self._lose_all()
            self._known.open(uuid.uuid4().hex)  # with nothing known here, it is any data
        self._opened = True

    def _lose_all(self) -> None:
        """The server has other data than before."""
        for key, state in self._known.lose().items():
            before = self._remembered.get(key, state)  # what an older copy says must not hide it
            self._remembered[key] = AccountState(*map(max, state, before))
        self._commits.forget()
        self._opened = self._leased = False
        self._lost = True

    def begin(self) -> None:
        """A transaction begins: nothing is locked for it."""
        self.open()
        if self._lost:
            raise ChangedError  # what is known here is carried over first
        self._known.catch_up()

    def lost(self) -> bool:
        """Whether the server lost what it had, or has an older copy of it now."""
        lost, self._lost = self._lost, False
        return lost

    def remembered(self) -> Mapping[str, AccountState]:
        """What accounts held before that. What they hold now is read at once: each of them will be asked for."""
        anew = [key for key in self._remembered if key not in self._known.accounts]
        if anew and not self._known.look(anew, [], part=True):
            self._lose_all()
            raise ChangedError
        return self._remembered

    def forget(self) -> None:
        """The core has forgotten what it had in memory."""
        self._known.forget()

    def lose(self) -> None:
        """Give up a connection that the parent process uses."""
        self.close()

    def close(self) -> None:
        """Close the connection; `open` makes a new one."""
        self._opened = False
        self._commits.locked = False
        self.connection.close()

    def is_environment(self, error: BaseException) -> bool:
        """The server is to blame, and not the values to be written."""
        return isinstance(error, (OSError, StoreUnavailableError))

    def unavailable(self, error: BaseException) -> StoreUnavailableError:
        """What a person should read when the server cannot be used."""
        if isinstance(error, StoreUnavailableError):
            return error
        return StoreUnavailableError(str(error) if isinstance(error, DoubtError) else f"{self.path}: {error!r}")

    def failed(self, error: BaseException) -> None:
        """A transaction failed: begin anew with another connection."""
        self.close()

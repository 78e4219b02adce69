"""The commit of a transaction: one call of a script that applies it, if it is still as what it was decided on.

The lower half of `tables.py`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from typing import Any, Final

from dspy_prod.errors import StoreUnavailableError
from dspy_prod.stores.admission.core import AdmissionCore
from dspy_prod.stores.durable.served import Served
from dspy_prod.stores.durable.tables import ChangedError, DoubtError
from dspy_prod.stores.redis.batch import Batch
from dspy_prod.stores.redis.bell import Bell
from dspy_prod.stores.redis.commits import Commit
from dspy_prod.stores.redis.link import Link
from dspy_prod.stores.redis.owners import Owners
from dspy_prod.stores.redis.programs import RedisPrograms
from dspy_prod.stores.redis.timing import RedisTime

_log = logging.getLogger("dspy_prod")

BUSY_LIMIT: Final = 5.0
"""Seconds for which a transaction is decided again and again, because others change what it needs."""
INSISTS: Final = 2
"""Tries after which nobody else may change it: who locked it out at once would have to be waited for by everybody."""


class Committing(Link):
    """See `RedisTables`, whose attributes these are."""

    batch: Batch
    served: list[Served]
    programs: RedisPrograms
    _timing: RedisTime
    _bell: Bell
    _owners: Owners
    _unowned: bool
    _renewed: bool
    _name: str
    _core: AdmissionCore | None
    _commit: Commit | None
    _sent: list[Any] | None
    _busy_since: float | None
    _lost_to_others: int
    _after: list[tuple[int, Callable[[Any], object]]]

    def _look(
        self,
        accounts: Iterable[str],
        limiters: Iterable[str],
        part: bool = True,
        turn: tuple[Any, ...] = ("PING",),
    ) -> None:
        if not self._known.look(list(accounts), list(limiters), part, turn):
            self._lose_all()
            raise ChangedError

    def commit(self) -> None:
        """Have the server apply the transaction, if it is still as what it was decided on."""
        if self._sent is None:
            commit = self._commit
            assert commit is not None
            if not commit and not self._commits.locked:
                return
            head = {
                "leased": self._leased,
                "replies": bool(self._after),
                "insists": commit.contends and self._lost_to_others >= INSISTS,
                **self._known.head(bool(commit.accounts) or commit.told),
            }
            self._sent = self._commits.prepared(commit, head)
        sent = self._timing.monotonic()
        try:
            answer = self._commits.send(self._sent)
        except DoubtError:
            raise
        except BaseException:
            self._sent = None
            raise
        self._sent = None
        status, rest = answer[0], answer[7:]
        if status == b"lost":
            self._lose_all()
            raise ChangedError
        self._known.heard(answer[1:6], sent, status == b"ok")
        self._bell.heard(answer[6])
        if status == b"ok":
            self._applied(answer[2], *rest)
        elif status == b"done":  # its answer was lost
            self._applied(rest[0], None, rest[1])
        else:
            self._not_applied(status, answer[3], rest)

    def _applied(self, n: bytes, accounts: list[Any] | None, replies: list[Any]) -> None:
        commit, core = self._commit, self._core
        assert commit is not None
        assert core is not None
        self._known.wrote(commit, n.decode(), accounts, core)
        if self._name:
            self._known.named(self._name)
        self._leased = self._leased or self._renewed
        self._busy_since = None
        self._lost_to_others = 0
        self._remembered = {}
        self._commits.locked = False
        after, commands = self._after, self.batch.commands
        self._end()
        for (name, key, _), reply in zip(commands, replies, strict=False):
            if isinstance(reply, Exception):
                _log.error("A command of a commit to %s failed: %s %s: %s", self.path, name, key, reply)
        for place, function in after:
            try:
                function(replies[place] if place < len(replies) else None)
            except Exception:  # the commit was applied, whatever becomes of it
                _log.exception("What waited for a commit to %s failed", self.path)

    def _not_applied(self, status: bytes, terms: bytes, rest: list[Any]) -> None:
        """Others changed something: it is known now what, and the transaction is to be decided again."""
        commit = self._commit
        assert commit is not None
        now = time.monotonic()
        if self._busy_since is None:
            self._busy_since = now
        elif now - self._busy_since > BUSY_LIMIT:
            self._busy_since = None
            raise StoreUnavailableError(f"The store {self.path} is written to by others without end")
        if status != b"void":
            self._unowned = self._unowned or bool(rest[0])
            self._known.found(commit, terms, rest[1], rest[2])
        self._lost_to_others += 1
        if status == b"again":
            self._commits.locked = self._commits.locked or bool(rest[3])
        else:
            turn = self._commits.turn if status == b"wait" else ("PING",)
            self._commits.locked = True  # or may be soon, for it stands in line: it has to be left
            self._look(commit.names, [key for key, _, _ in commit.limits], turn=turn)
        self._known.news = True
        raise ChangedError

    def rollback(self) -> None:
        """Forget the transaction, if there is one."""
        self.programs.forget()
        self._end()

    def _end(self) -> None:
        self.batch = Batch()
        self._after = []
        self._renewed = False
        self._name = ""
        self._sent = None
        self.served.clear()
        self._owners.clear()

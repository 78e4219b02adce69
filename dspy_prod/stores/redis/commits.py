"""Sending a commit: once, whatever becomes of the answer; and in turn, where others want the same."""

from __future__ import annotations

import contextlib
from math import inf
from time import monotonic
from typing import Any, Final

import orjson

from dspy_prod.errors import StoreUnavailableError
from dspy_prod.stores.durable.tables import DoubtError
from dspy_prod.stores.redis.asking import KEPT_FOR
from dspy_prod.stores.redis.batch import Batch, Value
from dspy_prod.stores.redis.connection import Connection
from dspy_prod.stores.redis.script import script

LOCK: Final = 250
"""Milliseconds for which who found something changed has it to himself."""
PATIENCE: Final = 2_000
"""Milliseconds for which one who waits for his turn is remembered."""
TURN: Final = 0.3
"""Seconds after which one who waits for his turn looks himself."""
REMEMBER: Final = 86_400_000
"""Milliseconds for which the last commit of a process is remembered, should its answer have been lost."""
LIMITER: Final = 86_400_000
"""Milliseconds after its last use for which a limiter is kept: it describes a minute, and pauses of five at most."""
_RESENDS: Final = 3


class Commit:
    """What one call of the script gets. Made once: sent again it is the same.

    Args:
        batch: the commands that it applies.
        reserved: the keys that every commit names first.
    """

    def __init__(self, batch: Batch, reserved: tuple[str, ...]) -> None:
        self.accounts: list[list[Any]] = []
        self.limiters: list[list[Any]] = []
        self.reaped: list[list[Any]] = []
        self.forgiven: list[int] = []
        self.contends = False
        self.told = False
        self.names: list[str] = []  # of `accounts`
        self.limits: list[tuple[str, bytes, bytes]] = []  # of `limiters`: key, state and settings as they are written
        self._batch = batch
        self._keys = {key: place for place, key in enumerate(reserved, 1)}
        self._texts: list[bytes] = []

    def key(self, key: str) -> int:
        """The place of a key among those that are named."""
        return self._keys.setdefault(key, len(self._keys) + 1)

    def text(self, text: bytes) -> int:
        """The place of a text among the arguments."""
        self._texts.append(text)
        return len(self._texts) + 1

    def __bool__(self) -> bool:
        """Whether there is anything to check or to do."""
        return bool(self.accounts or self.limiters or self.reaped or self.forgiven or len(self._batch))

    def parts(self, head: dict[str, Any]) -> list[Value]:
        """What follows the name of the script."""
        commands: list[Value] = []
        for name, key, arguments in self._batch.commands:
            commands += (name, self.key(key), len(arguments), *map(_exact, arguments))
        whole = {
            **head,
            "accounts": self.accounts,
            "limiters": self.limiters,
            "reaped": self.reaped,
            "forgiven": self.forgiven,
            "contends": self.contends,
            "told": self.told,
            "first": len(self._texts) + 2,
            "count": len(self._batch),
        }
        return [len(self._keys), *self._keys, orjson.dumps(whole), *self._texts, *commands]


def _exact(value: Value) -> Value:
    return repr(value) if isinstance(value, float) else value


class Commits:
    """Sends what one process commits, each under a number larger than the one before.

    Args:
        connection: used by nobody else.
        owner: the process.

    Attributes:
        locked: what was found changed is ours for a moment, or will be in turn: a commit ends that.
    """

    def __init__(self, connection: Connection, owner: str) -> None:
        self.connection = connection
        self.locked = False
        self.reserved = (
            *(connection.key(name) for name in ("meta", "owners", "lock", "turns")),
            connection.key("done", owner),
            *(connection.key(name) for name in ("names", "ends", "terms")),
        )
        self._owner = owner
        self._bells = connection.key("bell") + ":"
        self._number = self._answered = 0  # of what was sent last, and of the last that the server remembers
        self._answered_at = -inf
        self._in_doubt = False  # what was sent last may have been applied

    def prepared(self, commit: Commit, head: dict[str, Any]) -> list[Value]:
        """A commit as it is sent, under the next number."""
        self._number += 1
        self._in_doubt = False
        remembered = monotonic() - self._answered_at < REMEMBER / 1000 / 2  # well before the server forgets it
        own = {"me": self._owner, "seq": self._number, "last": self._answered if remembered else 0}
        own |= {"lock": LOCK, "patience": PATIENCE, "remember": REMEMBER, "kept": KEPT_FOR * 1000}
        return commit.parts({**own, "bells": self._bells, "limiter": LIMITER, "locked": self.locked, **head})

    def forget(self) -> None:
        """The server has other data than before, and remembers nothing of what was sent."""
        self._answered = 0

    def send(self, parts: list[Value]) -> list[Any]:
        """The script's answer.

        Raises:
            DoubtError: there was none, now or when the same was sent before; it has to be sent again.
            StoreUnavailableError: nothing was applied.
        """
        import redis

        text, name = script()
        why: BaseException = StoreUnavailableError(f"The store {self.connection.shown} forgets its scripts")
        for _ in range(_RESENDS + 1):
            try:
                client = self.connection.client()
                answer = list(client.execute_command("EVALSHA", name, *parts))  # type: ignore[no-untyped-call]
            except redis.exceptions.NoScriptError:
                self._load(text)  # and where that fails, so does the next attempt
            except redis.exceptions.MovedError as error:
                why = error
                if not self.connection.follows(error):
                    break
            except (redis.TimeoutError, redis.ConnectionError, OSError) as error:
                self._in_doubt, why = True, error
                self.connection.follows(error)
                if isinstance(error, redis.TimeoutError):
                    break
            except redis.RedisError as error:
                why = error
                break
            else:
                self._in_doubt = False
                if answer[0] not in (b"lost", b"void"):
                    self._answered, self._answered_at = self._number, monotonic()
                return answer
        unavailable = why if isinstance(why, StoreUnavailableError) else self.connection.unavailable(why)
        if self._in_doubt:  # a refusal tells nothing of what was sent before it
            raise DoubtError(str(unavailable)) from why
        raise unavailable from why

    def _load(self, text: str) -> None:
        with contextlib.suppress(StoreUnavailableError):
            self.connection.read([("SCRIPT LOAD", text)])

    @property
    def turn(self) -> tuple[str, str, float]:
        """The command that is answered when it is this process's turn, or so late that it may look itself."""
        return "BLPOP", self._bells + self._owner, TURN

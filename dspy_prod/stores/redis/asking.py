"""How what is kept in Redis is asked for: inside a commit, or beside it once everything posted before is there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, TimeoutError
from functools import partial
from typing import Any, Final, Protocol
from urllib.parse import quote, unquote

from dspy_prod.errors import StoreUnavailableError
from dspy_prod.stores.durable.mailbox import READ_TIMEOUT, Mailbox
from dspy_prod.stores.durable.transactions import Transactions
from dspy_prod.stores.redis.batch import STEPS, Batch
from dspy_prod.stores.redis.connection import Connection

KEPT_FOR: Final = 400 * 86_400
"""Seconds after its last write for which an experiment, a run, or the sums of a day are kept."""

STEPS["enlist"] = """
function(key, args)
  -- A name is among those of a set; of others, some are forgotten whose keys are gone: they had their time.
  -- (name, where the keys of such names begin, how many to look at)
  if redis.call('SADD', key, args[1]) == 0 then return 0 end
  for _, name in ipairs(redis.call('SRANDMEMBER', key, args[3])) do
    if redis.call('EXISTS', args[2] .. name) == 0 then redis.call('SREM', key, name) end
  end
  return 1
end
"""
_LOOKS: Final = 20
"""Names looked at whenever one is added: so there are never many that stand for nothing."""


class Tables(Protocol):
    """What the parts use of the transaction under way."""

    batch: Batch

    def after_commit(self, place: int, function: Callable[[Any], object]) -> None:
        """Once it is durable, give the reply of the command at this place to `function`."""
        ...


class Asking:
    """Asks for one part of the store.

    Args:
        mailbox: how the writer is reached. connection: where to read.
    """

    def __init__(self, mailbox: Mailbox, connection: Connection) -> None:
        self._mailbox = mailbox
        self.connection = connection

    def commit(self, put: Callable[[Tables, float], int]) -> Any:
        """The reply of a command whose place `put` tells, in a transaction after everything that was posted before.

        Raises:
            StoreUnavailableError: no answer.
        """

        replied: Future[Any] = self._mailbox.question(partial(replying, put))
        try:
            return replied.result(READ_TIMEOUT)
        except TimeoutError:
            raise StoreUnavailableError(f"The store {self.connection.shown} did not answer in time") from None

    def post(self, put: Callable[[Tables, float], object]) -> None:
        """Have `put` add its commands to a transaction; nobody waits for it."""
        self._mailbox.post((Transactions.note, put, None))

    def read(self, *commands: tuple[Any, ...]) -> list[Any]:
        """The replies of some commands, in one round trip, after everything that was posted before is written.

        Raises:
            StoreUnavailableError: no answer.
        """
        self.flush()
        return self.look(commands)

    def look(self, commands: Sequence[tuple[Any, ...]]) -> list[Any]:
        """The replies of some commands: what is durable."""
        return self.connection.read(commands) if commands else []

    def flush(self) -> None:
        """Have written what was posted before."""
        self._mailbox.alive()
        self._mailbox.flush(READ_TIMEOUT)


def replying(put: Callable[[Tables, float], int], _: Any, tables: Tables, now: float) -> Future[Any]:
    """What has the reply of the command whose place `put` tells, once the transaction under way is durable.

    A transaction may be decided more than once: each time it is another future, and the last one counts.
    """
    replied: Future[Any] = Future()

    def tell(reply: Any) -> None:
        if isinstance(reply, Exception):
            replied.set_exception(StoreUnavailableError(f"The store refused what it was told: {reply}"))
        else:
            replied.set_result(reply)

    tables.after_commit(put(tables, now), tell)
    return replied


def enlist(batch: Batch, names: str, part: str, begin: str) -> None:
    """A key of this part is written just now: its name is to be found in the set `names`, for as long as itself.

    Args:
        begin: how the keys of such names begin.
    """
    batch.call("enlist", names, part, begin, _LOOKS)
    batch.call("EXPIRE", names, KEPT_FOR)


def packed(text: str) -> bytes:
    """A name as Redis holds it."""
    return text.encode("utf-8", "surrogatepass")


def unpacked(name: bytes) -> str:
    """The name that was packed; of a damaged one, what can still be read."""
    try:
        return name.decode("utf-8", "surrogatepass")
    except UnicodeDecodeError:
        return name.decode("utf-8", "replace")


def part_of(name: str) -> str:
    """A name as it stands in a key (`Connection.key`): no space, colon or star."""
    return quote(name, safe="", errors="surrogatepass")


def named(part: bytes | str) -> str:
    """The name that stands so in a key."""
    return unquote(part.decode() if isinstance(part, bytes) else part, errors="surrogatepass")

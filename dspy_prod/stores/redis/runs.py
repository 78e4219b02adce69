"""What Redis keeps of runs: the answers they were given, and notes about them.

A run is kept for 400 days after it was last written, and so many answers of it as `MOST_ANSWERS` and `MOST_BYTES` say:
who has more is told that they cannot be kept.

    runs                 set of the names of runs
    run:<run>            hash: `bytes` of all answers, and a note under each "note <name>"
    run:<run>:answers    hash: "<ordinal>:key" -> answer, and "key" -> how many it has, each key after a colon
    run:<run>:order      list of "<ordinal>:key", in the order in which they were kept
"""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import Future
from functools import partial
from typing import Any, Final

from dspy_prod.errors import StoreUnavailableError
from dspy_prod.privacy.visible import carried
from dspy_prod.stores.durable.mailbox import Mailbox
from dspy_prod.stores.durable.transactions import Transactions
from dspy_prod.stores.redis.asking import KEPT_FOR, Asking, Tables, enlist, named, packed, part_of, replying, unpacked
from dspy_prod.stores.redis.batch import STEPS
from dspy_prod.stores.redis.connection import Connection
from dspy_prod.stores.vocabulary import Size

MOST_ANSWERS: Final = 500_000
"""Answers kept of one run."""
MOST_BYTES: Final = 2**30
"""Bytes of answers kept of one run."""

_PARTS: Final = ("answers", "order")
_PAGE: Final = 10_000
"""Answers listed in one step at the server, which does nothing else meanwhile."""

STEPS["run_keep"] = """
function(key, args)
  -- (key of the answer, answer, '1' to keep it again, most answers, most bytes) -> ordinal, or -1: there is no room
  local count = tonumber(redis.call('HGET', key .. ':answers', ':' .. args[1]) or '0')
  if count > 0 and args[3] == '0' then return count - 1 end
  local bytes = tonumber(redis.call('HGET', key, 'bytes') or '0') + #args[2]
  if redis.call('LLEN', key .. ':order') >= tonumber(args[4]) or bytes > tonumber(args[5]) then return -1 end
  local name = string.format('%d', count) .. ':' .. args[1]
  redis.call('HSET', key .. ':answers', name, args[2], ':' .. args[1], string.format('%d', count + 1))
  redis.call('RPUSH', key .. ':order', name)
  redis.call('HSET', key, 'bytes', string.format('%d', bytes))
  return count
end
"""

STEPS["run_swap"] = """
function(key, args)
  -- (field, value, and what must be there, if anything must)
  if (redis.call('HGET', key, args[1]) or false) ~= (args[3] or false) then return 0 end
  redis.call('HSET', key, args[1], args[2])
  return 1
end
"""


class RedisRuns:
    """Reads beside the writer, and writes through it. Its methods are the store's, see `Runs`."""

    def __init__(self, mailbox: Mailbox, connection: Connection) -> None:
        self._mailbox = mailbox
        self._asking = Asking(mailbox, connection)
        self._connection = connection

    # -- answers -----------------------------------------------------------------------------------------------------
    def answers(self, run: str) -> list[tuple[bytes, int]]:
        key = self._key(run, "order")
        pages = range(0, self.count(run), _PAGE)
        replies = self._asking.look([("LRANGE", key, first, first + _PAGE - 1) for first in pages])
        pairs = (name.split(b":", 1) for names in replies for name in names)
        return [(key, int(ordinal)) for ordinal, key in pairs]

    def answer(self, run: str, key: bytes, ordinal: int) -> bytes | None:
        (found,) = self._asking.look([("HGET", self._key(run, "answers"), b"%d:" % ordinal + key)])
        return found if isinstance(found, bytes) else None

    def keep(self, run: str, key: bytes, response: bytes, served_model: str, again: bool) -> Future[int]:
        kept: Future[int] = Future()
        written: Future[Future[int]] = Future()

        def put(tables: Tables, _: float) -> int:
            values = key, response, "1" if again else "0", MOST_ANSWERS, MOST_BYTES
            place = tables.batch.call("run_keep", self._key(run), *values)
            self._touch(tables, run)
            return place

        def tell(replied: Future[int]) -> None:
            error = replied.exception()
            if error is not None:
                kept.set_exception(error)
            elif replied.result() < 0:
                kept.set_exception(StoreUnavailableError(f"The run {run!r} has as many answers as are kept of one"))
            else:
                kept.set_result(replied.result())

        def wait(written: Future[Future[int]]) -> None:
            error = written.exception()
            if error is None:
                written.result().add_done_callback(tell)
            else:
                kept.set_exception(error)

        written.add_done_callback(wait)
        if not self._mailbox.post((Transactions.answer, written, partial(replying, put))):
            written.set_exception(StoreUnavailableError(f"The store {self._connection.shown} is closed"))
        return kept

    def count(self, run: str) -> int:
        (count,) = self._asking.read(("LLEN", self._key(run, "order")))
        return int(count)

    def answered(self) -> list[str]:
        return sorted(self.sizes())

    def sizes(self, run: str | None = None) -> dict[str, Size]:
        self._asking.flush()
        names = self._names() if run is None else [carried(run)]
        commands = [(("LLEN", self._key(name, "order")), ("HGET", self._key(name), "bytes")) for name in names]
        replies = self._asking.look([command for pair in commands for command in pair])
        sizes = zip(names, replies[::2], replies[1::2], strict=True)
        return {name: Size(int(count), int(size or 0)) for name, count, size in sizes if count}

    # -- notes -------------------------------------------------------------------------------------------------------
    def note(self, run: str, name: str) -> str | None:
        (value,) = self._asking.look([("HGET", self._key(run), _field(name))])
        return None if value is None else unpacked(value)

    def noted(self, name: str) -> dict[str, str]:
        names = self._names()
        values = self._asking.look([("HGET", self._key(run), _field(name)) for run in names])
        return {run: unpacked(value) for run, value in zip(names, values, strict=True) if value is not None}

    def put_note(self, run: str, name: str, value: str | None) -> None:
        def put(tables: Tables, _: float) -> int:
            if value is None:
                return tables.batch.call("HDEL", self._key(run), _field(name))
            place = tables.batch.call("HSET", self._key(run), _field(name), packed(value))
            self._touch(tables, run)
            return place

        self._asking.commit(put)

    def swap_note(self, run: str, name: str, before: str | None, value: str) -> bool:
        there = () if before is None else (packed(before),)

        def swap(tables: Tables, _: float) -> int:
            place = tables.batch.call("run_swap", self._key(run), _field(name), packed(value), *there)
            self._touch(tables, run)
            return place

        return bool(self._asking.commit(swap))

    def remove(self, run: str, accounts: str | None) -> None:
        def drop(core: Any, tables: Any, _: float) -> None:
            if accounts is not None:
                core.accounts.drop(accounts)
                tables.drop_accounts(accounts)
            for key in self._keys(run):
                tables.batch.call("UNLINK", key)
            tables.batch.call("SREM", self._connection.key("runs"), part_of(carried(run)))

        self._mailbox.question(drop)

    def bury(self, pid: int) -> None:
        def charge(core: Any, tables: Any, now: float) -> None:
            for hold in tables.held_by(pid):
                core.abandon(hold, now)

        self._mailbox.question(charge)

    # -- keys --------------------------------------------------------------------------------------------------------
    def _key(self, run: str, *parts: str) -> str:
        return self._connection.key("run", carried(run), *parts)

    def _keys(self, run: str) -> Iterable[str]:
        return [self._key(run), *(self._key(run, part) for part in _PARTS)]

    def _names(self) -> list[str]:
        (parts,) = self._asking.look([("SMEMBERS", self._connection.key("runs"))])
        return sorted(map(named, parts))

    def _touch(self, tables: Tables, run: str) -> None:
        """It is among the runs, and has as long to live as what was written just now."""
        names = self._connection.key("runs")
        enlist(tables.batch, names, part_of(carried(run)), self._connection.key("run") + ":")
        for key in self._keys(run):
            tables.batch.call("EXPIRE", key, KEPT_FOR)


def _field(name: str) -> bytes:
    return b"note " + packed(name)

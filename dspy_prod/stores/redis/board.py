"""The board in Redis: a hash of rows, swapped by a step of the commit, and a bell that every commit's answer tells."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Final

import orjson

from dspy_prod.errors import StoreUnavailableError
from dspy_prod.stores.board import MOST_NOTES, Change, Decide, Note, Row, Rows, decided, note_of, surplus
from dspy_prod.stores.durable.mailbox import Mailbox
from dspy_prod.stores.durable.transactions import Transactions
from dspy_prod.stores.redis.asking import KEPT_FOR, packed, unpacked
from dspy_prod.stores.redis.batch import STEPS, Batch
from dspy_prod.stores.redis.bell import Bell
from dspy_prod.stores.redis.connection import Connection

TRIES: Final = 20
"""How often a change is decided at most, where others change the row meanwhile."""
STEPS["board_swap"] = """
function(key, args)
  -- A row is replaced where it is still what was decided on. (field, before or '', after or '', note or '', most notes,
  -- fields to forget ...) -> 1, or 0: it is another one by now
  if (redis.call('HGET', key, args[1]) or '') ~= args[2] then return 0 end
  if args[3] == '' then redis.call('HDEL', key, args[1]) else redis.call('HSET', key, args[1], args[3]) end
  for place = 6, #args do redis.call('HDEL', key, args[place]) end
  if args[4] ~= '' then
    redis.call('LPUSH', key .. ':notes', args[4])
    redis.call('LTRIM', key .. ':notes', 0, args[5] - 1)
  end
  return 1
end
"""


class RedisBoard:
    """Reads beside the writer, and writes through it. Its methods are those of `Board`."""

    def __init__(self, mailbox: Mailbox, connection: Connection, bell: Bell, now: Callable[[], float]) -> None:
        self.now = now
        self.begin(mailbox, connection, bell)

    def begin(self, mailbox: Mailbox, connection: Connection, bell: Bell) -> None:
        """Use these from now on."""
        self._mailbox = mailbox
        self._connection = connection
        self._bell = bell
        self._key = connection.key("board")
        self._overlay: tuple[Batch | None, dict[bytes, tuple[bytes, Future[bool]]]] = (None, {})

    @property
    def token(self) -> object:
        return self._bell.ask()

    def rows(self) -> Rows:
        (found,) = self._connection.read([("HGETALL", self._key)])
        read = ((unpacked(field).split(":", 1), _row(value)) for field, value in _pairs(found))
        return {(kind, key): row[1] for (kind, key), row in read if row is not None}

    def journal(self, most: int) -> list[Note]:
        (found,) = self._connection.read([("LRANGE", self._key + ":notes", 0, most - 1)])
        return [note for content in found if (note := note_of(content)) is not None]

    # -- changing ----------------------------------------------------------------------------------------------------
    def change(self, kind: str, key: str, decide: Decide) -> Future[Row | None]:
        changed: Future[Row | None] = Future()
        self._try(changed, kind, key, decide, TRIES)
        return changed

    def _try(self, changed: Future[Row | None], kind: str, key: str, decide: Decide, left: int) -> None:
        field = packed(f"{kind}:{key}")

        def put(_: Any, tables: Any, now: float) -> tuple[Row | StoreUnavailableError | None, Future[bool] | None]:
            before, written = self._before(tables, field)
            found = _row(before)
            row = None if found is None else found[1]
            change = decided(decide, row, now)
            if not isinstance(change, Change):
                return (row if change is None else change), written  # what was seen holds if that does
            after = b"" if change.row is None else orjson.dumps([now, change.row])
            note = b"" if change.note is None else orjson.dumps([now, *change.note])
            spare = [] if before or not after else self._spare(tables, kind, now)
            batch = tables.batch
            place = batch.call("board_swap", self._key, field, before, after, note, MOST_NOTES, *spare)
            batch.call("EXPIRE", self._key, KEPT_FOR)
            batch.call("EXPIRE", self._key + ":notes", KEPT_FOR)
            batch.call("HINCRBY", self._bell.meta, "board", 1)
            batch.call("PUBLISH", self._bell.channel, "1")
            done: Future[bool] = Future()
            self._overlay[1][field] = after, done
            tables.after_commit(place, lambda reply: done.set_result(reply == 1))
            return change.row, done

        told: Future[tuple[Row | StoreUnavailableError | None, Future[bool] | None]] = Future()

        def tell(told: Future[tuple[Row | StoreUnavailableError | None, Future[bool] | None]]) -> None:
            error = told.exception()
            answer, done = told.result() if error is None else (StoreUnavailableError(str(error)), None)
            if done is not None:
                self._bell.ring()
            if isinstance(answer, StoreUnavailableError):
                changed.set_exception(answer)
            elif done is None or (done.done() and done.result()):
                changed.set_result(answer)
            elif left > 1:
                self._try(changed, kind, key, decide, left - 1)
            else:
                shown = self._connection.shown
                changed.set_exception(StoreUnavailableError(f"The board of {shown} changes all the time"))

        told.add_done_callback(tell)
        if not self._mailbox.post((Transactions.answer, told, put)):
            told.set_exception(StoreUnavailableError(f"The store {self._connection.shown} is closed"))

    def _before(self, tables: Any, field: bytes) -> tuple[bytes, Future[bool] | None]:
        """A row as it will be once what was decided before in this transaction is done; and whether that was, if it is.

        It is not where another process has changed the row meanwhile. Who saw it must then look again: the probe of a
        circuit that was decided here, and given to another worker, would else be taken for one that is out.
        """
        if self._overlay[0] is not tables.batch:
            self._overlay = (tables.batch, {})
        known = self._overlay[1].get(field)
        if known is not None:
            return known
        (found,) = tables.connection.read([("HGET", self._key, field)])
        return bytes(found or b""), None

    def _spare(self, tables: Any, kind: str, now: float) -> list[bytes]:
        (found,) = tables.connection.read([("HGETALL", self._key)])
        begins = packed(f"{kind}:")
        rows = {
            unpacked(field): row
            for field, value in _pairs(found)
            if field.startswith(begins) and (row := _row(value)) is not None
        }
        return [packed(name) for name in surplus(rows, kind, now)]


def _pairs(found: Any) -> list[tuple[bytes, bytes]]:
    if isinstance(found, dict):
        return list(found.items())
    return list(zip(found[::2], found[1::2], strict=True))


def _row(content: bytes) -> tuple[float, Row] | None:
    """A row as it was written, and when; None of one that is damaged."""
    try:
        at, row = orjson.loads(content)
        return (float(at), row) if isinstance(row, dict) else None
    except (TypeError, ValueError):
        return None

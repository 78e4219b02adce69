"""The time of a SQLite file, the same for all processes that share it, whatever is done to the machine's wall clock."""

from __future__ import annotations

import sqlite3
from typing import Final

import orjson

from dspy_prod.runtime.boot import boot, is_this_boot
from dspy_prod.runtime.clock import Clock

FIND: Final = "SELECT value FROM meta WHERE key = 'clock'"
KEEP: Final = "INSERT OR REPLACE INTO meta VALUES ('clock', ?)"


class StoreTime:
    """Seconds since the epoch, as the wall clock had it when the file was first opened since the machine started.

    From then on it goes by the monotonic clock, which all processes of a machine have in common. So a wall clock that
    is set, by an hour or by ten years, ends no lease and empties no minute, and a process that is told another time
    of day goes by the same minute as the others. What the calendar decides (the day of a budget, the time of a
    record) does not go by it.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._offset = clock.time() - clock.monotonic()

    def time(self) -> float:
        """Store time."""
        return self._clock.monotonic() + self._offset

    def monotonic(self) -> float:
        """The clock for durations."""
        return self._clock.monotonic()

    def agree(self, connection: sqlite3.Connection) -> None:
        """Go by what the file says, or say it. Where the machine started anew, whoever held something is gone."""
        found = _read(connection)
        if found is not None and is_this_boot(found[0]):
            self._offset = found[1]
            return
        connection.execute("BEGIN IMMEDIATE")
        try:
            found = _read(connection)  # another process may have said it meanwhile
            if found is not None and is_this_boot(found[0]):
                self._offset = found[1]
            else:
                connection.execute(KEEP, (orjson.dumps([boot(), self._offset]).decode(),))
                if found is not None:
                    connection.execute("UPDATE owners SET lease_until = 0")
            connection.execute("COMMIT")
        except BaseException:
            connection.execute("ROLLBACK")
            raise


def _read(connection: sqlite3.Connection) -> tuple[str, float] | None:
    row = connection.execute(FIND).fetchone()
    try:
        boot, offset = orjson.loads(row[0])
        return str(boot), float(offset)
    except (TypeError, ValueError):
        return None

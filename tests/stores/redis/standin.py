"""The least of a store that programs, runs and experiments need: a queue of operations, and commits by one script."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from dspy_prod.runtime.clock import SYSTEM_CLOCK, Clock
from dspy_prod.stores.redis.batch import STEPS, Batch, Value
from dspy_prod.stores.redis.connection import Connection
from dspy_prod.stores.redis.programs import PostedPrograms, RedisPrograms
from dspy_prod.stores.redis.runs import RedisRuns
from dspy_prod.stores.redis.trials import RedisTrials

MANY = 100
"""Operations that are committed together without being asked for."""


def script() -> str:
    """Does (name, key, number of arguments, arguments...) of each command; the keys it may use are those declared."""
    steps = "\n".join(f"steps[{name!r}] = {text.strip()}" for name, text in STEPS.items())
    return f"""
    local steps = {{}}
    {steps}
    local replies, i = {{}}, 1
    while i <= #ARGV do
      local name, key, count, arguments = ARGV[i], KEYS[tonumber(ARGV[i + 1])], tonumber(ARGV[i + 2]), {{}}
      for j = 1, count do arguments[j] = ARGV[i + 2 + j] end
      local reply
      if steps[name] then reply = steps[name](key, arguments) else reply = redis.call(name, key, unpack(arguments)) end
      replies[#replies + 1] = reply or false
      i = i + 3 + count
    end
    return replies
    """


class Tables:
    """A transaction's commands, and who is told their replies."""

    def __init__(self, connection: Connection, max_records: int | None) -> None:
        self.batch = Batch()
        self.connection = connection
        self.path = connection.shown
        self.programs = RedisPrograms(connection, max_records)
        self.commits = 0
        self._after: list[tuple[int, Callable[[Any], object]]] = []
        self._script = script()

    def after_commit(self, place: int, function: Callable[[Any], object]) -> None:
        self._after.append((place, function))

    def commit(self) -> None:
        commands = list(self.batch.commands)
        keys = {key: number for number, key in enumerate(dict.fromkeys(key for _, key, _ in commands), 1)}
        values: list[Value] = []
        for name, key, arguments in commands:
            values += (name, keys[key], len(arguments), *arguments)
        after, self._after = self._after, []
        self.batch.clear()
        if commands:
            replies = self.connection.client().eval(self._script, len(keys), *keys, *values)
            self.commits += 1
            for place, function in after:
                function(replies[place])


class Served:
    """A store of programs, runs and experiments."""

    def __init__(self, connection: Connection, clock: Clock = SYSTEM_CLOCK, max_records: int | None = None) -> None:
        self.tables = Tables(connection, max_records)
        self.writer = self
        self.inbox = self
        self.open = False  # nobody waits for a thread that there is not
        self.problems: list[str] = []
        self._clock = clock
        self._queue: list[tuple[Any, Any, Any]] = []
        self._lock = threading.RLock()
        self.programs = PostedPrograms(self, self.tables.programs)  # type: ignore[arg-type]
        self.runs = RedisRuns(self, connection)  # type: ignore[arg-type]
        self.trials = RedisTrials(self, connection, clock.time)  # type: ignore[arg-type]

    # -- what a mailbox does -------------------------------------------------------------------------------------------
    def post(self, operation: tuple[Any, Any, Any]) -> bool:
        with self._lock:
            self._queue.append(operation)
            if len(self._queue) >= MANY or operation[0].__name__ == "answer":
                self.flush(None)
        return True

    def question(self, ask: Callable[..., Any]) -> Any:
        with self._lock:
            self.flush(None)
            found = ask(None, self.tables, self._clock.time())
            self.tables.commit()
            return found

    def flush(self, timeout: float | None) -> bool:
        with self._lock:
            queue, self._queue = self._queue, []
            now, told = self._clock.time(), []
            for kind, one, other in queue:
                if kind.__name__ == "append_program":
                    self.tables.programs.put(one)
                elif kind.__name__ == "note":
                    one(self.tables, now)
                else:
                    told.append((one, other(None, self.tables, now)))
            self.tables.programs.write(self.tables, now)
            self.tables.commit()
            for future, found in told:
                future.set_result(found)
        return True

    def alive(self) -> bool:
        return True

    def ease(self) -> None:
        pass

    def unwritten(self) -> int:
        return len(self._queue)

    def close(self) -> None:
        self.flush(None)
        self.tables.connection.close()

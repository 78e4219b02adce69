"""The least of a store that programs, runs and experiments need: a queue of operations, and commits by one script.

Its script does one thing that a real one does not: it refuses keys that the commit has not declared.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from dspy_prod.runtime.clock import SYSTEM_CLOCK, Clock
from dspy_prod.stores.durable.transactions import Transactions
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
    local declared, server = {{}}, redis
    for _, key in ipairs(KEYS) do declared[key] = true end
    local function checked(how)
      return function(name, key, ...)
        if not declared[key] and name ~= 'EXISTS' then error(name .. ' of ' .. key .. ', which is not declared') end
        return server[how](name, key, ...)
      end
    end
    local redis = {{call = checked('call'), pcall = checked('pcall')}}
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


class Core:
    """Of a core, what a run's removal asks for."""

    @property
    def accounts(self) -> Core:
        return self

    def drop(self, prefix: str) -> None:
        """Nobody has any."""


class Tables:
    """A transaction's commands, and who is told their replies."""

    def __init__(self, connection: Connection, max_records: int | None) -> None:
        self.batch = Batch()
        self.path = connection.shown
        self.programs = RedisPrograms(connection, max_records)
        self._connection = connection
        self._after: list[tuple[int, Callable[[Any], object]]] = []
        self._script = script()

    def after_commit(self, place: int, function: Callable[[Any], object]) -> None:
        self._after.append((place, function))

    def drop_accounts(self, prefix: str) -> None:
        """Nobody has any."""

    def commit(self) -> None:
        commands, after, self._after = list(self.batch.commands), self._after, []
        self.batch.clear()
        keys = {key: number for number, key in enumerate(dict.fromkeys(key for _, key, _ in commands), 1)}
        values: list[Value] = []
        for name, key, arguments in commands:
            values += (name, keys[key], len(arguments), *arguments)
        replies: Any = self._connection.client().eval(self._script, len(keys), *keys, *values) if commands else []
        for place, function in after:
            function(replies[place])


class Served:
    """A store of programs, runs and experiments. It is its own mailbox, writer and inbox."""

    def __init__(self, connection: Connection, clock: Clock = SYSTEM_CLOCK, max_records: int | None = None) -> None:
        self.tables = Tables(connection, max_records)
        self.connection = connection
        self.writer = self.inbox = self
        self.open = False  # nobody waits for a thread that there is not
        self.closed = False
        self._clock = clock
        self._queue: list[tuple[Any, Any, Any]] = []
        self._lock = threading.RLock()
        mailbox: Any = self
        self.programs = PostedPrograms(mailbox, self.tables.programs)
        self.runs = RedisRuns(mailbox, connection)
        self.trials = RedisTrials(mailbox, connection, clock.time)

    def post(self, operation: tuple[Any, Any, Any]) -> bool:
        with self._lock:
            if not self.closed:
                self._queue.append(operation)
                if len(self._queue) >= MANY or operation[0] is Transactions.answer:
                    self.flush()
            return not self.closed

    def question(self, ask: Callable[..., Any]) -> Any:
        with self._lock:
            self.flush()
            found = ask(Core(), self.tables, self._clock.time())
            self.tables.commit()
            return found

    def flush(self, timeout: float | None = None) -> bool:
        with self._lock:
            queue, self._queue = self._queue, []
            now, told = self._clock.time(), []
            for kind, one, other in queue:
                if kind is Transactions.append_program:
                    self.tables.programs.put(one)
                elif kind is Transactions.note:
                    one(self.tables, now)
                else:
                    told.append((one, other(Core(), self.tables, now)))
            self.tables.programs.write(self.tables.batch, now)
            self.tables.commit()
            for future, found in told:
                future.set_result(found)
        return True

    def alive(self) -> bool:
        return not self.closed

    def ease(self) -> None:
        """It is never behind."""

    def close(self) -> None:
        self.flush()
        self.closed = True
        self.connection.close()

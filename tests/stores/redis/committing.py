"""A commit as a store makes it, for tests of one part alone: its batch as one script."""

from __future__ import annotations

from typing import Any

from dspy_prod.stores.redis.batch import STEPS, Batch
from dspy_prod.stores.redis.connection import Connection

_SCRIPT = """
local steps = {}
%s
local at, replies = 1, {}
while ARGV[at] do
    local name, key, count = ARGV[at], ARGV[at + 1], tonumber(ARGV[at + 2])
    local arguments = {unpack(ARGV, at + 3, at + 2 + count)}
    local reply
    if steps[name] then reply = steps[name](key, arguments) else reply = redis.call(name, key, unpack(arguments)) end
    replies[#replies + 1] = reply or 0
    at = at + 3 + count
end
return replies
"""


def commit(connection: Connection, batch: Batch) -> list[Any]:
    """The replies of a batch."""
    flat: list[Any] = []
    for name, key, arguments in batch.commands:
        flat += name, key, len(arguments), *arguments
    steps = "\n".join(f"steps[{name!r}] = {function}" for name, function in STEPS.items())
    keys = list({key for _, key, _ in batch.commands})
    batch.clear()
    replies: list[Any] = connection.read([("EVAL", _SCRIPT.replace("%s", steps), len(keys), *keys, *flat)])
    return list(replies[0])

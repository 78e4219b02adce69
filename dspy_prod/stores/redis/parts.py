"""What else a Redis store keeps beside admissions."""

from __future__ import annotations

from dspy_prod.stores.redis.answers import RedisAnswers
from dspy_prod.stores.redis.connection import Connection
from dspy_prod.stores.redis.ledger import RedisLedger
from dspy_prod.stores.redis.programs import RedisPrograms


class Parts:
    """The ledger, the answers and the program calls of one store, read and written by one connection.

    Args:
        connection: whose namespace it is.
        max_records: about so many of the newest records are kept of calls, and as many of program calls.
    """

    def __init__(self, connection: Connection, max_records: int) -> None:
        self.ledger = RedisLedger(connection, max_records)
        self.answers = RedisAnswers(connection)
        self.programs = RedisPrograms(connection, max_records)

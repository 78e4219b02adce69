"""The response cache of a SQLite store, as callers use it."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable

from dspy_prod.stores.base import CachedAnswer
from dspy_prod.stores.durable import kept
from dspy_prod.stores.durable.mailbox import Mailbox
from dspy_prod.stores.sqlite.answers import read_answer
from dspy_prod.stores.sqlite.reader import Reader


class KeptAnswers(kept.KeptAnswers):
    """Answers in the file, and those on their way to it."""

    def __init__(self, mailbox: Mailbox, reader: Reader, now: Callable[[], float]) -> None:
        def find(key: bytes) -> tuple[CachedAnswer, float] | None:
            try:
                return reader.read(lambda connection, ns: read_answer(connection, ns, key))
            except sqlite3.Error as error:
                raise OSError(str(error)) from error

        super().__init__(mailbox, find, now)

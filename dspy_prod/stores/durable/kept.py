"""The response cache of a durable store, as callers use it: reading beside the writer, writing through it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from dspy_prod.errors import StoreUnavailableError
from dspy_prod.stores.base import CachedAnswer
from dspy_prod.stores.durable.mailbox import READ_TIMEOUT, Mailbox
from dspy_prod.stores.durable.transactions import Transactions

TOUCH_AFTER: Final = 60.0
"""Seconds after which a used entry is marked as used again: the order of eviction is that exact."""


class KeptAnswers:
    """Answers that are kept, and those on their way there. Its methods are the store's, see `Answers`.

    Args:
        mailbox: how the writer is reached.
        find: the answer of a key, and when it was last marked as used; raises `OSError` or `StoreUnavailableError`.
        now: the store's time.

    Attributes:
        on_written: told the key of each answer that others can read now, or that could not be written.
    """

    def __init__(
        self,
        mailbox: Mailbox,
        find: Callable[[bytes], tuple[CachedAnswer, float] | None],
        now: Callable[[], float],
    ) -> None:
        self._mailbox = mailbox
        self._find = find
        self._now = now
        self._posted: dict[bytes, CachedAnswer] = {}
        self.on_written: Callable[[bytes], None] = _nobody

    def is_posted(self, key: bytes) -> bool:
        """Whether an answer is on its way: nobody else can read it yet."""
        return key in self._posted

    def get(self, key: bytes) -> CachedAnswer | None:
        """An answer, expired or not; None when there is none, or it cannot be read."""
        posted = self._posted.get(key)
        if posted is not None:
            return posted
        try:
            found = self._find(key)
        except (OSError, StoreUnavailableError):
            return None
        if found is None:
            return None
        answer, used_at = found
        if self._now() - used_at > TOUCH_AFTER:
            self._mailbox.post((Transactions.touch_answer, key, None))
        return answer

    def put(self, key: bytes, answer: CachedAnswer, *, max_entries: int, max_bytes: int) -> None:
        """Keep an answer. Posted."""
        self._posted[key] = answer
        put = _Put(self, key, answer, max_entries, max_bytes)
        if not self._mailbox.post((Transactions.put_answer, key, put)):
            put.written()
        self._mailbox.writer.inbox.ease()

    def written(self, key: bytes, answer: CachedAnswer) -> None:
        """Others can read it, or never will."""
        posted = self._posted
        if posted.get(key) is answer:
            posted.pop(key, None)
        if key not in posted:  # nor where it was forgotten by `clear`: who is told may hold something for it
            self.on_written(key)

    def clear(self) -> None:
        """Forget all answers of the namespace."""
        self._posted.clear()
        self._mailbox.post((Transactions.clear_answers, None, None))
        self._mailbox.flush(READ_TIMEOUT)


class _Put:
    """An answer on its way, see `operations.Put`: one object, for as many wait as calls are made meanwhile."""

    __slots__ = ("_kept", "_key", "answer", "max_bytes", "max_entries")

    def __init__(self, kept: KeptAnswers, key: bytes, answer: CachedAnswer, max_entries: int, max_bytes: int) -> None:
        self._kept, self._key = kept, key
        self.answer, self.max_entries, self.max_bytes = answer, max_entries, max_bytes

    def written(self) -> None:
        self._kept.written(self._key, self.answer)


def _nobody(key: bytes) -> None:
    """In place of who wants to know."""

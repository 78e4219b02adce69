"""Who of several workers tells what all of them have heard: the one that claims it first, on the board they share."""

from __future__ import annotations

import uuid
from concurrent.futures import Future
from hashlib import blake2b
from typing import Final

from dspy_prod.alerts.notices import Notice
from dspy_prod.policies.fleet import fleets
from dspy_prod.stores.board import ALERT, Change, Row
from dspy_prod.stores.keys import joined
from dspy_prod.telemetry.events import Event

PATIENCE: Final = 2.0
"""Seconds for which a store is asked. What it does not answer is told: twice is better than not at all."""
MOST: Final = 1_000


class Claims:
    """What one webhook of one process claims.

    Args:
        url: the webhook's; workers that post to the same one share their claims.
        every: seconds for which a claim holds.
    """

    def __init__(self, url: str, every: float) -> None:
        self._every = every
        self._me = uuid.uuid4().hex
        self._secret = blake2b(url.encode(), digest_size=16).digest()
        self._whose: dict[int, str] = {}

    def note(self, notice: Notice, event: Event) -> None:
        """Remember whom a notice is about, where it does not say so: it must be the same one in every worker."""
        if notice.apart:
            if len(self._whose) >= MOST:
                self._whose.clear()
            value = str(event.data.get("value")).encode("utf-8", "surrogatepass")
            self._whose[notice.apart] = blake2b(value, digest_size=16, key=self._secret).hexdigest()

    def win(self, notice: Notice) -> bool:
        """Whether this worker is to tell a notice."""
        key = joined(self._secret.hex(), notice.kind, notice.subject, self._whose.get(notice.apart, ""))
        asked = [each.change(ALERT, key, self._claim) for each in fleets()]
        return all(self._is_mine(one) for one in asked)

    def _claim(self, row: Row | None, now: float) -> Change | None:
        if row is not None and row["worker"] != self._me and now < row["until"]:
            return None
        return Change({"worker": self._me, "until": now + self._every})

    def _is_mine(self, asked: Future[Row | None]) -> bool:
        try:
            row = asked.result(PATIENCE)
        except Exception:  # the store is away, closed, or slow
            return True
        return row is None or row.get("worker") == self._me

"""What becomes of a call while the store cannot decide: it is refused, or its process goes on alone."""

from __future__ import annotations

from dataclasses import replace

from dspy_prod.pipeline.attempt import Attempt
from dspy_prod.runtime.ids import IDS
from dspy_prod.stores.base import PENDING, Reservation


def unaided(attempt: Attempt) -> Reservation | None:
    """The same reservation for its process to decide alone, where every policy behind it allows that; else None.

    A call without a budget goes by `RateLimit.on_store_failure`, one with budgets by that of each of them as well.
    """
    reservation, store = attempt.reservation, attempt.call.pipeline.store
    if reservation is None or not store.durable or attempt.call.late():
        return None
    if any(rule.options.on_store_failure == "refuse" for rule in attempt.rules):
        return None
    if reservation.limit is not None and reservation.limit.on_store_failure == "refuse":
        return None
    return replace(
        reservation, id=IDS.make(), state=PENDING, refusal=None, blocked_on="", spent=(), seq=0, wake=None, share=None,
        debit=None, stub=None,
    )  # fmt: skip

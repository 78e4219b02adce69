"""When everything is back: what the store says, compared with the provider's bill."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing

from dspy_prod.records import Totals
from dspy_prod.stores.base import Store
from dspy_prod.testing import Bill
from tests.chaos.fleet.stores import SqliteFile, ValkeyProcess

PATIENCE = 30.0
"""Seconds within which what the dead held must be charged: their lease, and turns of a busy machine."""

Violation = tuple[str, str]
"""The invariant, and how it was violated."""


def charged(store: Store) -> Totals:
    """All that the ledger has."""
    return Totals(*map(sum, zip(Totals(), *(each for _, _, each in store.totals()), strict=True)))


def checked(shared: SqliteFile | ValkeyProcess, bill: Bill, budget: int, all_lived: bool) -> Iterator[Violation]:
    """Compare, and tell what differs.

    Args:
        budget: in nano-USD.
        all_lived: no worker was killed, nor stopped for longer than its lease: one record of a dead one may stand for
            many calls.
    """
    if bill.nano > budget:
        yield "bill <= budget", f"the provider billed {bill.nano} nano-USD of {budget}"
    with closing(shared.opened()) as store:
        yield from _left_over(store, shared)
        yield from _charges(store, bill, all_lived)
    if said := shared.verdict():
        yield "the store can be read", said


def _left_over(store: Store, shared: SqliteFile | ValkeyProcess) -> Iterator[Violation]:
    deadline = time.monotonic() + PATIENCE
    held = 0
    while time.monotonic() < deadline:
        held = sum(state.held for _, state in store.accounts("", "", 10))
        if not store.holds() and not held:
            return
        time.sleep(0.05)
    yield "nothing stays held", f"{store.holds()} holds, {held} nano-USD; {shared.held()}"


def _charges(store: Store, bill: Bill, all_lived: bool) -> Iterator[Violation]:
    sums = charged(store)
    if sums.unknown_cost:
        yield "ledger == bill", f"{sums.unknown_cost} charges are unknown"
    if sums.cost_nano < bill.nano:
        yield "ledger >= bill", f"the ledger has {sums.cost_nano} nano-USD, the bill {bill.nano}"
    confirmed = sums.cost_nano - sums.unconfirmed_nano
    if confirmed > bill.nano:
        yield "ledger - unconfirmed <= bill", f"{confirmed} nano-USD are confirmed, {bill.nano} billed"
    records = store.records()
    mine = Counter(each.cost_nano for each in records if each.cost_nano and not each.estimated)
    billed = Counter(row.nano for row in bill.rows if row.nano)
    if extra := mine - billed:
        yield "ledger == bill", f"confirmed charges that were never billed: {dict(extra.most_common(5))}"
    unsure = sum(1 for each in records if each.cost_nano and each.estimated)
    if all_lived and (missing := (billed - mine).total()) > unsure:
        yield "ledger == bill", f"{missing} billed calls are not confirmed, {unsure} records are not"
    spent = sum(state.spent for _, state in store.accounts("", "", 10))
    if spent != sums.cost_nano:
        yield "account == ledger", f"accounts say {spent} nano-USD spent, the ledger {sums.cost_nano}"
    if (recorded := sum(each.cost_nano or 0 for each in records)) != sums.cost_nano:
        yield "account == ledger", f"records say {recorded} nano-USD, sums {sums.cost_nano}"

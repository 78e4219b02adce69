"""A batch that is decided once more, because others changed what it was decided on."""

from __future__ import annotations

import pytest

from dspy_prod.options import RateLimit
from dspy_prod.stores.admission.core import AdmissionCore
from dspy_prod.stores.base import GRANTED, AccountState, Reservation
from tests.stores.support import CENT, DOLLAR, ask, settlement


class Nothing:
    """A store that has nothing."""

    owner = "me"

    def __init__(self) -> None:
        self.account: AccountState | None = None

    def load_account(self, key: str) -> AccountState | None:
        return self.account

    def load_terms(self, title: str) -> None:
        return None

    def load_limiter(self, key: str) -> None:
        return None

    def load_abandoned(self, id: str) -> None:
        return None


def verdicts(core: AdmissionCore) -> list[tuple[Reservation, int]]:
    assert core.changes is not None
    return [(reservation, state) for reservation, state, _ in core.changes.verdicts]


def commit(core: AdmissionCore) -> None:
    """What a store does after it has written."""
    assert core.changes is not None
    core.written()
    for reservation, state, refusal in core.changes.verdicts:
        reservation.state, reservation.refusal = state, refusal
    core.changes.clear()


@pytest.mark.parametrize("limit", [None, RateLimit(concurrency=1)])
def test_who_waited_waits_again_in_his_old_place(limit: RateLimit | None) -> None:
    """And who was admitted by the batch is in no line: the batch admits him again."""
    backing = Nothing()
    core = AdmissionCore(backing)
    first, second, third, fresh = (ask(60 * CENT, limit=limit) for _ in range(4))
    for each in (first, second, third):
        core.admit(each, 1.0)
    assert verdicts(core) == [(first, GRANTED)]
    commit(core)
    backing.account = AccountState(0, 60 * CENT, 0)

    core.settle(settlement(first, CENT), 2.0)
    core.admit(fresh, 2.0)
    assert verdicts(core) == [(second, GRANTED)]
    core.again({fresh})
    assert verdicts(core) == []
    assert core.waiting() == 2
    assert list(core.holds) == [first.id]
    assert core.account("day") == backing.account

    core.settle(settlement(first, CENT), 3.0)
    core.admit(fresh, 3.0)
    assert verdicts(core) == [(second, GRANTED)]
    commit(core)
    backing.account = AccountState(CENT, 60 * CENT, 0)
    core.settle(settlement(second, CENT), 4.0)
    assert verdicts(core) == [(third, GRANTED)]
    assert core.waiting() == 1


def test_a_hold_that_was_given_up_in_the_batch_is_given_up_in_its_time() -> None:
    """Its lease was forgotten with the batch, and it would have been held for ever."""
    core = AdmissionCore(Nothing())
    core.admit(ask(CENT, budget=DOLLAR, lease=10.0), 1.0)
    commit(core)
    core.tick(12.0)
    assert not core.holds
    core.again(set())
    assert len(core.holds) == 1
    assert core.next_due() <= 12.0
    core.tick(12.0)
    assert not core.holds

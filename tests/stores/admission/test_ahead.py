"""Between processes a grant is made before the moment at which its call may go, and its caller waits for that."""

from __future__ import annotations

from math import inf

import pytest

from dspy_prod.options import RateLimit
from dspy_prod.stores.admission.core import AdmissionCore
from dspy_prod.stores.admission.window import LEAD, LEAD_ALONE
from dspy_prod.stores.base import GRANTED, PENDING
from tests.stores.admission.test_core import Disk, durable
from tests.stores.support import ask, settlement

PACED = RateLimit(rpm=600, burst=1)
QUICK = RateLimit(rpm=6000, burst=1)
APART = 60 / 6000 * 1.04


def commit(core: AdmissionCore, disk: Disk) -> None:
    """What is decided is written and told, as a durable store does it."""
    changes = core.changes
    assert changes is not None
    core.take_turns(0.0)
    for key in changes.limiters:
        state = core.limiter_state(key)
        assert state is not None
        disk.limiters[key] = state.dump(), state.limit
    for reservation, state, refusal in changes.verdicts:
        reservation.state, reservation.refusal = state, refusal
    core.written()
    changes.clear()


def test_between_processes_a_grant_is_made_before_its_moment_and_dated_by_it() -> None:
    """What it takes to make it would else be lost of the limit; each call goes when it would have gone."""
    core, disk = durable()
    calls = [core.admit(ask(0, budget=None, limit=QUICK, horizon=inf), 1_000.0) for _ in range(30)]
    commit(core, disk)
    early = [each.granted_at - 1_000.0 for each in calls if each.state == GRANTED]
    assert early == pytest.approx([number * APART for number in range(len(early))], abs=0.006)
    assert early[-1] <= LEAD_ALONE < early[-1] + APART
    core.tick(core.next_due() - 0.001)
    commit(core, disk)
    assert calls[len(early)].state == PENDING
    core.tick(core.next_due())
    commit(core, disk)
    assert calls[len(early)].granted_at - 1_000.0 == pytest.approx(len(early) * APART, abs=0.006)
    assert calls[-1].state == PENDING


def test_a_grant_for_a_moment_that_is_not_awaited_gives_it_back() -> None:
    core, disk = durable()
    limit = RateLimit(rpm=660, burst=1)
    one, other = (core.admit(ask(0, budget=None, limit=limit, horizon=inf), 1_000.0) for _ in range(2))
    commit(core, disk)
    assert one.granted_at < other.granted_at
    core.settle(settlement(other, 0, sent=False), 1_000.01)
    following = core.admit(ask(0, budget=None, limit=limit, horizon=inf), 1_000.02)
    commit(core, disk)
    assert following.granted_at == pytest.approx(other.granted_at, abs=0.006)


@pytest.mark.parametrize("limit", [RateLimit(rpm=600, burst=1, concurrency=1), RateLimit(concurrency=1)])
def test_nobody_is_granted_ahead_what_only_a_release_can_give(limit: RateLimit) -> None:
    core, _ = durable()
    calls = [core.admit(ask(0, budget=None, limit=limit, horizon=inf), 1_000.0) for _ in range(2)]
    assert core.waiting() == 1
    assert calls[0].granted_at == 1_000.0
    core.tick(1_000.2)
    assert core.waiting() == 1
    assert not core.timed


def test_who_waits_for_tokens_waits_for_no_moment() -> None:
    """They come back whenever a call ends, in any process: its store looks for that as often as for a release."""
    core, disk = durable()
    limit = RateLimit(rpm=600_000, tpm=60_000)
    for _ in range(2):
        core.admit(ask(0, budget=None, limit=limit, tokens=30_000, horizon=inf), 1_000.0)
    commit(core, disk)
    assert core.waiting() == 1
    assert core.next_due() < inf, "pacing says when it may go if none comes back"
    assert not core.timed


def test_who_waits_for_his_turn_waits_for_no_moment() -> None:
    """It is over when the other process has gone, not when the rate says so."""
    core, _ = durable()
    calls = [core.admit(ask(0, budget=None, limit=PACED, horizon=inf), 1_000.0) for _ in range(4)]
    head = calls[4 - core.waiting()]
    assert core.timed
    state = core.limiter_state("provider")
    assert state is not None
    state.turns.wait("other", 0, core.next_due())  # of a higher priority
    core.tick(core.next_due())
    assert head.blocked_on == "requests"
    assert not core.timed


def test_nobody_is_granted_ahead_after_the_provider_said_something() -> None:
    core, _ = durable()
    core.admit(ask(0, budget=None, limit=PACED, horizon=inf), 1_000.0)
    core.throttled("provider", PACED, 0.1, 1_000.0)
    core.admit(ask(0, budget=None, limit=PACED, horizon=inf), 1_000.0)
    assert core.waiting() == 1


def test_who_is_next_among_processes_has_longer_than_the_others() -> None:
    """So that not all of them try for the same place at once."""
    (mine, disk), theirs = durable(), Disk()
    theirs.limiters, theirs.owner = disk.limiters, "other"
    other = AdmissionCore(theirs)
    for core in (mine, other):
        for _ in range(6):
            core.admit(ask(0, budget=None, limit=PACED, horizon=inf), 1_000.0)
        core.take_turns(1_000.0)
        commit(core, theirs if core is other else disk)
    mine.forget()
    mine.serve(1_000.0)
    state = mine.limiter_state("provider")
    assert state is not None
    leads = [state.lead(process, 1_000.0) for process in ("disk", "other")]
    assert sorted(leads) == [LEAD / 2, LEAD]


def test_who_gives_up_before_the_moment_is_granted_nothing_for_it() -> None:
    """Nor is the line looked at again and again until then."""
    core, disk = durable()
    calls = [core.admit(ask(0, budget=None, limit=PACED, horizon=inf), 1_000.0) for _ in range(9)]
    commit(core, disk)
    head = next(each for each in calls if each.state == PENDING)
    head.horizon, due = 1_000.0, core.next_due()
    core.tick(due)
    commit(core, disk)
    assert head.state == PENDING
    assert core.next_due() >= due + LEAD_ALONE - 0.001

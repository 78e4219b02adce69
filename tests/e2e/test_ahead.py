"""A call that a durable store grants ahead of its moment waits for it, and gives it back if it does not go."""

from __future__ import annotations

import asyncio
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest

import dspy_prod
from dspy_prod import RateLimit
from dspy_prod.stores.base import PENDING, Reservation
from dspy_prod.testing import FaultPlan, Provider, Status
from tests.e2e.support import Crowd, make_lm, together, until

PACED = RateLimit(rpm=600, burst=1)
APART = 60 / 600


@pytest.mark.parametrize("crowd", ["threads", "tasks"])
def test_no_call_leaves_before_its_moment(tmp_path: Path, crowd: Crowd, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some are granted up to half a second before it."""
    with Provider() as provider:
        lm = make_lm(provider.url, store=f"sqlite:///{tmp_path / 'state.db'}", limit=PACED)
        store, asked = lm.pipeline.store, []
        admit = store.admit
        monkeypatch.setattr(store, "admit", lambda reservation: asked.append(reservation) or admit(reservation))
        told: list[str] = []
        remove = dspy_prod.add_listener(lambda event: told.append(event.name))
        assert all(not isinstance(each, Exception) for each in together(crowd, lm, 8))
        remove()
        since = store.now() - time.monotonic()
        came = sorted(call.received_at + since for call in provider.calls)
        moments = sorted(reservation.granted_at for reservation in asked)
        assert all(at >= moment - 0.001 for at, moment in zip(came, moments, strict=True))
        assert moments[-1] - moments[0] >= 7 * APART
        assert told.count("waiting") == told.count("waited") == 7
        lm.close()


def test_a_task_that_is_cancelled_while_it_waits_for_its_moment_gives_it_back(tmp_path: Path) -> None:
    with Provider() as provider:
        lm = make_lm(provider.url, store=f"sqlite:///{tmp_path / 'state.db'}", limit=PACED)

        async def cancelled() -> None:
            tasks = [asyncio.ensure_future(lm.acall(f"question {number}")) for number in range(3)]
            await tasks[0]
            await asyncio.sleep(0.02)
            for task in tasks:
                task.cancel()
                with suppress(asyncio.CancelledError):
                    await task
            await lm.pipeline.aclose()

        asyncio.run(cancelled())
        store = lm.pipeline.store
        assert store.flush(5)
        assert store.holds() == 0
        snapshot = store.limiter(lm.pipeline.primary.limit_key)
        assert snapshot is not None
        assert snapshot.in_flight == 0
        assert snapshot.requests_available == 600 - len(provider.calls)
        lm.close()


def test_a_run_that_is_stopped_meanwhile_sends_nothing_more(tmp_path: Path) -> None:
    """What was granted ahead is not under way yet."""
    with Provider() as provider:
        lm = make_lm(provider.url, store=f"sqlite:///{tmp_path / 'state.db'}", limit=RateLimit(rpm=120, burst=1))
        run = dspy_prod.Run("it", usd=1, store=f"sqlite:///{tmp_path / 'state.db'}")
        lm("the first one")
        threading.Timer(0.1, run.stop).start()
        with dspy_prod.call_context(run=run), pytest.raises(dspy_prod.RunStoppedError):
            lm("granted ahead")
        assert len(provider.calls) == 1
        lm.close()
        assert lm.pipeline.store.holds() == 0


def test_what_was_granted_ahead_goes_back_into_line_when_the_provider_says_no(tmp_path: Path) -> None:
    """Nine calls more reached it in the half second after its 429."""
    with Provider(faults=FaultPlan.window(Status(429, retry_after=1.5), 2, 1)) as provider:
        lm = make_lm(
            provider.url, store=f"sqlite:///{tmp_path / 'state.db'}", limit=RateLimit(rpm=1200, burst=1), retry=False
        )
        answers = together("threads", lm, 12)
        assert sum(isinstance(each, Exception) for each in answers) == 1
        lm.close()
        received = [call.received_at for call in provider.calls]
        assert len(received) == 12
        assert [at - received[2] for at in received[4:] if at - received[2] < 1.4] == [], "one may be on its way"
        assert lm.pipeline.store.holds() == 0


def test_who_sees_only_late_that_it_is_granted_waits_for_its_moment_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The writer may have decided before the caller looks for the first time."""
    with Provider() as provider:
        lm = make_lm(provider.url, store=f"sqlite:///{tmp_path / 'state.db'}", limit=PACED)
        store = lm.pipeline.store
        admit = store.admit

        def looked_at_late(reservation: Reservation) -> Reservation:
            found = admit(reservation)
            until(lambda: found.state != PENDING or found.blocked_on)
            return found

        monkeypatch.setattr(store, "admit", looked_at_late)
        together("threads", lm, 6)
        came = sorted(call.received_at for call in provider.calls)
        assert came[-1] - came[0] >= 5 * APART - 0.01
        lm.close()


def test_a_clock_that_was_set_back_holds_up_nobody_for_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The moment seemed to be as far away as the clock had been set."""
    with Provider() as provider:
        lm = make_lm(provider.url, store=f"sqlite:///{tmp_path / 'state.db'}", limit=PACED)
        store = lm.pipeline.store
        lm("the first one")
        now = store.now
        monkeypatch.setattr(store, "now", lambda: now() - 30.0)
        began = time.monotonic()
        lm("granted ahead")
        assert time.monotonic() - began < 5.0
        monkeypatch.undo()
        lm.close()

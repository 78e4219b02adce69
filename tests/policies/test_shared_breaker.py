"""One circuit for all workers: two breakers on two stores of one file, as two processes have them, on a fake clock."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dspy_prod.errors import CircuitOpenError
from dspy_prod.options import CircuitBreaker
from dspy_prod.policies.breaker.permit import Permit
from dspy_prod.policies.fleet import Fleet
from dspy_prod.policies.orders import Order
from dspy_prod.policies.shared_breaker import RETURN, SharedBreaker
from dspy_prod.stores.sqlite.store import SqliteStore
from dspy_prod.telemetry.events import EventBus
from tests.policies.conftest import FakeClock

OPTIONS = CircuitBreaker(
    failure_threshold=2, recovery_timeout=10, max_recovery_timeout=100, jitter=0, success_threshold=2, probe_lease=30
)


class Worker:
    """A process: its store, its fleet, its breaker, and what its listeners hear."""

    def __init__(self, path: str, clock: FakeClock, options: CircuitBreaker, shares: bool = True) -> None:
        self.store = SqliteStore(path, clock=clock)
        self.fleet = Fleet(self.store.board, self.store.url, durable=True)
        self.events: list[tuple[str, Any]] = []
        bus = EventBus()
        bus.add(lambda event: self.events.append((event.name, event.data.get("cause"))))
        self.fleet.look()
        self.breaker = SharedBreaker(
            options, name="m", place="p|m", key="k", fleet=self.fleet, shares=shares, clock=clock, bus=bus
        )

    @property
    def state(self) -> str:
        return self.breaker.snapshot().state

    def call(self) -> Permit:
        """A permit, as a call gets it."""
        self.fleet.look()
        self.breaker.check()
        permit = self.breaker.permit()
        if permit.asked is not None:
            permit.asked.answer.exception(10)
            self.breaker.decided(permit)
        return permit

    def fail(self, times: int = 1) -> None:
        for _ in range(times):
            self.breaker.failure(self.call(), 0.1, "LMServerError 503")
        self.written()

    def succeed(self) -> None:
        self.breaker.success(self.call(), 0.1)
        self.written()

    def written(self) -> None:
        assert self.store.flush(10)

    def row(self) -> Any:
        self.written()
        return self.store.board.rows()["circuit", "k"]


@pytest.fixture
def worker(tmp_path: Path, clock: FakeClock) -> Iterator[Callable[..., Worker]]:
    made: list[Worker] = []

    def make(options: CircuitBreaker = OPTIONS, **more: Any) -> Worker:
        made.append(Worker(str(tmp_path / "state.db"), clock, options, **more))
        return made[-1]

    yield make
    for each in made:
        each.store.close()


@pytest.fixture
def two(worker: Callable[..., Worker]) -> tuple[Worker, Worker]:
    return worker(), worker()


def refused(worker: Worker) -> CircuitOpenError:
    with pytest.raises(CircuitOpenError) as caught:
        worker.call()
    return caught.value


def test_opened_for_one_it_is_open_for_all(two: tuple[Worker, Worker]) -> None:
    """With the cause and the interval of the one who counted."""
    one, other = two
    one.fail(2)
    error = refused(other)
    assert error.retry_after == pytest.approx(10)
    assert error.cause_text == "2 failures in a row, last: LMServerError 503"
    assert [name for name, _ in one.events] == [name for name, _ in other.events] == ["breaker_opened"]


def test_each_worker_counts_its_own_calls(two: tuple[Worker, Worker]) -> None:
    """One failure here and one there are not two in a row."""
    for each in two:
        each.fail()
    assert [each.state for each in two] == ["closed", "closed"]


def test_a_worker_that_begins_later_finds_it_open(worker: Callable[..., Worker]) -> None:
    """And tells nobody, for nothing has changed."""
    worker().fail(2)
    late = worker()
    assert late.state == "open"
    assert late.events == []


def test_one_probe_is_out_over_all_workers(two: tuple[Worker, Worker], clock: FakeClock) -> None:
    one, other = two
    one.fail(2)
    clock.advance(10.1)
    probe = other.call()
    assert probe.probe
    assert refused(one).retry_after == pytest.approx(30, abs=0.2)
    other.breaker.success(probe, 0.1)
    other.written()
    assert one.call().probe


def test_two_that_ask_at_once_share_one_probe(two: tuple[Worker, Worker], clock: FakeClock) -> None:
    """Both have seen the circuit as open, and only the store knows who came first."""
    one, other = two
    one.fail(2)
    assert other.state == "open"
    clock.advance(10.1)
    asked = [(each, each.breaker.permit()) for each in two]
    granted = 0
    for each, permit in asked:
        assert permit.asked is not None
        permit.asked.answer.result(10)
        try:
            each.breaker.decided(permit)
            granted += 1
        except CircuitOpenError:
            assert permit.generation == -1
    assert granted == 1


def test_probes_of_all_workers_close_it_for_all(two: tuple[Worker, Worker], clock: FakeClock) -> None:
    one, other = two
    one.fail(2)
    clock.advance(10.1)
    one.succeed()
    assert other.state == "half_open"
    other.succeed()
    assert [each.state for each in two] == ["closed", "closed"]
    assert not one.call().probe
    assert one.row()["generation"] == 3
    assert one.events[-1][0] == other.events[-1][0] == "breaker_closed"


def test_probes_of_one_worker_follow_each_other_at_once(worker: Callable[..., Worker], clock: FakeClock) -> None:
    """Nobody has to wait until the end of one is written."""
    one = worker()
    one.fail(2)
    clock.advance(10.1)
    for _ in range(2):
        one.breaker.success(one.call(), 0.1)
    assert not one.call().probe
    one.written()
    assert one.state == "closed"


def test_a_failed_probe_opens_it_for_all_and_for_longer(two: tuple[Worker, Worker], clock: FakeClock) -> None:
    one, other = two
    one.fail(2)
    clock.advance(10.1)
    other.fail()
    assert refused(one).retry_after == pytest.approx(20)
    assert refused(other).retry_after == pytest.approx(20)
    clock.advance(20.1)
    one.fail()
    assert refused(other).retry_after == pytest.approx(40)


def test_the_probe_of_a_dead_worker_is_written_off(two: tuple[Worker, Worker], clock: FakeClock) -> None:
    """It counts as failed when its lease ends, whoever looks first."""
    one, other = two
    one.fail(2)
    clock.advance(10.1)
    one.call()  # and one dies
    assert other.state == "half_open"
    clock.advance(30.1)
    assert "did not report" in refused(other).cause_text
    assert other.row()["state"] == "open"
    clock.advance(20.1)
    assert other.call().probe


def test_a_probe_that_nobody_waits_for_is_given_back(two: tuple[Worker, Worker], clock: FakeClock) -> None:
    """The call was cancelled while the store was asked."""
    one, other = two
    one.fail(2)
    clock.advance(10.1)
    permit = one.breaker.permit()
    one.breaker.release(permit)
    assert one.row()["probes"] == {}
    assert other.call().probe


def test_a_released_probe_frees_its_place(two: tuple[Worker, Worker], clock: FakeClock) -> None:
    one, other = two
    one.fail(2)
    clock.advance(10.1)
    one.breaker.release(one.call())
    assert one.row()["probes"] == {}
    assert other.call().probe


def test_what_was_sent_before_it_opened_changes_nothing(two: tuple[Worker, Worker], clock: FakeClock) -> None:
    """Not while it is open, and not after all closed it again meanwhile."""
    one, other = two
    before = [other.call() for _ in range(4)]
    one.fail(2)
    other.breaker.failure(before[0], 0.1, "late")
    assert other.row()["generation"] == 1
    clock.advance(10.1)
    one.succeed()
    one.succeed()
    for permit in before[1:]:
        other.breaker.failure(permit, 0.1, "late")
    assert other.state == "closed"
    assert other.row()["generation"] == 3


def test_two_that_trip_at_once_move_it_once(two: tuple[Worker, Worker]) -> None:
    """The interval does not double, and both are told the same."""
    one, other = two
    permits = [(each, each.call()) for each in two for _ in range(2)]
    for each, permit in permits:
        each.breaker.failure(permit, 0.1, "LMServerError 503")
    assert one.row()["generation"] == 1
    other.written()
    assert one.row()["generation"] == 1
    assert refused(one).retry_after == pytest.approx(10)
    assert refused(other).retry_after == pytest.approx(10)


def test_an_operator_moves_it_everywhere_and_later(two: tuple[Worker, Worker], worker: Callable[..., Worker]) -> None:
    one, other = two
    one.fleet.order(Order("m", "force_open", "prices", "me", 1.0, "1"))
    assert "forced open by an operator: prices" in str(refused(other))
    assert worker().state == "forced_open"
    one.fleet.order(Order("p|m", "disable", "", "me", 2.0, "2"))
    other.fail(5)
    assert one.state == other.state == "disabled"
    one.fleet.order(Order("p|m", "reset", "", "me", 3.0, "3"))
    assert one.state == other.state == worker().state == "closed"


def test_a_reset_closes_what_the_workers_opened(two: tuple[Worker, Worker]) -> None:
    one, other = two
    one.fail(2)
    other.fleet.order(Order("m", "reset", "repaired", "me", 1.0, "1"))
    assert one.state == other.state == "closed"
    assert one.row()["state"] == "closed"
    one.fail(2)
    assert refused(other).retry_after == pytest.approx(10)


def test_who_does_not_share_obeys_operators_alone(worker: Callable[..., Worker]) -> None:
    one, other = worker(shares=False), worker(shares=False)
    one.fail(2)
    assert (one.state, other.state) == ("open", "closed")
    one.fleet.order(Order("m", "force_open", "", "me", 1.0, "1"))
    assert other.state == "forced_open"


def test_without_the_store_each_worker_is_on_its_own(two: tuple[Worker, Worker], clock: FakeClock) -> None:
    """It opens, probes and closes as if it were alone, and says so once."""
    one, other = two
    one.store.close()
    for _ in range(2):
        one.breaker.failure(one.call(), 0.1, "LMServerError 503")
    assert (one.state, other.state) == ("open", "closed")
    clock.advance(10.1)
    for _ in range(2):
        one.breaker.success(one.call(), 0.1)
    assert one.state == "closed"
    assert [name for name, _ in one.events if name == "breaker_alone"] == ["breaker_alone"]


def test_a_store_that_comes_back_is_told(
    two: tuple[Worker, Worker], clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A circuit that opened meanwhile opens for all."""
    one, other = two
    with monkeypatch.context() as patched:
        patched.setattr(one.store.board._mailbox, "post", lambda operation: False)
        for _ in range(2):
            one.breaker.failure(one.call(), 0.1, "LMServerError 503")
        assert refused(one)
    assert other.state == "closed"
    clock.advance(RETURN + 0.1)
    refused(one)
    one.written()
    assert refused(other).retry_after == pytest.approx(10 - RETURN, abs=0.2)


@pytest.mark.parametrize(("settle", "heard"), [("failure", "breaker_opened"), ("success", "breaker_closed")])
def test_ctrl_c_in_a_listener_keeps_the_end_of_a_probe_from_nobody(
    worker: Callable[..., Worker], clock: FakeClock, settle: str, heard: str
) -> None:
    """The worker's own circuit had moved; to all others its probe was out until the lease ended."""
    one = worker(OPTIONS.model_copy(update={"success_threshold": 1}))
    one.fail(2)
    clock.advance(10.1)
    probe = one.call()

    def interrupted(event: Any) -> None:
        if event.name == heard:
            raise KeyboardInterrupt

    one.breaker._bus.add(interrupted)
    arguments: Any = (0.1, "LMServerError 503") if settle == "failure" else (0.1,)
    with pytest.raises(KeyboardInterrupt):
        getattr(one.breaker, settle)(probe, *arguments)
    row = one.row()
    assert (row["state"], row["probes"]) == ("open" if settle == "failure" else "closed", {})


def test_a_probe_that_was_asked_for_is_released_again_after_ctrl_c(
    worker: Callable[..., Worker], clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the first word of its release and the store's hearing of it."""
    one = worker()
    one.fail(2)
    clock.advance(10.1)
    permit = one.breaker.permit()
    assert permit.asked is not None
    assert permit.asked.answer.exception(10) is None

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(one.breaker, "_post", interrupted)
        with pytest.raises(KeyboardInterrupt):
            one.breaker.release(permit)
    one.breaker.release(permit)
    assert one.row()["probes"] == {}

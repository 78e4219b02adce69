"""Each rule of the circuit breaker, given a circuit, when something happens to it, then what callers see."""

from __future__ import annotations

import math
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest

from dspy_prod.errors import CircuitOpenError
from dspy_prod.options import CircuitBreaker
from dspy_prod.policies.breaker.breaker import Breaker, Permit
from dspy_prod.policies.breaker.states import HalfOpen
from dspy_prod.telemetry.events import Event, EventBus
from tests.policies.conftest import FakeClock


class Circuit:
    """A breaker under test, with its clock, what it told listeners, and shorthand for calls."""

    def __init__(
        self, *, clock: FakeClock | None = None, random: Callable[[], float] = lambda: 0.0, **options: Any
    ) -> None:
        self.clock = clock or FakeClock()
        self.bus = EventBus()
        self.events: list[Event] = []
        self.bus.add(self.events.append)
        self.breaker = Breaker(
            CircuitBreaker(**options), name="openai/gpt", clock=self.clock, bus=self.bus, random=random
        )

    def succeeds(self, times: int = 1, duration: float = 0.1) -> None:
        for _ in range(times):
            self.breaker.success(self.breaker.permit(), duration)

    def fails(self, times: int = 1, duration: float = 0.1, retry_after: float | None = None) -> None:
        for _ in range(times):
            self.breaker.failure(self.breaker.permit(), duration, "LMServerError 503", retry_after)

    def refusal(self) -> CircuitOpenError:
        """What `check` and `permit` both refuse with."""
        with pytest.raises(CircuitOpenError) as checked:
            self.breaker.check()
        with pytest.raises(CircuitOpenError) as refused:
            self.breaker.permit()
        assert str(checked.value) == str(refused.value)
        assert checked.value.retry_after == refused.value.retry_after
        return refused.value

    def interval(self) -> float:
        """How long it will stay open from now on."""
        wait: float | None = self.refusal().retry_after
        assert wait is not None
        return wait

    @property
    def state(self) -> str:
        return self.breaker.snapshot().state

    @property
    def told(self) -> list[str]:
        return [event.name for event in self.events]


def given(**options: Any) -> Circuit:
    """A closed circuit that only opens by the rules a test asks for, without jitter."""
    return Circuit(**{"failure_threshold": None, "failure_rate": None, "jitter": 0.0, **options})


def given_open(**options: Any) -> Circuit:
    """A circuit opened by one failure, for 60 seconds unless the options say otherwise."""
    circuit = given(failure_threshold=1, **options)
    circuit.fails()
    return circuit


def given_half_open(**options: Any) -> Circuit:
    """An open circuit whose interval is over; the next permit is a probe."""
    circuit = given_open(**options)
    circuit.clock.advance(circuit.breaker.options.recovery_timeout)
    return circuit


# -- closed: what opens it ---------------------------------------------------------------------------------------------


def test_a_closed_circuit_admits_every_call_and_permits_are_no_probes() -> None:
    circuit = given()

    circuit.breaker.check()
    first, second = circuit.breaker.permit(), circuit.breaker.permit()

    assert (first.probe, first.generation, first.started) == (False, 0, 1000.0)
    assert first.id != second.id


def test_failures_in_a_row_open_it_at_the_threshold_and_not_before() -> None:
    circuit = given(failure_threshold=3)

    circuit.fails(2)
    assert circuit.state == "closed"
    circuit.fails()

    assert circuit.state == "open"
    assert circuit.breaker.snapshot().cause == "3 failures in a row, last: LMServerError 503"


def test_a_success_interrupts_failures_in_a_row() -> None:
    circuit = given(failure_threshold=3)

    circuit.fails(2)
    circuit.succeeds()
    circuit.fails(2)

    assert circuit.state == "closed"
    assert circuit.breaker.snapshot().consecutive_failures == 2


def test_without_a_threshold_failures_in_a_row_never_open_it() -> None:
    circuit = given()

    circuit.fails(500)

    assert circuit.state == "closed"


def test_an_ignored_outcome_neither_counts_nor_interrupts_failures_in_a_row() -> None:
    circuit = given(failure_threshold=2)

    circuit.fails()
    circuit.breaker.release(circuit.breaker.permit())
    assert circuit.breaker.snapshot()[2:6] == (1, 0, 0, 1)
    circuit.fails()

    assert circuit.state == "open"


def test_the_failure_rate_opens_it_once_there_are_minimum_calls() -> None:
    circuit = given(failure_rate=0.5, window=10, minimum_calls=4)

    circuit.fails(2)
    circuit.succeeds()
    assert circuit.state == "closed"
    circuit.fails()

    assert circuit.state == "open"
    assert circuit.breaker.snapshot().cause == "3 of 4 calls failed, last: LMServerError 503"


def test_a_success_that_completes_minimum_calls_opens_it_when_the_rate_is_reached() -> None:
    circuit = given(failure_rate=0.5, window=10, minimum_calls=4)

    circuit.fails(2)
    circuit.succeeds(2)

    assert circuit.state == "open"


def test_a_failure_rate_below_the_limit_keeps_it_closed() -> None:
    circuit = given(failure_rate=0.5, window=10, minimum_calls=4)

    circuit.succeeds(3)
    circuit.fails(2)

    assert circuit.state == "closed"
    assert circuit.breaker.snapshot().failure_rate == 0.4


@pytest.mark.parametrize(("rate", "failures"), [(0.07, 7), (0.29, 29), (0.57, 57), (0.58, 58), (1.0, 100)])
def test_a_rate_is_reached_at_exactly_its_share(rate: float, failures: int) -> None:
    """0.29 * 100 is 28.999999999999996: the share is compared, not the product."""
    circuit = given(failure_rate=rate, window=100, minimum_calls=100)

    circuit.succeeds(100 - failures)
    circuit.fails(failures - 1)
    circuit.breaker.release(circuit.breaker.permit())
    assert circuit.state == "closed"
    circuit.fails()

    assert circuit.state == "open"


def test_calls_that_left_a_count_window_no_longer_count() -> None:
    circuit = given(failure_rate=0.5, window=4, minimum_calls=4)

    circuit.succeeds(3)
    circuit.fails()
    circuit.succeeds(3)  # the failure is now the oldest of four
    circuit.fails()  # and is replaced by this one

    assert circuit.breaker.snapshot()[1:4] == ("closed", 1, 3)


def test_calls_that_left_a_time_window_no_longer_count() -> None:
    circuit = given(failure_rate=0.5, window=60, window_type="time", minimum_calls=2)

    circuit.succeeds(2)
    circuit.fails()
    circuit.clock.advance(60)
    circuit.fails()

    assert circuit.breaker.snapshot()[1:4] == ("closed", 1, 0)
    circuit.succeeds()
    assert circuit.state == "open"


def test_slow_calls_open_it_at_their_share() -> None:
    circuit = given(slow_call_duration=2, slow_call_rate=0.5, window=10, minimum_calls=4)

    circuit.succeeds(2, duration=2.0)  # as long as allowed
    circuit.succeeds(duration=2.01)
    assert circuit.breaker.snapshot().slow == 1
    circuit.succeeds(duration=9)

    assert circuit.state == "open"
    assert circuit.breaker.snapshot().cause == "2 of 4 calls took over 2 s"


def test_failed_calls_can_be_slow_too() -> None:
    circuit = given(slow_call_duration=2, slow_call_rate=1, window=4, minimum_calls=2)

    circuit.fails(2, duration=30)

    assert circuit.state == "open"
    assert circuit.breaker.snapshot()[2:5] == (2, 0, 2)


def test_without_slow_call_duration_nothing_is_slow() -> None:
    circuit = given(slow_call_rate=0.1, window=2, minimum_calls=1)

    circuit.succeeds(5, duration=1e9)

    assert circuit.breaker.snapshot()[1:5] == ("closed", 0, 2, 0)


def test_the_cause_is_one_short_line() -> None:
    circuit = given(failure_threshold=1)

    circuit.breaker.failure(circuit.breaker.permit(), 0.1, "Oops\n" + "x " * 500)

    cause = circuit.breaker.snapshot().cause
    assert cause.startswith("1 failures in a row, last: Oops x x")
    assert cause.endswith("…")
    assert len(cause) == 160
    circuit.breaker.force_open("x" * 160)
    assert circuit.breaker.snapshot().cause == "x" * 160


# -- open --------------------------------------------------------------------------------------------------------------


def test_an_open_circuit_refuses_with_the_rest_of_its_interval_and_the_cause() -> None:
    circuit = given_open(recovery_timeout=60)
    circuit.clock.advance(20)

    error = circuit.refusal()

    assert error.retry_after == 40
    assert error.route == "openai/gpt"
    assert error.cause_text == "1 failures in a row, last: LMServerError 503"
    assert "'openai/gpt'" in str(error)
    assert "try again in 40.0 s" in str(error)
    copy = pickle.loads(pickle.dumps(error))
    assert (copy.retry_after, copy.cause_text) == (40, error.cause_text)


def test_check_changes_nothing_so_the_circuit_waits_for_a_permit_to_become_half_open() -> None:
    circuit = given_open(recovery_timeout=60)
    circuit.clock.advance(60)

    circuit.breaker.check()
    circuit.breaker.check()

    assert circuit.breaker.snapshot()[1] == "open"
    assert circuit.breaker.snapshot().retry_after == 0
    assert circuit.breaker.permit().probe
    assert circuit.state == "half_open"


@pytest.mark.parametrize("recovery", [60.0, 0.1, 1 / 3, 123.456])
def test_who_waits_exactly_retry_after_is_admitted_whatever_floats_do(recovery: float) -> None:
    circuit = given(failure_threshold=1, recovery_timeout=recovery)
    circuit.clock.advance(0.7)
    circuit.fails()
    circuit.clock.advance(recovery / 7)

    circuit.clock.advance(circuit.interval())

    circuit.breaker.check()
    assert circuit.breaker.permit().probe


def test_the_open_interval_doubles_with_every_trip_in_a_row_up_to_its_maximum_and_is_reset_on_close() -> None:
    circuit = given_open(recovery_timeout=10, max_recovery_timeout=35, success_threshold=1)
    intervals = []

    for _ in range(4):
        intervals.append(circuit.interval())
        circuit.clock.advance(intervals[-1])
        circuit.fails()
    circuit.clock.advance(circuit.interval())
    circuit.succeeds()
    circuit.fails()

    assert intervals == [10, 20, 35, 35]
    assert circuit.interval() == 10


def test_the_interval_survives_a_thousand_trips_in_a_row() -> None:
    circuit = given_open(recovery_timeout=10, max_recovery_timeout=40)

    for _ in range(1100):  # 2.0 ** 1100 is no float
        circuit.clock.advance(40)
        circuit.fails()

    assert circuit.interval() == 40


def test_jitter_lengthens_each_interval_by_at_most_its_share() -> None:
    draws = iter([0.0, 0.5, 0.999])
    circuit = given_open(recovery_timeout=10, max_recovery_timeout=20, jitter=0.2, random=lambda: next(draws))

    first = circuit.interval()
    circuit.clock.advance(first)
    circuit.fails()
    second = circuit.interval()
    circuit.clock.advance(second)
    circuit.fails()

    assert (first, second) == (10, 20 * 1.1)
    assert circuit.interval() == pytest.approx(20 * 1.1998)


@pytest.mark.parametrize(
    ("retry_after", "interval"),
    [(0.5, 0.5), (90.0, 90.0), (1e9, 600.0), (0.0, 60.0), (-5.0, 60.0), (math.nan, 60.0), (math.inf, 60.0)],
)
def test_a_providers_retry_after_sets_the_interval_within_the_maximum(retry_after: float, interval: float) -> None:
    circuit = given(failure_threshold=2, recovery_timeout=60, max_recovery_timeout=600)

    circuit.fails(retry_after=333)  # not the failure that opens it
    circuit.fails(retry_after=retry_after)

    assert circuit.interval() == interval


def test_a_probes_retry_after_sets_the_interval_and_the_doubling_goes_on_behind_it() -> None:
    circuit = given_half_open(recovery_timeout=10)

    circuit.fails(retry_after=5)
    assert circuit.interval() == 5
    circuit.clock.advance(5)
    circuit.fails()

    assert circuit.interval() == 40


def test_retry_after_also_counts_when_a_rate_opens_it() -> None:
    circuit = given(failure_rate=0.5, window=2, minimum_calls=2)

    circuit.fails(2, retry_after=17)

    assert circuit.interval() == 17


# -- half-open ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("probes", [1, 3])
def test_half_open_admits_exactly_so_many_probes_at_a_time(probes: int) -> None:
    circuit = given_half_open(half_open_probes=probes, success_threshold=100, probe_lease=30)

    permits = []
    for _ in range(probes):
        permits.append(circuit.breaker.permit())
        circuit.clock.advance(1)
    error = circuit.refusal()

    assert all(permit.probe for permit in permits)
    assert circuit.breaker.snapshot().probes_in_flight == probes
    assert error.retry_after == 30 - probes  # at the latest when the first lease ends
    circuit.clock.advance(30 - probes - 0.25)
    assert circuit.refusal().retry_after == 0.25
    circuit.breaker.success(permits[-1], 0.1)
    assert circuit.breaker.permit().probe
    circuit.refusal()


def test_success_threshold_probes_close_it() -> None:
    circuit = given_half_open(success_threshold=3)

    circuit.succeeds(2)
    assert circuit.state == "half_open"
    circuit.succeeds()

    assert circuit.state == "closed"
    assert circuit.breaker.snapshot()[2:7] == (0, 0, 0, 0, None)


def test_one_failed_probe_reopens_it() -> None:
    circuit = given_half_open(success_threshold=3, recovery_timeout=60)

    circuit.succeeds(2)
    circuit.fails()

    assert circuit.state == "open"
    assert circuit.interval() == 120
    assert circuit.breaker.snapshot().cause == "a probe failed: LMServerError 503"


def test_probe_successes_are_counted_anew_in_every_half_open_period() -> None:
    circuit = given_half_open(success_threshold=2, recovery_timeout=60)

    circuit.succeeds()
    circuit.fails()
    circuit.clock.advance(120)
    circuit.succeeds()

    assert circuit.state == "half_open"


def test_an_ignored_outcome_frees_the_probe_and_decides_nothing() -> None:
    circuit = given_half_open(success_threshold=1)

    circuit.breaker.release(circuit.breaker.permit())

    assert circuit.state == "half_open"
    assert circuit.breaker.snapshot().probes_in_flight == 0
    circuit.succeeds()
    assert circuit.state == "closed"


def look_by_check(circuit: Circuit) -> None:
    with pytest.raises(CircuitOpenError):
        circuit.breaker.check()


def look_by_permit(circuit: Circuit) -> None:
    with pytest.raises(CircuitOpenError):
        circuit.breaker.permit()


def look_by_snapshot(circuit: Circuit) -> None:
    assert circuit.breaker.snapshot().state == "open"


@pytest.mark.parametrize("look", [look_by_check, look_by_permit, look_by_snapshot])
@pytest.mark.parametrize("free_probes", [0, 1])
def test_a_probe_whose_lease_ran_out_reopens_it_for_whoever_looks_next(
    look: Callable[[Circuit], None], free_probes: int
) -> None:
    circuit = given_half_open(recovery_timeout=60, probe_lease=30, half_open_probes=1 + free_probes)
    circuit.breaker.permit()

    circuit.clock.advance(29.9)
    assert circuit.state == "half_open"
    circuit.clock.advance(0.1)
    look(circuit)

    assert circuit.told == ["breaker_opened", "breaker_half_open", "breaker_opened"]
    snapshot = circuit.breaker.snapshot()
    assert (snapshot.state, snapshot.retry_after, snapshot.opened_count) == ("open", 120, 2)
    assert snapshot.cause == "a probe did not report within 30 s"
    assert (snapshot.total_failures, snapshot.probes_in_flight) == (2, 0)


def late_success(circuit: Circuit, permit: Permit) -> None:
    circuit.breaker.success(permit, 31)


def late_failure(circuit: Circuit, permit: Permit) -> None:
    circuit.breaker.failure(permit, 31, "LMTimeoutError", 5)


def late_release(circuit: Circuit, permit: Permit) -> None:
    circuit.breaker.release(permit)


@pytest.mark.parametrize("settle", [late_success, late_failure, late_release])
@pytest.mark.parametrize("seen_before", [True, False])
def test_the_late_result_of_a_hung_probe_changes_nothing(
    settle: Callable[[Circuit, Permit], None], seen_before: bool
) -> None:
    """Also when it is itself the first to look: the lease has decided, for 120 seconds and not for 5."""
    circuit = given_half_open(recovery_timeout=60, probe_lease=30, success_threshold=1)
    hung = circuit.breaker.permit()
    circuit.clock.advance(31)
    if seen_before:
        circuit.breaker.snapshot()

    settle(circuit, hung)

    assert circuit.told == ["breaker_opened", "breaker_half_open", "breaker_opened"]
    snapshot = circuit.breaker.snapshot()
    assert (snapshot.state, snapshot.retry_after, snapshot.opened_count) == ("open", 120, 2)
    assert (snapshot.total_failures, snapshot.total_successes) == (2, 0)


def test_every_probe_that_hung_counts_as_one_failure_but_the_circuit_opens_once() -> None:
    circuit = given_half_open(half_open_probes=3, probe_lease=30)
    for _ in range(3):
        circuit.breaker.permit()
    circuit.clock.advance(30)

    snapshot = circuit.breaker.snapshot()

    assert (snapshot.total_failures, snapshot.opened_count) == (4, 2)


def test_one_hung_probe_outweighs_the_success_of_another_that_comes_after_it() -> None:
    circuit = given_half_open(half_open_probes=2, probe_lease=30, success_threshold=1)
    circuit.breaker.permit()
    circuit.clock.advance(15)
    good = circuit.breaker.permit()
    circuit.clock.advance(15)

    circuit.breaker.success(good, 15)

    assert circuit.state == "open"
    assert circuit.breaker.snapshot().total_successes == 0


def test_leases_of_settled_probes_are_over() -> None:
    circuit = given_half_open(probe_lease=30, success_threshold=9)

    circuit.succeeds()
    circuit.clock.advance(500)

    assert circuit.state == "half_open"
    circuit.breaker.check()


def test_probes_as_slow_as_what_opens_a_circuit_do_not_close_it() -> None:
    """As in Resilience4j: else a circuit that slowness opened would close on slowness."""
    circuit = given_half_open(slow_call_duration=2, slow_call_rate=0.5, success_threshold=2)

    circuit.succeeds(duration=1)
    circuit.succeeds(duration=3)

    assert circuit.state == "open"
    assert circuit.breaker.snapshot().cause == "1 of 2 probes took over 2 s"
    assert circuit.breaker.snapshot().total_successes == 2


def test_fewer_slow_probes_than_that_close_it() -> None:
    circuit = given_half_open(slow_call_duration=2, slow_call_rate=0.6, success_threshold=2)

    circuit.succeeds(duration=2)
    circuit.succeeds(duration=3)

    assert circuit.state == "closed"


# -- generations -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["open", "half_open", "closed again"])
@pytest.mark.parametrize("settle", [late_success, late_failure, late_release])
def test_the_result_of_a_call_sent_before_the_trip_changes_nothing(
    settle: Callable[[Circuit, Permit], None], when: str
) -> None:
    circuit = given(failure_threshold=2, success_threshold=2)
    early = circuit.breaker.permit()
    circuit.fails(2)
    if when != "open":
        circuit.clock.advance(60)
        circuit.succeeds()
    if when == "closed again":
        circuit.succeeds()
        circuit.fails()
    before, told = circuit.breaker.snapshot(), len(circuit.events)

    settle(circuit, early)

    assert circuit.breaker.snapshot() == before
    assert len(circuit.events) == told
    assert before.state == when.split()[0]


def test_a_probe_of_an_earlier_half_open_period_is_no_probe_of_this_one() -> None:
    circuit = given_half_open(half_open_probes=2, success_threshold=1, recovery_timeout=10, probe_lease=500)
    early = circuit.breaker.permit()
    circuit.fails()
    circuit.clock.advance(20)
    now = circuit.breaker.permit()

    circuit.breaker.success(early, 21)

    assert circuit.state == "half_open"
    assert circuit.breaker.snapshot().probes_in_flight == 1
    circuit.breaker.success(now, 1)
    assert circuit.state == "closed"


@pytest.mark.parametrize("first", [late_success, late_failure, late_release])
@pytest.mark.parametrize("second", [late_success, late_failure, late_release])
def test_a_permit_settles_once(
    first: Callable[[Circuit, Permit], None], second: Callable[[Circuit, Permit], None]
) -> None:
    circuit = given(failure_threshold=2)
    permit = circuit.breaker.permit()

    first(circuit, permit)
    before = circuit.breaker.snapshot()
    second(circuit, permit)

    assert circuit.breaker.snapshot() == before
    assert before.total_successes + before.total_failures == (first is not late_release)


def test_a_probe_settles_once() -> None:
    circuit = given_half_open(success_threshold=2)
    permit = circuit.breaker.permit()

    circuit.breaker.success(permit, 0.1)
    circuit.breaker.success(permit, 0.1)
    circuit.breaker.failure(permit, 0.1, "LMServerError 503")

    assert circuit.state == "half_open"
    assert circuit.breaker.snapshot().total_successes == 1


# -- the operator ------------------------------------------------------------------------------------------------------


def test_forced_open_refuses_until_reset_however_long_it_takes() -> None:
    circuit = given()

    circuit.breaker.force_open("provider maintenance")
    circuit.clock.advance(1e9)
    error = circuit.refusal()

    assert (error.retry_after, error.cause_text) == (None, "provider maintenance")
    assert "until an operator resets it" in str(error)
    snapshot = circuit.breaker.snapshot()
    assert (snapshot.state, snapshot.open_for, snapshot.retry_after) == ("forced_open", 1e9, None)
    circuit.breaker.reset()
    assert circuit.state == "closed"
    circuit.breaker.check()


def test_force_open_says_by_itself_who_did_it() -> None:
    circuit = given()

    circuit.breaker.force_open()

    assert circuit.refusal().cause_text == "forced open by an operator"


def test_forcing_it_open_again_changes_the_reason_and_tells_nobody() -> None:
    circuit = given()

    circuit.breaker.force_open("first")
    circuit.clock.advance(5)
    circuit.breaker.force_open("second")

    assert circuit.refusal().cause_text == "second"
    assert circuit.told == ["breaker_opened"]
    assert (circuit.breaker.snapshot().opened_count, circuit.breaker.snapshot().open_for) == (1, 5)


def test_a_probe_in_flight_does_not_undo_what_the_operator_forced() -> None:
    circuit = given_half_open(success_threshold=1)
    probe = circuit.breaker.permit()

    circuit.breaker.force_open()
    circuit.breaker.success(probe, 0.1)

    assert circuit.state == "forced_open"


def test_disabled_admits_every_call_and_counts_none_in_the_window() -> None:
    circuit = given_open()

    circuit.breaker.disable()
    circuit.fails(100)
    circuit.breaker.check()

    snapshot = circuit.breaker.snapshot()
    assert (snapshot.state, snapshot.failures, snapshot.consecutive_failures) == ("disabled", 1, 1)
    assert (snapshot.total_failures, snapshot.cause, snapshot.open_for) == (101, "", None)
    circuit.breaker.reset()
    assert circuit.state == "closed"
    assert circuit.breaker.snapshot().failures == 0


def test_force_closed_is_another_word_for_disable() -> None:
    circuit = given_open()

    circuit.breaker.force_closed()

    assert circuit.state == "disabled"


def test_reset_forgets_the_window_and_the_doubled_interval_but_not_the_totals() -> None:
    circuit = given_half_open(recovery_timeout=60)
    circuit.fails()

    circuit.breaker.reset()

    snapshot = circuit.breaker.snapshot()
    assert (snapshot.state, snapshot.failures, snapshot.consecutive_failures) == ("closed", 0, 0)
    assert (snapshot.total_failures, snapshot.opened_count) == (2, 2)
    circuit.fails()
    assert circuit.interval() == 60


# -- what it shows and tells -------------------------------------------------------------------------------------------


def test_the_snapshot_of_a_new_circuit_is_empty() -> None:
    assert given().breaker.snapshot() == (*("openai/gpt", "closed", 0, 0, 0, 0, None, 0, None, 0.0, "", 0, 0, 0),)


def test_the_snapshot_of_an_open_circuit_shows_the_window_that_opened_it() -> None:
    circuit = given(failure_threshold=2, slow_call_duration=2)
    circuit.succeeds(2, duration=3)
    circuit.fails(2)
    circuit.clock.advance(10)

    assert circuit.breaker.snapshot()._asdict() == {
        "name": "openai/gpt",
        "state": "open",
        "failures": 2,
        "successes": 2,
        "slow": 2,
        "consecutive_failures": 2,
        "failure_rate": 0.5,
        "opened_count": 1,
        "open_for": 10.0,
        "retry_after": 50.0,
        "cause": "2 failures in a row, last: LMServerError 503",
        "probes_in_flight": 0,
        "total_failures": 2,
        "total_successes": 2,
    }


def test_the_snapshot_of_a_time_window_is_up_to_date_without_calls() -> None:
    circuit = given(window_type="time", window=60)
    circuit.fails()

    circuit.clock.advance(61)

    assert circuit.breaker.snapshot()[2:4] == (0, 0)


def test_half_open_remembers_when_and_why_it_opened() -> None:
    circuit = given_half_open(recovery_timeout=60)
    circuit.breaker.permit()
    circuit.clock.advance(5)

    snapshot = circuit.breaker.snapshot()

    assert (snapshot.state, snapshot.open_for) == ("half_open", 65)
    assert snapshot.cause == circuit.refusal().cause_text == "1 failures in a row, last: LMServerError 503"


def test_listeners_hear_every_transition_in_order() -> None:
    circuit = given_half_open(success_threshold=1, jitter=0.5, random=lambda: 1.0)
    circuit.clock.advance(30)
    circuit.succeeds()
    circuit.breaker.reset()  # nothing to tell: it is closed

    assert [(event.name, event.at, dict(event.data)) for event in circuit.events] == [
        (
            "breaker_opened",
            1_700_000_000.0,
            {
                "route": "openai/gpt",
                "cause": "1 failures in a row, last: LMServerError 503",
                "retry_after": 90.0,
                "generation": 1,
            },
        ),
        (
            "breaker_half_open",
            1_700_000_090.0,
            {
                "route": "openai/gpt",
                "cause": "1 failures in a row, last: LMServerError 503",
                "retry_after": None,
                "generation": 2,
            },
        ),
        (
            "breaker_closed",
            1_700_000_090.0,
            {"route": "openai/gpt", "cause": "1 probes succeeded", "retry_after": None, "generation": 3},
        ),
    ]


def test_operators_moves_are_told_too() -> None:
    circuit = given()

    circuit.breaker.force_open("maintenance")
    circuit.breaker.disable()
    circuit.breaker.disable()
    circuit.breaker.reset()

    assert [(event.name, event.data["cause"]) for event in circuit.events] == [
        ("breaker_opened", "maintenance"),
        ("breaker_closed", "disabled by an operator"),
        ("breaker_closed", "reset by an operator"),
    ]


def test_listeners_run_outside_the_lock() -> None:
    """A listener waits for another thread that needs the breaker: a lock held meanwhile would never be free."""
    circuit = given(failure_threshold=1, success_threshold=1, probe_lease=30)
    seen: list[bool] = []

    def listener(event: Event) -> None:
        other = threading.Thread(target=circuit.breaker.snapshot, daemon=True)
        other.start()
        other.join(timeout=5)
        seen.append(not other.is_alive())

    circuit.bus.add(listener)
    circuit.fails()
    circuit.clock.advance(60)
    circuit.fails()
    circuit.clock.advance(120)
    circuit.breaker.permit()
    circuit.clock.advance(30)
    circuit.breaker.snapshot()
    circuit.clock.advance(240)
    circuit.succeeds()
    circuit.breaker.force_open()
    circuit.breaker.disable()
    circuit.breaker.reset()

    assert seen == [True] * 10


def test_a_failing_listener_and_a_listener_that_uses_the_breaker_disturb_nobody() -> None:
    circuit = given(failure_threshold=1)

    def listener(event: Event) -> None:
        if event.name == "breaker_opened":
            circuit.breaker.reset()
        raise RuntimeError("boom")

    circuit.bus.add(listener)
    circuit.fails()

    assert circuit.told == ["breaker_opened", "breaker_closed"]
    assert circuit.state == "closed"


def test_its_repr_and_its_permits_repr_say_what_matters() -> None:
    circuit = given()

    assert repr(circuit.breaker) == "Breaker('openai/gpt', closed)"
    assert repr(circuit.breaker.permit()) == "Permit(generation=0, probe=False, id=1, started=1000.000)"


@pytest.mark.parametrize("listens_to", ["breaker_half_open", "breaker_opened", "breaker_closed"])
def test_ctrl_c_in_a_listener_leaves_no_probe_out(listens_to: str) -> None:
    """A probe whose caller never had it was missed until its lease ended: so long nobody was let through."""
    circuit = given_half_open(recovery_timeout=60, success_threshold=1)

    def interrupted(event: Event) -> None:
        if event.name == listens_to:
            raise KeyboardInterrupt

    def probe() -> None:
        permit = circuit.breaker.permit()
        if listens_to == "breaker_opened":
            circuit.breaker.failure(permit, 0.1, "LMServerError 503")
        circuit.breaker.success(permit, 0.1)

    circuit.bus.add(interrupted)
    with pytest.raises(KeyboardInterrupt):
        probe()
    snapshot = circuit.breaker.snapshot()
    assert snapshot.probes_in_flight == 0
    assert snapshot.state == listens_to.removeprefix("breaker_").replace("opened", "open")


@pytest.mark.parametrize("settle", ["success", "failure", "release"])
def test_a_probe_whose_settling_was_interrupted_is_settled_again(settle: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before its state had heard of it: the permit was marked as settled, and the probe stayed out."""
    circuit = given_half_open(recovery_timeout=60, success_threshold=1)
    permit = circuit.breaker.permit()
    arguments = {"success": (0.1,), "failure": (0.1, "LMServerError 503"), "release": ()}[settle]

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(HalfOpen, settle, interrupted)
        with pytest.raises(KeyboardInterrupt):
            getattr(circuit.breaker, settle)(permit, *arguments)
    getattr(circuit.breaker, settle)(permit, *arguments)
    snapshot = circuit.breaker.snapshot()
    assert snapshot.probes_in_flight == 0
    assert snapshot.state == {"success": "closed", "failure": "open", "release": "half_open"}[settle]

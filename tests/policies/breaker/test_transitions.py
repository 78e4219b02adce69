"""The table of transitions: the breaker moves as it says, reaches every row of it, and makes no other move."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

import pytest
from hypothesis import given as for_all
from hypothesis import settings
from hypothesis import strategies as st

from dspy_prod.errors import CircuitOpenError
from dspy_prod.policies.breaker.breaker import Permit
from dspy_prod.policies.breaker.permit import StateName
from dspy_prod.policies.breaker.states import State
from dspy_prod.policies.breaker.transitions import EVENTS, TRANSITIONS, Trigger

from .test_breaker import Circuit, given

STATES: tuple[StateName, ...] = get_args(StateName)
TRIGGERS: tuple[Trigger, ...] = get_args(Trigger)


def circuit_in(state: StateName) -> Circuit:
    """A circuit brought there by calls, time and an operator alone; its next probe decides."""
    circuit = given(failure_threshold=1, success_threshold=1, half_open_probes=1, recovery_timeout=60)
    if state in ("open", "half_open"):
        circuit.fails()
    if state == "half_open":
        circuit.clock.advance(60)
        circuit.breaker.release(circuit.breaker.permit())
    if state == "forced_open":
        circuit.breaker.force_open()
    if state == "disabled":
        circuit.breaker.disable()
    return circuit


def wait_and_ask(circuit: Circuit) -> None:
    circuit.clock.advance(60)
    circuit.breaker.permit()


DOES: dict[Trigger, Callable[[Circuit], Any]] = {
    "failures": Circuit.fails,
    "interval_over": wait_and_ask,
    "probe_failed": Circuit.fails,
    "probes_succeeded": Circuit.succeeds,
    "force_open": lambda circuit: circuit.breaker.force_open(),
    "disable": lambda circuit: circuit.breaker.disable(),
    "reset": lambda circuit: circuit.breaker.reset(),
}


@pytest.mark.parametrize(("state", "trigger"), TRANSITIONS)
def test_every_row_of_the_table_is_reached(state: StateName, trigger: Trigger) -> None:
    """By what callers, time and an operator can do; listeners hear of each change of state, once."""
    circuit = circuit_in(state)
    assert circuit.state == state
    circuit.events.clear()

    DOES[trigger](circuit)

    following = TRANSITIONS[state, trigger]
    assert circuit.state == following
    assert circuit.told == ([] if following == state else [EVENTS[following]])


@pytest.mark.parametrize(
    ("state", "trigger"),
    [(state, trigger) for state in STATES for trigger in TRIGGERS if (state, trigger) not in TRANSITIONS],
)
def test_a_move_that_is_not_in_the_table_is_refused(state: StateName, trigger: Trigger) -> None:
    """A defect in a state's rules is told at once, and moves nothing."""
    circuit = circuit_in(state)
    circuit.events.clear()

    with pytest.raises(RuntimeError, match=f"{state} cannot move by {trigger}"):
        circuit.breaker._move(trigger, "a defect")

    assert (circuit.state, circuit.told) == (state, [])


def watched(circuit: Circuit) -> list[tuple[StateName, StateName]]:
    """Every state this circuit leaves from now on, with the one it enters, however that comes about."""
    moves: list[tuple[StateName, StateName]] = []
    plain = type(circuit.breaker)

    class Watched(plain):  # type: ignore[valid-type, misc]
        def __setattr__(self, name: str, value: Any) -> None:
            if name == "_state":
                before: State = self._state
                moves.append((before.name, value.name))
            super().__setattr__(name, value)

    circuit.breaker.__class__ = Watched
    return moves


STEPS = st.one_of(
    st.sampled_from(["permit", "check", "snapshot", "force_open", "disable", "reset"]),
    st.tuples(st.sampled_from(["success", "failure", "release"]), st.integers(0, 5)),
    st.tuples(st.just("wait"), st.sampled_from([1.0, 30.0, 60.0, 1000.0])),
)


@settings(max_examples=300, deadline=None)
@for_all(st.lists(STEPS, max_size=40), st.integers(1, 3), st.integers(1, 3), st.booleans())
def test_whatever_happens_each_move_is_in_the_table(
    steps: list[Any], threshold: int, probes: int, slow_calls: bool
) -> None:
    """Calls that end late or twice, waits, hung probes and an operator's moves in any order."""
    circuit = given(
        failure_threshold=threshold, success_threshold=probes, half_open_probes=probes, probe_lease=30,
        slow_call_duration=1 if slow_calls else None, minimum_calls=2,
    )  # fmt: skip
    moves = watched(circuit)
    permits: list[Permit] = []
    for step in steps:
        try:
            if step == "permit":
                permits.append(circuit.breaker.permit())
            elif isinstance(step, str):
                getattr(circuit.breaker, step)()
            elif step[0] == "wait":
                circuit.clock.advance(step[1])
            elif permits:
                how = {"success": (2.0,), "failure": (0.1, "X"), "release": ()}[step[0]]
                getattr(circuit.breaker, step[0])(permits[step[1] % len(permits)], *how)
        except CircuitOpenError:
            pass

    assert set(moves) <= {(state, following) for (state, _), following in TRANSITIONS.items()}
    assert circuit.told == [EVENTS[after] for before, after in moves if before != after]

"""Every legal move of a circuit, as a table: what happens in a state, and the state that follows (Resilience4j's
`StateTransition`). The breaker makes no other.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, Literal, get_args

from dspy_prod.policies.breaker.permit import StateName

OperatorMove = Literal["force_open", "disable", "reset"]
"""What an operator may say in any state, also twice."""

SAID: Final[Mapping[OperatorMove, str]] = {
    "force_open": "forced open by an operator",
    "disable": "disabled by an operator",
    "reset": "reset by an operator",
}
"""The cause of such a move, for callers and listeners."""

Trigger = Literal[OperatorMove, "failures", "interval_over", "probe_failed", "probes_succeeded"]

TRANSITIONS: Final[Mapping[tuple[StateName, Trigger], StateName]] = {
    ("closed", "failures"): "open",  # in a row or in the window, or were too slow
    ("open", "interval_over"): "half_open",  # and a call came
    ("half_open", "probe_failed"): "open",  # or hung, or the probes were too slow
    ("half_open", "probes_succeeded"): "closed",
    **{(state, "force_open"): "forced_open" for state in get_args(StateName)},
    **{(state, "disable"): "disabled" for state in get_args(StateName)},
    **{(state, "reset"): "closed" for state in get_args(StateName)},
}

EVENTS: Final[Mapping[StateName, str]] = {
    "closed": "breaker_closed",
    "disabled": "breaker_closed",
    "half_open": "breaker_half_open",
    "open": "breaker_opened",
    "forced_open": "breaker_opened",
}
"""What listeners hear when a state is entered from another one."""


def following(state: StateName, trigger: Trigger) -> StateName:
    """The state that follows.

    Raises:
        RuntimeError: the table has no such move.
    """
    try:
        return TRANSITIONS[state, trigger]
    except KeyError:
        raise RuntimeError(f"a circuit that is {state} cannot move by {trigger}") from None

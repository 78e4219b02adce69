"""What an operator does with an LM by hand."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from dspy.utils.exceptions import LMRateLimitError, LMServerError

import dspy_prod
from dspy_prod import CircuitBreaker, CircuitOpenError, ConfigError, Event, RateLimit, RateLimitedError
from dspy_prod.telemetry.events import BUS
from dspy_prod.testing import Provider, ScriptedEngine
from tests.compose.support import MODEL, down, over, spare

TRIPS_AT_ONCE = CircuitBreaker(failure_threshold=1, recovery_timeout=60, jitter=0)


@pytest.fixture
def events() -> Iterator[list[Event]]:
    """What listeners hear of breakers."""
    heard: list[Event] = []
    remove = BUS.add(lambda event: heard.append(event) if event.name.startswith("breaker_") else None)
    yield heard
    remove()


def told(events: list[Event]) -> list[tuple[str, Any]]:
    return [(event.name, event.data["cause"]) for event in events]


def test_an_operator_takes_a_model_out_of_service_and_back(events: list[Event]) -> None:
    """An operator who knew that a provider was down had no way to say so: only the private parts of an LM had one."""
    lm = over(ScriptedEngine("ok"), breaker=CircuitBreaker())

    lm.breaker("force_open")
    with pytest.raises(CircuitOpenError, match="forced open by an operator"):
        lm("question")
    assert lm.health().breakers[0].state == "forced_open"
    lm.breaker("reset")

    assert lm("question") == ["ok"]
    assert told(events) == [
        ("breaker_opened", "forced open by an operator"),
        ("breaker_closed", "reset by an operator"),
    ]


def test_an_operator_switches_a_breaker_off(events: list[Event]) -> None:
    """A circuit that opens on an upstream's harmless errors is told to let everything pass."""
    engine = ScriptedEngine([down(), down(), "ok"])
    lm = over(engine, breaker=TRIPS_AT_ONCE)

    lm.breaker("disable")
    for _ in range(2):
        with pytest.raises(LMServerError):
            lm("question")

    assert lm("question") == ["ok"]
    assert told(events) == [("breaker_closed", "disabled by an operator")]


def test_a_reset_closes_a_circuit_before_its_time(events: list[Event]) -> None:
    """After a repair nobody waits for the open interval to end."""
    lm = over(ScriptedEngine([down(), "ok"]), breaker=TRIPS_AT_ONCE)
    with pytest.raises(LMServerError):
        lm("question")

    lm.breaker("reset")

    assert lm("question") == ["ok"]
    assert [event.name for event in events] == ["breaker_opened", "breaker_closed"]


@pytest.mark.parametrize("route", ["primary", MODEL])
def test_one_route_can_be_named(route: str) -> None:
    """By the route's name in records, or by its model; the others stay as they are."""
    lm = over(ScriptedEngine("ok"), breaker=CircuitBreaker(), fallbacks=[spare(ScriptedEngine("spare"))])

    lm.breaker("force_open", route)

    assert lm("question") == ["spare"]


def test_copies_go_by_the_operators_word() -> None:
    """A breaker is the route's; every LM in the process that goes that way shares it."""
    lm = over(ScriptedEngine("ok"), breaker=CircuitBreaker())
    twin = lm.copy(temperature=0.5)

    lm.breaker("force_open")

    with pytest.raises(CircuitOpenError):
        twin("question")


def test_calls_with_a_key_of_their_own_go_by_the_operators_word() -> None:
    """Each key has a breaker of its own; the operator means the model, whoever pays."""
    with Provider() as provider:
        lm = dspy_prod.LM("openai/m", api_base=provider.url, api_key="one", cache=False, store="memory://operated")
        assert lm("question", api_key="another")

        lm.breaker("force_open")

        with pytest.raises(CircuitOpenError):
            lm("question", api_key="another")


def test_an_impossible_move_names_what_is_possible() -> None:
    """Before anything is moved."""
    lm = over(ScriptedEngine("ok"), breaker=CircuitBreaker())
    with pytest.raises(ConfigError, match="'force_open', 'disable', 'reset'"):
        lm.breaker("open")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="'primary'"):
        lm.breaker("reset", "openai/unknown")
    with pytest.raises(ConfigError, match="known: none"):
        over(ScriptedEngine("ok"), breaker=False).breaker("reset")


@pytest.fixture
def lifted() -> Iterator[list[Event]]:
    """What listeners hear of pauses that are lifted."""
    heard: list[Event] = []
    remove = BUS.add(lambda event: heard.append(event) if event.name == "pause_lifted" else None)
    yield heard
    remove()


def test_an_operator_lifts_a_pause(lifted: list[Event]) -> None:
    """A provider's wrong Retry-After held up every call of a key for minutes, and nobody could overrule it."""
    engine = ScriptedEngine([LMRateLimitError("slow down", model=MODEL, status=429, retry_after=200.0), "ok"])
    lm = over(engine, limit=RateLimit(max_wait=1.0))
    with pytest.raises(LMRateLimitError):
        lm("question")
    with pytest.raises(RateLimitedError):
        lm("question")

    lm.resume()

    assert lm("question") == ["ok"]
    lm.resume("primary")
    assert [event.data["route"] for event in lifted] == [MODEL]


def test_a_pause_of_an_unknown_route_cannot_be_lifted() -> None:
    with pytest.raises(ConfigError, match="'primary'"):
        over(ScriptedEngine("ok")).resume("elsewhere")

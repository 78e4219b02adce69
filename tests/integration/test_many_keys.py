"""What was learned of a key stays with the key, however many others are used between."""

from __future__ import annotations

import gc
from typing import Any

import pytest
from dspy.utils.exceptions import LMRateLimitError, LMServerError

from dspy_prod import CircuitBreaker, CircuitOpenError, RateLimitedError, add_listener
from dspy_prod.lm.beneath import MAX_VARIANTS
from dspy_prod.pipeline import identities
from dspy_prod.testing import Status
from tests.e2e.conftest import MakeProvider
from tests.e2e.support import make_lm, outcome

KEYS = [f"key-{number}" for number in range(3 * MAX_VARIANTS)]


def test_a_dead_upstream_is_left_alone_with_any_number_of_keys(serve: MakeProvider) -> None:
    """With 17 keys in turn each was forgotten before it came round, and the dead upstream was called for ever."""
    provider = serve(faults=Status(500))
    lm = make_lm(provider.url, breaker=CircuitBreaker(failure_threshold=2))
    for _ in range(2):
        for key in KEYS:
            with pytest.raises(LMServerError):
                lm("q", api_key=key)
    for key in KEYS:
        with pytest.raises(CircuitOpenError):
            lm("q", api_key=key)
    assert len(provider.calls) == 2 * len(KEYS)


def test_a_key_that_was_told_to_wait_waits(serve: MakeProvider) -> None:
    """A 429 with Retry-After holds for its key, and for no other."""
    provider = serve(faults=lambda call: Status(429, retry_after=30) if call.index < len(KEYS) else None)
    lm = make_lm(provider.url)
    for key in KEYS:
        with pytest.raises(LMRateLimitError):
            lm("q", api_key=key)
    for key in KEYS:
        with pytest.raises(RateLimitedError):
            lm.copy(limit={"max_wait": 0})("q", api_key=key)
    assert lm("q", api_key="fresh") == ["ok"]
    assert len(provider.calls) == len(KEYS) + 1


def test_what_is_in_use_is_not_forgotten_while_it_is_quiet(
    serve: MakeProvider, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a process with many models and keys, a pause that came later was lost with the LM that had met it."""
    monkeypatch.setattr(identities._sweep, "at", 0)
    monkeypatch.setattr(type(identities._sweep), "fewest", 0)
    provider = serve(faults=[Status(429, retry_after=30)])
    lm = make_lm(provider.url)
    make_lm(provider.url, model="openai/another")  # each new identity looks for what can be forgotten
    with pytest.raises(LMRateLimitError):
        lm("q")
    store = lm.pipeline.store
    del lm
    gc.collect()
    with pytest.raises(RateLimitedError):
        make_lm(provider.url, limit={"max_wait": 0}, store=store)("q")
    assert len(provider.calls) == 1


@pytest.mark.parametrize("given", ["key", pytest.param("header", marks=pytest.mark.slow)])
def test_an_operator_reaches_every_key(serve: MakeProvider, given: str) -> None:
    """Of forty keys sixteen were refused, those kept just then; and one of them stayed out of service after a reset."""
    provider = serve()
    lm = make_lm(provider.url)

    def ask(who: str) -> Any:
        return outcome(lambda: lm("q", **({"api_key": who} if given == "key" else {"extra_headers": {"x-who": who}})))

    for key in KEYS:
        assert ask(key) == ["ok"]
    lm.breaker("force_open")
    assert all(isinstance(ask(key), CircuitOpenError) for key in [*KEYS, "one that is new"])
    assert len(provider.calls) == len(KEYS)
    assert isinstance(outcome(lambda: lm.copy(retry={"attempts": 2})("q")), CircuitOpenError)
    lm.breaker("reset")
    assert all(ask(key) == ["ok"] for key in [*KEYS, "one that is new", "a newer one"])


def test_an_operator_reaches_no_other_model_address_or_store(serve: MakeProvider) -> None:
    """What is taken out of service is one model at one address."""
    here, there = serve(), serve()
    lm = make_lm(here.url)
    others = [
        make_lm(there.url, store=lm.pipeline.store),
        make_lm(here.url, store=lm.pipeline.store, model="openai/another"),
        make_lm(here.url),
    ]
    lm.breaker("force_open")
    assert isinstance(outcome(lambda: make_lm(here.url, store=lm.pipeline.store, api_key="k")("q")), CircuitOpenError)
    assert [outcome(lambda other=other: other("q")) for other in others] == [["ok"]] * 3  # type: ignore[misc]
    lm.breaker("reset")


def test_a_model_stays_out_of_service_though_its_lms_are_gone(
    serve: MakeProvider, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An LM built for each request, in a process with many keys."""
    monkeypatch.setattr(identities._sweep, "at", 0)
    monkeypatch.setattr(type(identities._sweep), "fewest", 0)
    provider = serve()
    lm = make_lm(provider.url)
    store = lm.pipeline.store
    lm.breaker("force_open")
    del lm
    gc.collect()
    make_lm(provider.url, model="openai/another", store=store)
    heard: list[Any] = []
    remove = add_listener(heard.append)
    try:
        late = make_lm(provider.url, store=store)
        assert isinstance(outcome(lambda: late("q")), CircuitOpenError)
    finally:
        remove()
    assert "breaker_opened" not in {event.name for event in heard}, "it was opened before"
    late.breaker("reset")
    assert late("q") == ["ok"]

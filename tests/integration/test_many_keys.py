"""What was learned of a key stays with the key, however many others are used between."""

from __future__ import annotations

import gc

import pytest
from dspy.utils.exceptions import LMRateLimitError, LMServerError

from dspy_prod import CircuitBreaker, CircuitOpenError, RateLimitedError
from dspy_prod.lm.beneath import MAX_VARIANTS
from dspy_prod.pipeline import identities
from dspy_prod.testing import Status
from tests.e2e.conftest import MakeProvider
from tests.e2e.support import make_lm

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

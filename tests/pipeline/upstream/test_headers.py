"""Rate-limit headers in the spellings that providers use."""

from __future__ import annotations

import pytest

from dspy_prod.pipeline.upstream.headers import PLAUSIBLE, hint_in, remaining, should_retry_in


@pytest.mark.parametrize(
    ("reset", "seconds"), [("6m0s", 360.0), ("20ms", 0.02), ("1.5s", 1.5), ("1h2m3s", 3723.0), ("12", 12.0)]
)
def test_a_duration_is_read(reset: str, seconds: float) -> None:
    """OpenAI's durations become seconds."""
    headers = {"x-ratelimit-remaining-requests": ["3"], "x-ratelimit-reset-requests": [reset]}
    assert remaining(headers, 0.0) == {"requests": (3.0, pytest.approx(seconds))}


def test_a_time_is_read_as_seconds_from_now() -> None:
    """Anthropic's reset is a moment."""
    headers = {
        "anthropic-ratelimit-tokens-remaining": ["0"],
        "anthropic-ratelimit-tokens-reset": ["1970-01-01T00:01:40Z"],
    }
    assert remaining(headers, 40.0) == {"tokens": (0.0, 60.0)}


@pytest.mark.parametrize("reset", ["", "soon", "6m nonsense", "1970-01-01T00:00:01Z"])
def test_what_cannot_be_understood_or_is_over_is_left_out(reset: str) -> None:
    """A header is advice: one that says nothing useful changes nothing."""
    headers = {"x-ratelimit-remaining-tokens": ["7"], "x-ratelimit-reset-tokens": [reset]}
    assert remaining(headers, 40.0) == {}
    assert remaining(None, 0.0) == {}


@pytest.mark.parametrize(("reset", "left"), [("1750000090", 90.0), ("1750000090000", 90.0), ("1750000090.5", 90.5)])
def test_a_time_since_the_epoch_is_read_as_one(reset: str, left: float) -> None:
    """It was taken for a duration, and the key was paused for an hour."""
    headers = {"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": reset}
    assert remaining(headers, 1_750_000_000.0) == {"requests": (0.0, pytest.approx(left))}


@pytest.mark.parametrize("reset", ["inf", "nan", "9e9h", "-5", "0", "1749999999", "99999999", "9999-12-31T23:59:59Z"])
def test_what_is_not_plausible_says_nothing(reset: str) -> None:
    """A reset that is over, or in a thousand years."""
    headers = {"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": reset}
    assert remaining(headers, 1_750_000_000.0) == {}


@pytest.mark.parametrize("left", ["nan", "inf", "some"])
def test_a_remainder_that_is_no_number_says_nothing(left: str) -> None:
    """Nothing can be reckoned with it."""
    assert remaining({"x-ratelimit-remaining-tokens": left, "x-ratelimit-reset-tokens": "6s"}, 0.0) == {}


@pytest.mark.parametrize(
    ("headers", "body", "seconds"),
    [
        ({"retry-after": "7"}, None, 7.0),
        ({"retry-after-ms": "250", "retry-after": "1"}, None, 0.25),
        ({"x-ms-retry-after-ms": "250"}, None, 0.25),
        ({"retry-after": "0"}, None, None),
        ({"retry-after": "0"}, 3.0, 3.0),
        ({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}, None, None),
        ({"retry-after": str(PLAUSIBLE)}, None, PLAUSIBLE),
        ({"retry-after": "1e9"}, None, None),
        ({"retry-after": "Fri, 31 Dec 9999 23:59:59 GMT"}, None, None),
        ({"retry-after-ms": "nan", "retry-after": "2"}, None, 2.0),
        ({}, None, None),
    ],
)
def test_the_hint_is_the_first_that_says_something(
    headers: dict[str, str], body: float | None, seconds: float | None
) -> None:
    """The most precise header, else Retry-After, else the body; nonsense is passed over."""
    assert hint_in(headers, body) == seconds


@pytest.mark.parametrize(("value", "said"), [("true", True), ("False ", False), ("maybe", None)])
def test_the_provider_may_ask_for_a_retry_or_against_it(value: str, said: bool | None) -> None:
    """As OpenAI's own clients read it."""
    assert should_retry_in({"x-should-retry": value}) is said
    assert should_retry_in({}) is None

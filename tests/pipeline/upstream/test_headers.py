"""Rate-limit headers in the spellings that providers use."""

from __future__ import annotations

import pytest

from dspy_prod.pipeline.upstream.headers import remaining


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

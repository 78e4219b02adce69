"""Expressions that are compiled at their first use."""

from __future__ import annotations

import re

from dspy_prod.runtime.patterns import Pattern


def test_it_is_compiled_once_and_finds_what_re_finds() -> None:
    pattern = Pattern(r"rate.?limit", re.IGNORECASE)
    found = pattern.search("The Rate-Limit is reached")
    assert found is not None
    assert found[0] == "Rate-Limit"
    assert pattern.match("no rate limit") is None
    assert pattern.compiled is pattern.compiled

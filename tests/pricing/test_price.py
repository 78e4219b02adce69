"""A price in the wrong unit makes every budget wrong by a factor of a million, so it is asked about."""

from __future__ import annotations

import warnings
from typing import Any

import pytest

from dspy_prod import Price


@pytest.mark.parametrize(
    ("fields", "meant"),
    [
        ({"input": 1.5e-07, "output": 6e-07}, "Price(input=0.15, output=0.6)"),
        ({"input": 0.15, "output": 6e-07}, "Price(output=0.6)"),
        ({"input": 0.15, "output": 0.6, "cached_input": 7.5e-08}, "Price(cached_input=0.075)"),
        ({"input": 1.5e-05, "output": 6e-04}, "Price(input=15.0, output=600.0)"),  # o1-pro, the dearest in use
    ],
)
def test_the_price_of_one_token_warns(fields: dict[str, Any], meant: str) -> None:
    """`Price(input=1.5e-07)`, as LiteLLM states prices, was taken for a ten-thousandth of a cent per million."""
    with pytest.warns(UserWarning, match="per million") as caught:
        Price(**fields)
    assert meant in str(caught[0].message)
    assert caught[0].filename == __file__


@pytest.mark.parametrize("fields", [{"input": 0, "output": 0}, {"input": 0.01, "output": 0.003, "cached_input": 0.001}])
def test_free_and_cheap_models_do_not(fields: dict[str, Any]) -> None:
    """The cheapest in any price list costs $0.01 per million."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Price(**fields)

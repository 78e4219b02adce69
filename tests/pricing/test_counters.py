"""A usage counter that cannot be true counts as not told: it stops no store and is charged its bound."""

from __future__ import annotations

from pathlib import Path

import pytest
from dspy.lm15 import Message, Response, Usage

import dspy_prod
from dspy_prod import Budget, Price, RateLimit
from dspy_prod.testing import ScriptedEngine

MODEL = "openai/odd"
PRICES = {MODEL: Price(input=1.0, output=2.0, max_input_tokens=10_000)}


def _answer(text: str, usage: Usage) -> Response:
    return Response(id=None, model="odd", message=Message.assistant(text), finish_reason="stop", usage=usage)


@pytest.mark.parametrize("where", ["memory", "sqlite"])
@pytest.mark.parametrize("odd", [2**31, 2**53 + 1, 2**63, 2**64, 10**30])
@pytest.mark.parametrize("counter", ["input_tokens", "output_tokens", "cache_read_tokens", "reasoning_tokens"])
def test_a_counter_beyond_all_reason_stops_no_store(where: str, odd: int, counter: str, tmp_path: Path) -> None:
    """SQLite's writer failed on a number beyond 64 bits, and the next caller was refused."""
    store = "memory://" if where == "memory" else f"sqlite:///{tmp_path / 'state.db'}"
    usage = Usage(**{"input_tokens": 10, "output_tokens": 5, counter: odd})
    engine = ScriptedEngine([_answer("odd", usage), "well"])
    lm = dspy_prod.LM(
        MODEL, engine=engine, store=store, cache=False, max_tokens=100, prices=PRICES, budget=Budget(usd=1, name="b"),
        limit=RateLimit(tpm=100_000), namespace=f"odd-{counter}-{odd}",
    )  # fmt: skip
    assert lm("first") == ["odd"]
    assert lm("second") == ["well"]
    second, first = lm.ledger.records()[:2]
    assert getattr(first, {"cache_read_tokens": "cached_tokens"}.get(counter, counter)) is None
    assert first.estimated
    assert (second.cost_nano, second.estimated) == (20_000, False)
    assert lm.costs().today_usd == pytest.approx(((first.cost_nano or 0) + 20_000) / 1e9)
    assert lm.health().status == "healthy"


@pytest.mark.parametrize("where", ["memory", "sqlite"])
def test_a_counter_beyond_all_reason_of_an_unpriced_model_stops_no_limiter(where: str, tmp_path: Path) -> None:
    """Without a price the tokens still go to the limiter's row, and the size of answers is learned from them."""
    store = "memory://" if where == "memory" else f"sqlite:///{tmp_path / 'state.db'}"
    engine = ScriptedEngine([_answer("odd", Usage(input_tokens=2**70, output_tokens=2**70)), "well"])
    lm = dspy_prod.LM(
        "openai/nobody-knows", engine=engine, store=store, limit=RateLimit(tpm=100_000, estimate="learned"),
        namespace="unpriced",
    )  # fmt: skip
    assert lm("first") == ["odd"]
    assert lm("second") == ["well"]
    assert [record.output_tokens for record in lm.ledger.records()] == [5, None]
    assert lm.health().status == "healthy"

"""The policies of an LM around an embedder: money, limits, failures, runs, tenants."""

from __future__ import annotations

import asyncio
import pickle
from typing import Any

import numpy as np
import pytest
from dspy.utils.exceptions import LMError, LMInvalidRequestError, LMProviderError, LMServerError

import dspy_prod
from dspy_prod import Budget, Cache, Price, RateLimit, Retry
from dspy_prod.testing import EmptyChoices, FakeClock, MissingUsage, Provider, Status, WrongUsage
from tests.embedding.conftest import MODEL, PRICES, MakeEmbedder, sent

FREE = Price(input=0, output=0)


def lengths(texts: list[str]) -> Any:
    return [[float(len(text)), 1.0] for text in texts]


def records(embedder: Any) -> list[Any]:
    return list(reversed(embedder.ledger.records()))


# -- texts -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("way", ["sync", "async"])
def test_half_a_character_is_refused_before_anything_happens(way: str, provider: Provider, make: MakeEmbedder) -> None:
    """Five such texts of one user opened the circuit for everybody, and money was booked that nobody spent."""
    embedder = make(budget=Budget(usd=1, per="day"))
    ask = embedder if way == "sync" else lambda texts: asyncio.run(embedder.acall(texts))
    for _ in range(6):
        with pytest.raises(ValueError, match=r"inputs\[1\] contains half a character \(U\+D83D\)"):
            ask(["fine", "\ud83d!"])
    assert records(embedder) == []
    assert embedder("fine").shape
    assert len(provider.calls) == 1


@pytest.mark.parametrize("place", ["argument", "function"])
def test_half_a_character_elsewhere_costs_nothing_and_opens_no_circuit(
    place: str, provider: Provider, make: MakeEmbedder
) -> None:
    """A user's name may hold one; and a function of somebody's own may send what it is given."""

    def own(texts: list[str], **_: Any) -> Any:
        return [[float(len(text.encode())), 1.0] for text in texts]

    embedder = make(own) if place == "function" else make(budget=Budget(usd=1, per="day"))
    for number in range(6):
        with pytest.raises(LMError) as caught:
            embedder(f"\ud83d{number}") if place == "function" else embedder("fine", user="\ud83d")
        assert not isinstance(caught.value, dspy_prod.RejectedError)
    assert {(record.cost_nano or 0, record.estimated) for record in records(embedder)} == {(0, False)}
    assert embedder("fine").shape


# -- functions -------------------------------------------------------------------------------------------------------
class Index:
    """An object with a method that embeds."""

    def embed(self, texts: list[str]) -> Any:
        return lengths(texts)


def _closure(error: Exception | None = None) -> Any:
    def embed(texts: list[str]) -> Any:
        if error is not None:
            raise error
        return lengths(texts)

    return embed


@pytest.mark.parametrize("kind", ["closure", "lambda"])
def test_two_functions_of_one_name_have_circuits_of_their_own(kind: str, make: MakeEmbedder) -> None:
    """Five failures of one turned the other away; all lambdas are called alike."""
    store = "memory://two-functions"
    broken, sound = _closure(RuntimeError("its index is missing")), _closure()
    if kind == "lambda":
        broken, sound = (lambda function: lambda texts: function(texts))(broken), lambda texts: lengths(texts)
    bad, good = make(broken, store=store, caching=False), make(sound, store=store, caching=False)
    for number in range(5):
        with pytest.raises(LMError):
            bad(f"text {number}")
    assert bad.pipeline.primary.breaker.state == "open"
    assert good("a").shape
    assert good.pipeline.primary.model == bad.pipeline.primary.model  # what people read


def test_one_function_is_one_upstream_wherever_it_is_named(make: MakeEmbedder) -> None:
    """A limit of its embedders is one limit; in other processes too, where these can know that it is the same."""
    index, other = Index(), Index()
    own = _closure()
    keyed = _closure()
    keyed.cache_key = "index-7"
    for function, again, everywhere in (
        (lengths, lengths, True), (own, own, False), (index.embed, index.embed, False), (keyed, keyed, True),
    ):  # fmt: skip
        one, two = make(function, store="memory://one-function"), make(again, store="memory://one-function")
        assert one.pipeline.primary.limit_key == two.pipeline.primary.limit_key
        assert one.pipeline.primary.upstream.known_everywhere is everywhere
    one, two = make(index.embed), make(other.embed)
    assert one.pipeline.primary.limit_key != two.pipeline.primary.limit_key


# -- the bill --------------------------------------------------------------------------------------------------------
def test_costs_are_the_provider_s_bill(provider: Provider, make: MakeEmbedder) -> None:
    """To the nano-USD, with failures on the way: one record for each attempt, with its usage."""
    provider.faults = [Status(503), None, Status(429), None]  # type: ignore[assignment]
    embedder = make(retry=Retry(attempts=4, backoff=0.001, max_backoff=0.002), limit=RateLimit(adaptive=False))
    embedder([f"text number {number}" for number in range(250)], batch_size=100)
    found = records(embedder)
    assert [len(texts) for texts in sent(provider)] == [100, 100, 100, 100, 50]
    assert [record.outcome for record in found] == ["error", "ok", "error", "ok", "ok"]
    assert sum(record.cost_nano for record in found) == provider.bill.nano
    billed = [(row.input_tokens, row.output_tokens) for row in provider.bill.rows]
    assert [(record.input_tokens, record.output_tokens) for record in found if record.outcome == "ok"] == billed


def test_an_upstream_is_asked_once_for_an_attempt(provider: Provider, make: MakeEmbedder) -> None:
    """LiteLLM's own client would retry twice more, beneath limiter, breaker and ledger."""
    provider.down(500)
    with pytest.raises(LMServerError):
        make()("a")
    with pytest.raises(LMServerError):
        asyncio.run(make().acall("a"))
    assert len(provider.calls) == 2


def test_an_untold_usage_is_charged_with_its_bound(provider: Provider, make: MakeEmbedder) -> None:
    provider.faults = MissingUsage()  # type: ignore[assignment]
    embedder = make(budget=Budget(usd=1, per="day"))
    embedder(["a text", "another"])
    [record] = records(embedder)
    assert record.estimated
    assert record.cost_nano > provider.bill.nano > 0


@pytest.mark.parametrize("fault", [EmptyChoices(), WrongUsage(input_tokens=7)])
def test_a_batch_without_its_vectors_is_owed_all_the_same(provider: Provider, make: MakeEmbedder, fault: Any) -> None:
    provider.faults = fault
    embedder = make(budget=Budget(usd=1, per="day"))
    if isinstance(fault, EmptyChoices):
        with pytest.raises(LMProviderError, match="2 texts were asked about, and 0 vectors came"):
            embedder(["a", "b"])
    else:
        embedder(["a", "b"])
    assert sum(record.cost_nano for record in records(embedder)) == provider.bill.nano > 0


# -- money -----------------------------------------------------------------------------------------------------------
def test_a_budget_is_never_passed(provider: Provider, make: MakeEmbedder) -> None:
    """A corpus that costs more than there is stops at the cap, with most of it used."""
    embedder = make(budget=Budget(usd=0.000_02, per="day"))
    corpus = [f"passage number {number} " + "words of it " * 20 for number in range(400)]
    with pytest.raises(dspy_prod.BudgetExceededError):
        embedder(corpus)
    assert 0.5 * 20_000 < provider.bill.nano <= 20_000
    assert embedder.costs("model")[0].usd == provider.bill.usd
    paid = [text for texts in sent(provider) for text in texts]
    before = len(provider.calls)
    embedder(paid)  # what was paid for is kept
    assert len(provider.calls) == before


def test_a_cap_on_a_call_refuses_before_anything_is_paid(provider: Provider, make: MakeEmbedder) -> None:
    embedder = make(budget=Budget(usd=0.000_03, per="call"), caching=False)
    with pytest.raises(dspy_prod.BudgetExceededError):
        embedder(["long " * 100] * 10, batch_size=2)
    assert provider.calls == []
    embedder("short")
    [refused, ok] = records(embedder)
    assert (refused.outcome, ok.outcome) == ("refused", "ok")


def test_an_unknown_price_is_not_zero(make: MakeEmbedder) -> None:
    with pytest.raises(dspy_prod.UnpricedModelError, match="no price is known for 'function/lengths'"):
        make(lengths, budget=Budget(usd=1, per="day"))("a")
    unpriced = make(lengths)
    unpriced("a")
    assert records(unpriced)[0].cost_nano is None


@pytest.mark.parametrize("prices", [FREE, {"function/lengths": FREE}])
def test_a_function_costs_what_is_declared(make: MakeEmbedder, prices: Any) -> None:
    embedder = make(lengths, budget=Budget(usd=1, per="day"), prices=prices)
    assert embedder(["a", "bcd"]).tolist() == [[1.0, 1.0], [3.0, 1.0]]
    [record] = records(embedder)
    assert (record.cost_nano, record.estimated, record.model) == (0, False, "function/lengths")


def test_a_budget_is_shared_with_an_lm(provider: Provider) -> None:
    budget = Budget(usd=1, per="day")
    where: Any = {
        "store": "memory://both",
        "namespace": "t",
        "api_key": "k",
        "api_base": provider.url,
        "budget": budget,
    }
    lm = dspy_prod.LM("openai/gpt-4o-mini", max_tokens=10, **where)
    embedder = dspy_prod.Embedder(MODEL, **where)
    lm("hello")
    embedder("hello")
    assert lm.costs().budgets[0].spent_usd == embedder.costs().budgets[0].spent_usd == provider.bill.usd
    assert {row.value for row in lm.costs("model")} == {MODEL, "openai/gpt-4o-mini"}
    lm.close()


# -- batches ---------------------------------------------------------------------------------------------------------
def test_no_batch_is_larger_than_a_provider_takes(provider: Provider, make: MakeEmbedder) -> None:
    """The plain embedder would be refused: 200 texts of 8,000 tokens are more than one request may hold."""
    embedder = make(batch_size=200, caching=False)
    found = embedder(["word " * 6_400] * 100)
    assert found.shape == (100, 16)
    assert len(provider.calls) == 3  # by the model's own limit for each text
    assert max(call.input_tokens for call in provider.calls) <= 300_000


def test_no_batch_is_larger_than_the_limiter_holds(provider: Provider, make: MakeEmbedder) -> None:
    embedder = make(limit=RateLimit(tpm=2_000, max_wait=0), caching=False)
    with pytest.raises(dspy_prod.RateLimitedError):
        embedder(["x" * 400] * 20)
    assert [len(texts) for texts in sent(provider)] == [4]


# -- failures --------------------------------------------------------------------------------------------------------
def test_an_open_circuit_refuses_at_once(provider: Provider, make: MakeEmbedder) -> None:
    embedder = make(breaker=dspy_prod.CircuitBreaker(failure_threshold=2), caching=False)
    provider.down(503)
    for _ in range(2):
        with pytest.raises(LMServerError):
            embedder("a")
    with pytest.raises(dspy_prod.CircuitOpenError):
        embedder("a")
    assert len(provider.calls) == 2
    assert embedder.health().status == "degraded"
    embedder.breaker("reset")
    provider.up()
    embedder("a")


def test_a_mistake_is_the_caller_s(provider: Provider, make: MakeEmbedder) -> None:
    provider.faults = [Status(400)]  # type: ignore[assignment]
    with pytest.raises(LMInvalidRequestError):
        make(retry=Retry())("a")
    assert len(provider.calls) == 1


def test_the_same_model_elsewhere_stands_in(provider: Provider, make: MakeEmbedder) -> None:
    with Provider(prices=PRICES) as other:
        spare = make(api_base=other.url)
        embedder = make(fallbacks=[spare])
        provider.down(503)
        vector = embedder("a text")
        assert len(other.calls) == 1
        assert records(embedder)[-1].route == MODEL
        provider.up()
        assert np.array_equal(vector, make(caching=False)("a text"))


def test_its_own_budget_holds_for_it(provider: Provider, make: MakeEmbedder) -> None:
    """Of an embedder that is given as a fallback; and a pickle forgets neither it nor shows its key."""
    with Provider(prices=PRICES) as other:
        spare = make(api_base=other.url, api_key="sk-spare-secret-123456", budget=Budget(usd=0.000_001, per="day"))
        embedder = make(fallbacks=[spare])
        provider.down(503)
        for each in (embedder, pickle.loads(pickle.dumps(embedder))):
            with pytest.raises((LMServerError, dspy_prod.BudgetExceededError)):
                each("long " * 100)
        assert other.calls == []
        assert pickle.loads(pickle.dumps(embedder))("short").shape == (16,)
        assert [call.headers["authorization"] for call in other.calls] == ["Bearer sk-spare-secret-123456"]
        assert b"spare-secret" not in pickle.dumps(embedder)


@pytest.mark.parametrize(
    ("fallback", "options", "why"),
    [
        ("openai/text-embedding-3-large", {}, "is another model"),
        ("cohere/embed-english-v3.0", {}, "is another model"),
        (lengths, {}, "a function has none"),
    ],
)
def test_another_model_does_not(make: MakeEmbedder, fallback: Any, options: dict[str, Any], why: str) -> None:
    with pytest.raises(dspy_prod.ConfigError, match=why):
        make(fallbacks=[fallback], **options)


def test_nor_the_same_one_with_vectors_of_another_length(make: MakeEmbedder) -> None:
    with pytest.raises(dspy_prod.ConfigError, match="has other dimensions="):
        make(fallbacks=[make(dimensions=4)])
    assert make(dimensions=4, fallbacks=["azure/text-embedding-3-small"], prices={}) is not None
    assert make(fallbacks=[make("azure/mine", base_model="text-embedding-3-small")]) is not None


def test_an_expired_vector_serves_while_nobody_answers(provider: Provider, make: MakeEmbedder) -> None:
    clock = FakeClock()
    embedder = make(caching=Cache(ttl=10, ttl_jitter=0, stale_if_error=100), clock=clock)
    before = embedder(["a", "b"])
    clock.advance(11)
    provider.down(503)
    assert np.array_equal(embedder(["a", "b"]), before)
    assert records(embedder)[-1].outcome == "stale"
    with pytest.raises(LMServerError):
        embedder(["a", "new"])


# -- who calls, and in which run -------------------------------------------------------------------------------------
def test_who_called_is_told(make: MakeEmbedder) -> None:
    embedder = make()
    with dspy_prod.call_context(user="u", tenant="t", tags={"job": "index"}):
        embedder("a")
    [record] = records(embedder)
    assert (record.user, record.tenant, record.tags) == ("u", "t", (("job", "index"),))


def test_a_run_caps_it(provider: Provider, make: MakeEmbedder) -> None:
    embedder = make()
    run = dspy_prod.Run("index", calls=2, store="memory://runs", namespace="t")
    with dspy_prod.call_context(run=run):
        embedder([f"t{number}" for number in range(4)], batch_size=2)
        with pytest.raises(dspy_prod.BudgetExceededError):
            embedder("another")
        run.stop("enough")
        with pytest.raises(dspy_prod.RunStoppedError):
            embedder("yet another")
    assert len(provider.calls) == 2


def test_a_deadline_ends_it(provider: Provider, make: MakeEmbedder) -> None:
    provider.latency = 5.0
    embedder = make()
    with dspy_prod.call_context(deadline=0.2), pytest.raises(dspy_prod.DeadlineExceededError):
        embedder("a")
    with dspy_prod.call_context(deadline=0.2), pytest.raises(dspy_prod.DeadlineExceededError):
        asyncio.run(embedder.acall("b"))


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"batch_size": 0}, "batch_size=0"),
        ({"bugdet": 1}, "budget"),
        ({"fallbacks": "azure/x"}, "takes a list"),
        ({"timeout": -1}, "timeout=-1"),
    ],
)
def test_what_cannot_be_is_refused_at_construction(make: MakeEmbedder, options: dict[str, Any], why: str) -> None:
    with pytest.raises(dspy_prod.ConfigError, match=why):
        make(**options)
    with pytest.raises(dspy_prod.ConfigError, match="model="):
        dspy_prod.Embedder(None)  # type: ignore[arg-type]


def test_a_key_shows_nowhere(make: MakeEmbedder, caplog: pytest.LogCaptureFixture) -> None:
    embedder = make(api_key="sk-very-secret-1234567890")
    assert "very-secret" not in repr(embedder) + repr(vars(embedder)) + repr(embedder.settings)
    assert b"very-secret" not in pickle.dumps(embedder)
    assert pickle.loads(pickle.dumps(embedder))("a").shape == (16,)

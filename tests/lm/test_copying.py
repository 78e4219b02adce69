"""Copies of an LM, however they are made, are one LM to its budget, limits, breaker, cache and ledger."""

from __future__ import annotations

import copy
import os
import pickle
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import cloudpickle  # type: ignore[import-untyped]
import dspy
import pytest
from dspy.lm15 import Request, Response
from dspy.utils.dummies import DummyLM
from dspy.utils.exceptions import LMServerError

import dspy_prod
from dspy_prod import (
    Budget,
    BudgetExceededError,
    Cache,
    CircuitBreaker,
    CircuitOpenError,
    ConfigError,
    Price,
    RateLimit,
    Retry,
)
from dspy_prod.stores.memory import MemoryStore
from dspy_prod.testing import FakeClock, Provider, ScriptedEngine
from tests.e2e.support import fresh_memory

MODEL = "openai/gpt-4o-mini"
PRICES = {"unit/model": Price(input=1000, output=1000)}


class PicklableEngine:
    """An engine object that can be pickled. What it was asked is kept with the class."""

    requests: ClassVar[list[Request]] = []

    def complete(self, request: Request) -> Response:
        self.requests.append(request)
        return ScriptedEngine("hi").complete(request)


@pytest.fixture(autouse=True)
def _no_requests_yet() -> Iterator[None]:
    PicklableEngine.requests.clear()
    yield
    PicklableEngine.requests.clear()


COPIES: dict[str, Callable[[Any], Any]] = {
    "copy()": lambda lm: lm.copy(),
    "copy.copy": copy.copy,
    "copy.deepcopy": copy.deepcopy,
    "pickle": lambda lm: pickle.loads(pickle.dumps(lm)),
    "cloudpickle": lambda lm: cloudpickle.loads(cloudpickle.dumps(lm)),
    "pickled twice": lambda lm: pickle.loads(pickle.dumps(pickle.loads(pickle.dumps(lm)))),
    "copy(temperature)": lambda lm: lm.copy(temperature=0.7),
    "copy(rollout_id)": lambda lm: lm.copy(rollout_id=7, temperature=1.0),
    "copy(cache=False)": lambda lm: lm.copy(cache=False),
    "copy(cache=Cache)": lambda lm: lm.copy(cache=Cache(ttl=5)),
    "wrap": lambda lm: dspy_prod.wrap(lm),
    "program.deepcopy": lambda lm: _program(lm).deepcopy().lm,
}


def _program(lm: dspy.LM) -> dspy.Predict:
    predict = dspy.Predict("question -> answer")
    predict.lm = lm
    return predict


def make(store: Any = "memory://copies", **arguments: Any) -> dspy_prod.LM:
    """An LM with every policy on."""
    arguments = {
        "budget": Budget(usd=1, name="b"), "limit": RateLimit(rpm=6000, burst=100), "max_tokens": 10, "cache": False,
        "breaker": CircuitBreaker(failure_threshold=2), "prices": PRICES, "retry": False, **arguments,
    }  # fmt: skip
    return dspy_prod.LM("unit/model", store=store, namespace="copies", **arguments)


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore("copies")


@pytest.fixture(params=COPIES)
def copied(request: pytest.FixtureRequest) -> Callable[[Any], Any]:
    return COPIES[request.param]


# -- one state -------------------------------------------------------------------------------------------------------


def test_a_copy_shares_store_breaker_limits_and_budget_rules(copied: Any, store: MemoryStore) -> None:
    """They are the very same objects, not equal ones."""
    lm = make(store, engine=PicklableEngine())
    twin = copied(lm)
    assert twin is not lm
    assert twin.pipeline.store is store
    assert twin.pipeline.primary.state is lm.pipeline.primary.state
    assert twin.pipeline.primary.limit_key == lm.pipeline.primary.limit_key
    assert twin.pipeline.budgets[0] is lm.pipeline.budgets[0]
    assert twin.pipeline.clock is lm.pipeline.clock


def test_a_copy_spends_the_same_money(copied: Any, store: MemoryStore) -> None:
    """What the copy spends is gone for the original, to the last call."""
    lm = make(store, engine=PicklableEngine(), budget=Budget(usd=0.2, name="b", max_wait=0))
    twin = copied(lm)
    spent = 0
    for turn in range(100):
        try:
            (twin if turn % 2 else lm)(f"{turn:03}")
        except BudgetExceededError:
            break
        spent += 1
    assert 0 < spent < 14
    for each in (lm, twin):
        with pytest.raises(BudgetExceededError):
            each("end")
    assert lm.costs().today_usd == pytest.approx(0.015 * spent)
    assert len(PicklableEngine.requests) == spent


def test_a_copy_meets_the_same_circuit(copied: Any, store: MemoryStore) -> None:
    """Failures of original and copy add up, and both find the circuit open then."""
    lm = make(store, engine=FailingEngine())
    twin = copied(lm)
    for each in (lm, twin):
        with pytest.raises(LMServerError):
            each("q")
    for each in (lm, twin):
        with pytest.raises(CircuitOpenError):
            each("q")


class FailingEngine(PicklableEngine):
    """Always down."""

    def complete(self, request: Request) -> Response:
        raise LMServerError("down", status=500)


def test_a_memory_store_with_a_clock_is_found_again_by_a_pickle() -> None:
    """Neither the store object nor its clock is lost on the way through a pickle in the same process."""
    clock = FakeClock()
    store = MemoryStore("copies", clock=clock)
    lm = make(store, engine=PicklableEngine(), clock=clock)
    twin = pickle.loads(pickle.dumps(lm))
    twin("q")
    assert twin.pipeline.clock is clock
    assert len(lm.ledger.records()) == 1


def test_a_pickle_outlives_its_lm() -> None:
    """When nobody holds the LM any more, the pickle still loads, from the store's URL."""
    data = pickle.dumps(make("memory://outlived", engine=PicklableEngine()))
    lm = pickle.loads(data)
    assert lm("q") == ["hi"]
    assert lm.pipeline.store.url == "memory://outlived"


def test_a_copy_made_elsewhere_uses_the_same_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The default store is relative to the directory; a copy made after `chdir` does not begin a new one."""
    monkeypatch.delenv("DSPY_PROD_STORE", raising=False)
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    monkeypatch.chdir(tmp_path / "a")
    lm = dspy_prod.LM(MODEL, engine=PicklableEngine(), budget=Budget(usd=1), max_tokens=9)
    monkeypatch.chdir(tmp_path / "b")
    for twin in (lm.copy(limit=RateLimit(rpm=60)), pickle.loads(pickle.dumps(lm)), lm.copy(timeout=None)):
        assert twin.pipeline.store is lm.pipeline.store
    assert os.listdir(tmp_path / "b") == []
    elsewhere = lm.copy(namespace="other")
    assert elsewhere.pipeline.store.namespace == "other"
    assert elsewhere.pipeline.store is not lm.pipeline.store
    lm.close()


# -- copy(...) -------------------------------------------------------------------------------------------------------


def test_copy_changes_generation_arguments_of_the_copy_only(store: MemoryStore) -> None:
    """`temperature` and `rollout_id` belong to the copy; the request shows the one, the cache key the other."""
    engine = ScriptedEngine("hi")
    lm = make(store, engine=engine, cache=True)
    warm = lm.copy(temperature=0.9)
    assert (warm.kwargs["temperature"], lm.kwargs["temperature"]) == (0.9, None)
    warm("q")
    assert engine.requests[-1].config.temperature == 0.9
    for rollout in (1, 2):
        lm.copy(rollout_id=rollout, temperature=1.0)("q")
        lm.copy(rollout_id=rollout, temperature=1.0)("q")
    assert engine.calls == 3
    assert lm.history == []


def test_copy_to_another_model_asks_that_model(store: MemoryStore) -> None:
    """Its route has a breaker and a price of its own; the budget stays common."""
    engine = ScriptedEngine("hi")
    lm = make(store, engine=engine)
    other = lm.copy(model="unit/other", prices={**PRICES, "unit/other": Price(input=1, output=1)})
    other("q")
    assert engine.requests[-1].model == "unit/other"
    assert other.pipeline.primary.state is not lm.pipeline.primary.state
    assert other.pipeline.budgets[0] is lm.pipeline.budgets[0]
    assert lm.model == "unit/model"
    assert [record.model for record in lm.ledger.records()] == ["unit/other"]


def test_copy_with_another_limit_keeps_what_was_counted(store: MemoryStore) -> None:
    """The limiter belongs to key and model; the copy's settings are used from its first call on."""
    lm = make(store, engine=ScriptedEngine("hi"))
    lm("q")
    strict = lm.copy(limit=RateLimit(rpm=100, burst=10))
    strict("q")
    (limiter,) = strict.health().limiters
    assert (limiter.requests_max, limiter.requests_available) == (100, 98)
    assert lm.copy(limit=None).health().limiters == []


def test_copy_with_another_key_is_another_identity() -> None:
    """Limits and breaker belong to the key; the budget does not."""
    lm = dspy_prod.LM(MODEL, api_key="sk-a", store="memory://keys", budget=Budget(usd=1), max_tokens=9)
    other = lm.copy(api_key="sk-b")
    assert other.pipeline.primary.limit_key != lm.pipeline.primary.limit_key
    assert other.pipeline.primary.state is not lm.pipeline.primary.state
    assert other.pipeline.budgets[0] is lm.pipeline.budgets[0]
    assert lm.copy(api_key="sk-a").pipeline.primary.state is lm.pipeline.primary.state


def test_copy_sends_the_new_key_and_address() -> None:
    """The provider sees which one was used."""
    with Provider() as first, Provider() as second:
        lm = dspy_prod.LM(MODEL, api_key="sk-a", api_base=first.url, store="memory://keys", cache=False, max_tokens=9)
        lm("q")
        lm.copy(api_key="sk-b")("q")
        lm.copy(api_base=second.url)("q")
        lm.close()
        assert [call.headers["authorization"] for call in first.calls] == ["Bearer sk-a", "Bearer sk-b"]
        assert [call.headers["authorization"] for call in second.calls] == ["Bearer sk-a"]


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"retry": Retry(), "num_retries": 1}, "give one"),
        ({"limit": "fast"}, "RateLimit"),
        ({"engine": "fastest"}, "engine"),
    ],
)
def test_copy_refuses_what_the_constructor_refuses(arguments: Any, error: str, store: MemoryStore) -> None:
    """A contradiction is named, and the original is as it was."""
    lm = make(store, engine=ScriptedEngine("hi"))
    with pytest.raises(ValueError, match=error):
        lm.copy(**arguments)
    assert lm("q") == ["hi"]


def test_histories_and_callbacks_are_the_copys_own(store: MemoryStore) -> None:
    """What a deep copy does is not in the original's history."""
    lm = make(store, engine=ScriptedEngine("hi"))
    lm("q")
    twin = copy.deepcopy(lm)
    twin("q")
    twin.kwargs["temperature"] = 0.3
    assert (len(lm.history), len(twin.history), lm.kwargs["temperature"]) == (1, 2, None)


# -- programs --------------------------------------------------------------------------------------------------------


class TwoSteps(dspy.Module):
    """Two predictors with LMs of their own."""

    def __init__(self, lm: Any) -> None:
        super().__init__()
        self.first = _program(lm)
        self.second = _program(lm)

    def forward(self, question: str) -> Any:
        return self.second(question=self.first(question=question).answer)


ANSWER = "[[ ## answer ## ]]\nyes\n\n[[ ## completed ## ]]"


def test_copies_of_a_program_in_threads_stay_within_one_budget(store: MemoryStore) -> None:
    """As an optimizer does it: 16 deep copies, each in its own thread, and not a cent too much."""
    engine = ScriptedEngine(ANSWER, input_tokens=200, output_tokens=10)
    limit = RateLimit(concurrency=4)
    program = TwoSteps(make(store, engine=engine, budget=Budget(usd=5, name="b", max_wait=30), limit=limit))

    def work(number: int) -> int:
        mine, done = program.deepcopy(), 0
        try:
            while True:
                with dspy.context():
                    mine(question=f"{number}")
                done += 1
        except BudgetExceededError:
            return done

    with ThreadPoolExecutor(16) as pool:
        assert sum(pool.map(work, range(16))) > 0
    costs = program.first.lm.costs()
    assert costs.today_usd == pytest.approx(engine.calls * 0.21)
    assert 5 - 0.8 < costs.today_usd <= 5
    assert engine.max_in_flight <= 4


def test_reset_copy_forgets_the_lm_and_reattaching_shares_again(store: MemoryStore) -> None:
    """DSPy's `reset_copy` drops predictor LMs; `set_lm` with the same one brings the shared state back."""
    lm = make(store, engine=ScriptedEngine(ANSWER))
    fresh = TwoSteps(lm).reset_copy()
    assert fresh.first.lm is None
    fresh.set_lm(lm)
    fresh(question="q")
    assert len(lm.ledger.records()) == 2


# -- wrap ------------------------------------------------------------------------------------------------------------


def test_wrap_keeps_every_argument_of_a_dspy_lm() -> None:
    """Model, sampling, key, address, retries and callbacks arrive; the provider sees them."""
    with Provider() as provider:
        plain = dspy.LM(
            MODEL, temperature=0.3, max_tokens=77, api_key="sk-plain", api_base=provider.url, num_retries=1, top_p=0.5,
            cache=False, timeout=7,
        )  # fmt: skip
        lm = dspy_prod.wrap(plain, budget=Budget(usd=1), store=fresh_memory())
        assert lm("q") == ["ok"]
        lm("q")
        lm.close()
        first, second = provider.calls
    assert (first.body["temperature"], first.body["max_completion_tokens"], first.body["top_p"]) == (0.3, 77, 0.5)
    assert first.headers["authorization"] == "Bearer sk-plain"
    assert (lm.settings.retry.attempts, lm.pipeline.primary.timeout, lm.cache) == (2, 7.0, False)
    assert second.model == "gpt-4o-mini"
    assert plain.history == []
    assert lm.costs().today_usd > 0


def test_wrap_runs_an_engine_object_beneath(store: MemoryStore) -> None:
    """Policies apply to whatever runs upstream."""
    engine = ScriptedEngine("from the engine")
    plain = dspy.LM("unit/model", engine=engine, async_engine=engine.asynchronous, max_tokens=10)
    lm = dspy_prod.wrap(plain, store=store, budget=Budget(usd=1), prices=PRICES)
    assert lm("q") == ["from the engine"]
    assert engine.calls == 1
    assert lm.costs().today_usd == pytest.approx(0.015)


def test_wrap_keeps_the_max_tokens_of_a_reasoning_model(store: MemoryStore) -> None:
    """DSPy renames it; the bound must not get lost."""
    lm = dspy_prod.wrap(dspy.LM("openai/gpt-5-mini", max_tokens=20_000, temperature=1.0), store=store)
    assert lm.kwargs["max_completion_tokens"] == 20_000
    assert lm.preview("q").output_tokens_bound == 20_000


def test_wrap_of_a_dummy_consumes_its_answers_in_order(store: MemoryStore) -> None:
    """DSPy's `DummyLM` keeps its script, uncached, and every call is in the ledger."""
    lm = dspy_prod.wrap(DummyLM([{"answer": "red"}, {"answer": "blue"}]), store=store)
    predict = dspy.Predict("question -> answer")
    with dspy.context(lm=lm):
        assert [predict(question="same").answer for _ in range(2)] == ["red", "blue"]
    assert [record.model for record in lm.ledger.records()] == ["dummy", "dummy"]


def test_wrap_of_our_own_lm_is_a_copy_with_policies(store: MemoryStore) -> None:
    """Wrapping twice stacks nothing."""
    lm = make(store, engine=ScriptedEngine("hi"))
    limited = dspy_prod.wrap(lm, limit=RateLimit(rpm=50))
    assert limited.settings.limit == RateLimit(rpm=50)
    assert limited.pipeline.budgets[0] is lm.pipeline.budgets[0]
    limited("q")
    assert len(lm.ledger.records()) == 1


def test_wrap_lets_policies_win_over_the_lms_arguments(store: MemoryStore) -> None:
    """Also those that `dspy.LM` has: engine, retries, cache, temperature."""
    engine = ScriptedEngine("hi")
    plain = dspy.LM(MODEL, temperature=0.3, num_retries=5, max_tokens=9)
    lm = dspy_prod.wrap(plain, store=store, engine=engine, retry=Retry(attempts=2), cache=False, temperature=0.9)
    lm("q")
    lm("q")
    assert [request.config.temperature for request in engine.requests] == [0.9, 0.9]
    assert lm.settings.retry.attempts == 2
    assert dspy_prod.wrap(plain, store=store, num_retries=1).settings.retry.attempts == 2


class Overrides(dspy.LM):
    """A legacy subclass."""

    def forward(self, prompt: Any = None, messages: Any = None, **kwargs: Any) -> Any:
        raise AssertionError("never reached")


def test_wrap_refuses_what_it_would_bypass() -> None:
    """A `forward` of its own, or no LM at all, is refused with the remedy."""
    with pytest.raises(ConfigError, match=r"Overrides overrides forward.*implement an engine"):
        dspy_prod.wrap(Overrides(MODEL))
    with pytest.raises(ConfigError, match=r"takes a dspy\.LM, got str"):
        dspy_prod.wrap(MODEL)


def test_a_coarse_budget_is_told_where_the_copy_is_made() -> None:
    """The warning names the user's line, not one of ours."""
    lm = dspy_prod.LM(MODEL, store="memory://coarse", max_tokens=16_000)
    with pytest.warns(UserWarning, match="more than 5 %") as caught:
        lm.copy(budget=Budget(usd=0.01))
    assert [warning.filename for warning in caught] == [__file__]

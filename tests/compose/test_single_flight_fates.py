"""What a leader got because of its own budget, deadline or run is no follower's. See `singleflight.py`."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from dspy.lm15 import Message, Request, Response, Usage
from dspy.utils.exceptions import LMServerError, LMTimeoutError

import dspy_prod
from dspy_prod import Budget, Cache, Price, RateLimit, Retry, Run, call_context
from dspy_prod.pipeline import plan
from dspy_prod.testing import FakeClock, Hang, Provider, ScriptedEngine, Status
from tests.compose.support import A_CENT, MODEL, SPARE, Caller, Gate, down, following, idle, over, records, spare, until

_numbers = itertools.count()


def within(call: Callable[[], Any], **context: Any) -> Callable[[], Any]:
    """The call, in this context."""

    def asking() -> Any:
        with call_context(**context):
            return call()

    return asking


# -- its budget ------------------------------------------------------------------------------------------------------
@pytest.fixture
def degrading() -> Any:
    """An LM in front of a provider that is degraded for the user `poor`, and the provider."""
    cheap = {"openai/good": (0.0, 100.0), "openai/cheap": (0.0, 1.0)}
    with Provider(prices=cheap) as provider:
        lm = dspy_prod.LM(
            "openai/good", api_base=provider.url, api_key="k", store=f"memory://fate-{next(_numbers)}", max_tokens=20,
            retry=False, prices={name: Price(input=0.0, output=output) for name, (_, output) in cheap.items()},
            budget=Budget(usd=0.1, per="total", scope="user", soft=0.0001, degrade_to="openai/cheap"),
        )  # fmt: skip
        for number in itertools.count():
            if number and provider.calls[-1].body["model"] == "cheap":
                break
            within(lambda number=number: lm(f"before {number}"), user="poor")()  # type: ignore[misc]
        yield lm, provider
        lm.close()


def models(provider: Provider) -> list[str]:
    """Who was asked since the user was degraded."""
    asked = [call.body["model"] for call in provider.calls]
    return asked[asked.index("cheap") + 1 :]


def test_a_cheaper_model_s_answer_is_for_those_of_the_same_account(degrading: Any) -> None:
    """Given a leader whose budget is past its threshold, when another user follows, then he gets what he asked for; and
    those of the leader's own account share its answer."""
    lm, provider = degrading
    provider.hold()
    poor = [Caller(within(lambda: lm("q"), user="poor"))]
    provider.wait_until(lambda it: it.in_flight == 1)
    poor += [Caller(within(lambda: lm("q"), user="poor")) for _ in range(2)]
    until(lambda: following(lm) == 2)
    rich = [Caller(within(lambda: lm("q"), user="rich")) for _ in range(3)]
    until(lambda: following(lm) == 5)
    provider.release()
    assert all(isinstance(caller.outcome(), list) for caller in (*poor, *rich))
    assert models(provider) == ["cheap", "good"]
    assert idle(lm)


def test_who_has_no_such_budget_gets_no_cheaper_model_s_answer(degrading: Any) -> None:
    """Given two LMs of one cache, one with a budget past its threshold, then the other's calls ask themselves."""
    lm, provider = degrading
    other = lm.copy(budget=None)
    assert other.pipeline.flights is lm.pipeline.flights
    provider.hold()
    leader = Caller(within(lambda: lm("q"), user="poor"))
    provider.wait_until(lambda it: it.in_flight == 1)
    follower = Caller(within(lambda: other("q"), user="poor"))
    until(lambda: following(lm) == 1)
    provider.release()
    assert isinstance(leader.outcome(), list)
    assert isinstance(follower.outcome(), list)
    assert models(provider) == ["cheap", "good"]


class Cut(ScriptedEngine):
    """Answers in full where it may, after its gate is opened."""

    def __init__(self) -> None:
        super().__init__(self.answered)
        self.gate = Gate()
        self.limits: list[int] = []

    def answered(self, request: Request) -> Response:
        most = request.config.max_tokens
        self.limits.append(most)
        if request.messages[-1].parts[0].text == "q":
            self.gate(request)
        cut = most < 100
        return Response(
            id="x", model="pair", message=Message.assistant("cut off" if cut else "whole"),
            finish_reason="length" if cut else "stop", usage=Usage(input_tokens=1, output_tokens=min(most, 60)),
        )  # fmt: skip


@pytest.mark.parametrize("scope", ["user", "global"])
def test_an_answer_cut_by_a_budget_is_for_those_who_draw_on_it(scope: Any) -> None:
    """Given a leader whose last money allows fewer tokens, then a user with money of his own gets a whole answer."""
    engine = Cut()
    lm = over(engine, cache=True, budget=Budget(usd=0.015, per="total", scope=scope, shrink_last=True))
    within(lambda: lm("before"), user="poor")()
    leader = Caller(within(lambda: lm("q"), user="poor"))
    assert engine.gate.arrived.wait(30)
    followers = [Caller(within(lambda user=user: lm("q"), user=user)) for user in ("rich", "poor")]  # type: ignore[misc]
    until(lambda: following(lm) == 2)
    engine.gate.open()
    assert leader.outcome() == ["cut off"]
    shared = scope == "global"
    assert [caller.outcome() for caller in followers] == [["cut off"] if shared else ["whole"], ["cut off"]]
    assert engine.limits == [100, 90] if shared else [100, 90, 100]
    assert idle(lm)


@pytest.mark.parametrize("last", ["answers", "fails"])
def test_a_route_left_out_for_a_leader_s_budget_is_its_followers_to_ask(last: str) -> None:
    """Given a fallback with a budget for each user, when it refuses the leader, then a user with money is answered."""
    first, second = ScriptedEngine(lambda _: down(503)), ScriptedEngine("second", output_tokens=100)
    gate = Gate("third" if last == "answers" else down(500))
    third = ScriptedEngine([gate, "none"])
    own = {"retry": False, "breaker": False, "cache": False, "max_tokens": 100, "prices": {SPARE: A_CENT}}
    limited = dspy_prod.LM(
        SPARE, engine=second, store="memory://fate-spare", budget=Budget(usd=0.015, per="total", scope="user"), **own
    )
    lm = over(
        first, cache=True, fallbacks=[limited, dspy_prod.LM("openai/third", engine=third, **{**own, "prices": {}})]
    )
    within(lambda: lm("before"), user="poor")()
    leader = Caller(within(lambda: lm("q"), user="poor"))
    assert gate.arrived.wait(30)
    follower = Caller(within(lambda: lm("q"), user="rich"))
    until(lambda: following(lm) == 1)
    gate.open()
    if last == "answers":
        assert leader.outcome() == ["third"]
    else:
        assert isinstance(leader.outcome(), LMServerError)
    assert follower.outcome() == ["second"]
    assert idle(lm)


# -- its time --------------------------------------------------------------------------------------------------------
def test_a_retry_that_a_leader_had_no_time_for_is_made_by_who_has() -> None:
    """Given a leader in a hurry, when the upstream asks for more time than it has, then it and those in the same hurry
    fail, and one of the others asks again."""
    gate = Gate(down(503, retry_after=2.0))
    engine = ScriptedEngine([gate, "ok"])
    lm = over(engine, cache=True, retry=Retry())
    hurried = within(lambda: lm("q"), deadline=1.9)
    leader = Caller(hurried)
    assert gate.arrived.wait(30)
    others = [Caller(hurried), Caller(within(lambda: lm("q"), deadline=60)), Caller(lambda: lm("q"))]
    until(lambda: following(lm) == 3)
    gate.open()
    assert isinstance(leader.outcome(), LMServerError)
    assert isinstance(others[0].outcome(), LMServerError)
    assert [caller.outcome() for caller in others[1:]] == [["ok"]] * 2
    assert engine.calls == 2
    assert idle(lm)


def test_a_pause_that_nobody_may_make_is_everybody_s_verdict() -> None:
    """Given calls without a deadline, when the upstream asks for longer than any may pause, then all hear of it."""
    gate = Gate(down(503, retry_after=100.0))
    engine = ScriptedEngine([gate, "ok"])
    lm = over(engine, cache=True, retry=Retry())
    leader = Caller(within(lambda: lm("q"), deadline=30))
    assert gate.arrived.wait(30)
    follower = Caller(lambda: lm("q"))
    until(lambda: following(lm) == 1)
    gate.open()
    assert [type(caller.outcome()) for caller in (leader, follower)] == [LMServerError] * 2
    assert engine.calls == 1


@pytest.mark.parametrize("way", ["call", "acall"])
@pytest.mark.parametrize("turn", ["at once", "when its turn comes again"])
def test_a_pause_that_a_leader_without_a_deadline_does_not_make_is_made_by_who_may(
    monkeypatch: pytest.MonkeyPatch, way: str, turn: str
) -> None:
    """Given a leader without a deadline, which pauses for 60 s at most (here for one), when the upstream asks for more,
    then those without a deadline fail with it, and who has a longer one asks again."""
    monkeypatch.setattr(plan, "DEFAULT_MAX_WAIT", 1.0)
    gate = Gate(down(503, retry_after=1.2))
    engine = ScriptedEngine([gate, "ok"])
    last = [] if turn == "at once" else [spare(ScriptedEngine(lambda _: down(500)))]
    lm = over(engine, cache=True, retry=Retry(patience=0.1), fallbacks=last)
    ask = (lambda: lm("q")) if way == "call" else (lambda: asyncio.run(lm.acall("q")))
    leader = Caller(ask)
    assert gate.arrived.wait(30)
    others = [Caller(ask), Caller(within(ask, deadline=60)), Caller(within(ask, deadline=50))]
    until(lambda: following(lm) == 3)
    gate.open()
    assert [type(caller.outcome()) for caller in (leader, others[0])] == [LMServerError] * 2
    assert [caller.outcome() for caller in others[1:]] == [["ok"]] * 2
    assert engine.calls == 2
    assert idle(lm)


@pytest.mark.parametrize("wait", ["in line", "foreseen"])
def test_a_line_that_a_leader_without_a_deadline_left_is_waited_in_by_who_may(
    monkeypatch: pytest.MonkeyPatch, wait: str
) -> None:
    """Given a busy primary and a fallback that is down, when a leader has waited as long as a call without a deadline
    does, or would have to wait for longer, then who has a longer one waits on, and the others fail with it."""
    monkeypatch.setattr(plan, "DEFAULT_MAX_WAIT", 1.0)
    busy, gate = Gate("busy"), Gate(down(500))
    limit = RateLimit(concurrency=1) if wait == "in line" else RateLimit(rpm=40, burst=1)
    lm = over(
        ScriptedEngine([busy, "ok"]), cache=True, retry=Retry(attempts=2, patience=0.0, backoff=0.001), limit=limit,
        fallbacks=[dspy_prod.LM(SPARE, engine=ScriptedEngine([gate, down(500)]), store="memory://", retry=False)],
    )  # fmt: skip
    sits = Caller(lambda: lm("busy"))
    assert busy.arrived.wait(30)
    if wait == "foreseen":
        busy.open()
        assert sits.outcome() == ["busy"]
    leader = Caller(lambda: lm("q"))
    assert gate.arrived.wait(30)
    others = [Caller(lambda: lm("q")), Caller(within(lambda: lm("q"), deadline=60))]
    until(lambda: following(lm) == 2)
    gate.open()
    assert [type(caller.outcome()) for caller in (leader, others[0])] == [LMServerError] * 2
    busy.open()
    assert sits.outcome() == ["busy"]
    assert others[1].outcome() == ["ok"]
    assert idle(lm)


def test_who_tries_harder_does_not_follow() -> None:
    """Given two LMs of one cache, one of which retries, then the other one's failure is not its own."""
    gate = Gate(down(503))
    engine = ScriptedEngine([gate, "ok"])
    hasty = over(engine, cache=True, retry=False, store="memory://fate-retries")
    patient = over(engine, cache=True, retry=Retry(backoff=0.001), store="memory://fate-retries")
    leader = Caller(lambda: hasty("q"))
    assert gate.arrived.wait(30)
    assert patient("q") == ["ok"]
    gate.open()
    assert isinstance(leader.outcome(), LMServerError)


def test_who_waits_longer_for_an_answer_does_not_follow() -> None:
    with Provider() as provider:
        at: Any = {"api_base": provider.url, "api_key": "k", "store": "memory://fate-timeouts", "retry": False}
        hasty, patient = dspy_prod.LM(MODEL, timeout=0.6, **at), dspy_prod.LM(MODEL, timeout=30, **at)
        provider.faults = [Hang(2.0)]  # type: ignore[assignment]
        leader = Caller(lambda: hasty("q"))
        provider.wait_until(lambda it: it.in_flight == 1)
        assert isinstance(patient("q"), list)
        assert isinstance(leader.outcome(), LMTimeoutError)
        same = dspy_prod.LM(MODEL, timeout=30, **at)
        assert same.pipeline.flights is patient.pipeline.flights
        for lm in (hasty, patient, same):
            lm.close()


# -- its run ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("store", ["memory", "sqlite"])
@pytest.mark.parametrize("kind", ["text", "vectors"])
def test_who_belongs_to_no_run_does_not_wait_for_its_outage(tmp_path: Path, store: str, kind: str) -> None:
    """Given a call that outlasts an outage, when another asks the same, then it hears of the outage as if alone; nor
    does it wait for a claim of the call's among processes."""
    with Provider(faults=lambda _: Status(503)) as provider:
        lm = at(provider, tmp_path, store, kind)
        run = Run("r", calls=1000, outage=60, store=f"memory://fate-{next(_numbers)}")
        leader = Caller(within(lambda: lm("q"), run=run))
        until(lambda: run.outages.models)
        with call_context(deadline=20):
            assert isinstance(Caller(lambda: lm("q")).outcome(10), LMServerError)
        run.stop()
        assert isinstance(leader.outcome(), dspy_prod.RunStoppedError)
        until(lambda: idle(lm))
        lm.close()


def at(provider: Provider, tmp_path: Path, store: str, kind: str = "text", **policies: Any) -> Any:
    """An LM in front of a provider, or an embedder whose upstream is down."""
    url = f"memory://fate-{next(_numbers)}" if store == "memory" else f"sqlite:///{tmp_path}/state.db"
    own: dict[str, Any] = {"retry": False, "breaker": False, "store": url}
    if kind == "vectors":
        return dspy_prod.Embedder(unable, **own)
    return dspy_prod.LM(MODEL, api_base=provider.url, api_key="k", **{**own, **policies})


def unable(texts: list[str]) -> Any:
    raise down(503)


def test_after_an_outage_one_process_asks_for_all(tmp_path: Path) -> None:
    """Given two LMs of one store in a run, when their upstream is back, then one of them asks and the other waits."""
    with Provider(faults=lambda _: Status(503)) as provider:
        one, other = at(provider, tmp_path, "sqlite"), at(provider, tmp_path, "sqlite", cache=Cache(ttl=900))
        assert one.pipeline.store is other.pipeline.store
        assert one.pipeline.flights is not other.pipeline.flights
        run = Run("r", calls=1000, outage=60, store=f"memory://fate-{next(_numbers)}")
        callers = [Caller(within(lambda lm=lm: lm("q"), run=run)) for lm in (one, other)]  # type: ignore[misc]
        until(lambda: len(provider.calls) >= 2)
        provider.hold()
        provider.faults = None  # type: ignore[assignment]
        provider.wait_until(lambda it: it.in_flight == 1)
        provider.release()
        assert all(isinstance(caller.outcome(), list) for caller in callers)
        assert sum(call.fault is None for call in provider.calls) == 1
        one.close()
        other.close()


# -- what its followers' records say -----------------------------------------------------------------------------------
def test_a_follower_of_a_stale_answer_is_recorded_so() -> None:
    gate, clock = Gate(down(503)), FakeClock()
    lm = over(ScriptedEngine(["old", gate]), cache=Cache(ttl=10, ttl_jitter=0, stale_if_error=60), clock=clock)
    assert lm("q") == ["old"]
    clock.advance(11)
    leader = Caller(lambda: lm("q"))
    assert gate.arrived.wait(30)
    follower = Caller(lambda: lm("q"))
    until(lambda: following(lm) == 1)
    gate.open()
    assert [caller.outcome() for caller in (leader, follower)] == [["old"]] * 2
    assert [record.outcome for record in records(lm)] == ["ok", "error", "stale", "stale"]


@pytest.mark.parametrize("store", ["memory", "sqlite"])
def test_a_follower_that_gives_up_is_recorded_with_its_wait(tmp_path: Path, store: str) -> None:
    """Of its own process, and of another one's call."""
    with Provider() as provider:
        lm = at(provider, tmp_path, store)
        other = lm if store == "memory" else at(provider, tmp_path, store, cache=Cache(ttl=900))
        provider.hold()
        leader = Caller(lambda: lm("q"))
        provider.wait_until(lambda it: it.in_flight == 1)
        with pytest.raises(dspy_prod.DeadlineExceededError, match="another process" if store == "sqlite" else "call;"):
            within(lambda: other("q"), deadline=0.3, user="late")()
        provider.release()
        assert isinstance(leader.outcome(), list)
        [record] = other.ledger.records(user="late")
        assert record.outcome == "refused"
        assert 0.25 < record.waited < 5
        lm.close()
        other.close()

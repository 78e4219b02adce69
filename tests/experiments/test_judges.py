"""Judges of live answers: a sample within a budget, blind to the variant, and in nobody's way."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
import time
from collections.abc import Callable
from typing import Any

import dspy
import pytest

import dspy_prod
from dspy_prod import ConfigError, Experiment, Judge, Metric, call_context, call_report
from dspy_prod.stores.memory import MemoryStore
from dspy_prod.stores.trials import Exposure
from dspy_prod.testing import FakeClock, Provider
from dspy_prod.testing.faults import Status
from tests.experiments.conftest import Triage

Asked = Callable[..., dspy_prod.LM]
QUALITY = Metric("quality", judge="untrusted")


class Politeness(dspy.Module):
    """A judge that asks a model."""

    def __init__(self) -> None:
        super().__init__()
        self.judge = dspy.Predict("message, label -> polite: bool")

    def forward(self, example: Any, prediction: Any, trace: Any = None) -> bool:
        return bool(self.judge(message=example.message, label=prediction.label).polite)


def judged(store: Any, judge: Judge, metric: Metric = QUALITY, **more: Any) -> Experiment:
    return Experiment(
        "e", variants={"control": Triage(), "new": Triage("Think first.")}, store=store, metrics=[metric],
        judges={"quality": judge}, **more,
    )  # fmt: skip


def ask(exp: Experiment, unit: str, message: str = "hi") -> Any:
    with call_context(user=unit, tenant="acme"):
        return exp(message=message)


def scores(exp: Experiment) -> dict[str, float | None]:
    """What the store has of units with a score."""
    trials = exp._works.trials
    return {unit.unit: unit.values.mean for unit in trials.matured("e", "quality") if unit.values.size}


def settled(exp: Experiment) -> None:
    assert exp._works.judges is not None
    assert exp._works.judges.wait()


# -- what is refused ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("judges", "metrics", "told"),
    [
        ({"quality": Judge(max)}, [], "'quality'.*no metric.*metrics= has none"),
        ({"quality": Judge(lambda e, p: 1)}, [Metric("quality")], "say what its score is worth"),
        ({"cost": Judge(lambda e, p: 1)}, [QUALITY], "calls tell it by themselves"),
        ({"quality": lambda e, p: 1}, [QUALITY], "takes dspy_prod.Judge, got function"),
    ],
)
def test_a_judge_is_of_a_metric_that_says_what_it_is_worth(
    judges: Any, metrics: list[Metric], told: str, store: str
) -> None:
    with pytest.raises(ConfigError, match=told):
        Experiment("e", variants={"a": Triage(), "b": Triage()}, metrics=metrics, judges=judges, store=store)


@pytest.mark.parametrize(
    "impossible", [{"share": 0}, {"share": 1.5}, {"usd": 0}, {"usd": float("inf")}, {"share": True}]
)
def test_impossible_shares_and_budgets_are_refused(impossible: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"Judge\\({next(iter(impossible))}="):
        Judge(lambda e, p: 1, **impossible)


@pytest.mark.parametrize("metric", [None, lambda: 1, lambda e, p, trace: 1])
def test_what_cannot_be_called_as_a_metric_is_refused(metric: Any) -> None:
    with pytest.raises(ConfigError, match="example, prediction"):
        Judge(metric)


def test_only_its_judge_tells_a_judged_metric(asked: Asked, store: str) -> None:
    asked()
    exp = judged(store, Judge(lambda e, p: 1))
    with pytest.raises(ConfigError, match="its judge tells it"):
        exp.record("u1", quality=1)


# -- whom it looks at --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("store", ["memory", pytest.param("sqlite", marks=pytest.mark.slow)], indirect=True)
def test_a_sample_of_the_units_is_judged_alike_in_both_variants(asked: Asked, store: str) -> None:
    """The same units by whatever object of the experiment they come; of all variants the same share."""
    asked()
    seen: list[str] = []

    def quality(example: Any, prediction: Any) -> float:
        seen.append(example.message)
        return 0.5

    both = [judged(store, Judge(quality, share=0.2)) for _ in range(2)]
    arms = {}
    for number in range(400):
        arms[f"u{number}"] = call_report(ask(both[number % 2], f"u{number}", message=f"u{number}")).variant
        if number % 40 == 39:
            [settled(exp) for exp in both]
    again = len(seen)
    for number in range(400):
        ask(both[1 - number % 2], f"u{number}", message=f"u{number}")
        if number % 40 == 39:
            [settled(exp) for exp in both]
    assert 55 <= again <= 105
    assert set(seen) == set(seen[:again]), "the same ones, in the other process"
    of_new = sum(arms[unit] == "new" for unit in set(seen)) / len(set(seen))
    assert 0.36 <= of_new <= 0.64


def test_it_is_told_the_question_and_the_answer_but_not_the_variant(asked: Asked, store: str) -> None:
    asked()
    told: list[Any] = []

    def quality(example: Any, prediction: Any, trace: Any = None) -> float:
        told.append((example, prediction, dspy_prod.context.current.current()))
        return 1.0

    exp = judged(store, Judge(quality, share=1.0))
    ask(exp, "u1", message="Where is it?")
    settled(exp)
    [(example, prediction, context)] = told
    assert example.inputs().toDict() == {"message": "Where is it?"}
    assert prediction.label
    with pytest.raises(ValueError, match="has no report"):
        call_report(prediction)
    assert (context.user, context.tenant, context.experiment, context.variant) == (None, None, None, None)
    assert (context.priority, dict(context.tags)) == ("low", {"judge": "quality"})


def test_units_that_were_not_drawn_count_for_nothing_and_a_failed_judge_is_missing(asked: Asked) -> None:
    """Others would have counted as 0; of those that were drawn, those without a score do."""
    clock = FakeClock()
    store = MemoryStore(clock=clock)
    asked()

    def quality(example: Any, prediction: Any) -> float:
        if int(example.message) % 2:
            raise RuntimeError("no idea")
        return 1.0

    exp = judged(store, Judge(quality, share=0.5))
    for number in range(200):
        ask(exp, f"u{number}", message=str(number))
        settled(exp)
    clock.advance(61.0)
    exp.step()
    drawn = [number for number in range(200) if exp._works.sample.takes("quality", f"u{number}")]
    assert 70 <= len(drawn) <= 130
    evidence = exp._works.opened.controller._reading._restored()
    assert sum(evidence.units("quality", arm) for arm in ("control", "new")) == len(drawn)
    [found] = [each for each in exp.scorecard().metrics if each.metric == "quality"]
    assert found.interval is not None
    even = sum(number % 2 == 0 for number in drawn) / len(drawn)
    assert abs((found.interval.control + found.interval.candidate) / 2 - even) < 0.15


# -- what it costs -----------------------------------------------------------------------------------------------------
def test_its_cost_stays_within_its_budget_and_is_no_variant_s(
    provider: Provider, asked: Asked, store: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Once it is spent nobody is drawn any more; the audit says since when, and later units do not count as missing."""
    lm = asked(cache=False, max_tokens=20)
    exp = judged(store, Judge(Politeness(), share=1.0, usd=0.002))
    with caplog.at_level(logging.WARNING, "dspy_prod"):
        for number in range(90):
            ask(exp, f"u{number}", message=f"m{number}")
            settled(exp)
    assert "its budget is spent" in caplog.text
    by_tag = {row.value: row.usd for row in lm.costs(by="tag:judge")}
    assert 0.001 < by_tag["quality"] <= 0.002
    of_variants = sum(row.usd for row in lm.costs(by="variant") if row.value in ("e/control", "e/new"))
    assert of_variants + by_tag["quality"] == pytest.approx(provider.bill.usd)
    assert {record.priority for record in lm.ledger.records() if dict(record.tags).get("judge")} <= {"low"}
    [line] = [each for each in exp._works.trials.decisions("e") if each.what == "judge_spent"]
    assert json.loads(line.evidence)["metric"] == "quality"
    judged_units = len(scores(exp))
    assert 10 <= judged_units < 85
    again = judged(store, Judge(Politeness(), share=1.0, usd=0.002))
    ask(again, "late", message="late")
    settled(again)
    assert "late" not in scores(again)
    assert len([each for each in exp._works.trials.decisions("e") if each.what == "judge_spent"]) == 1


@pytest.mark.parametrize("long", [1, 4, 5])
def test_an_answer_that_is_larger_than_its_money_is_one_missing_unit(
    long: int, asked: Asked, caplog: pytest.LogCaptureFixture
) -> None:
    """A judge ended for good, its budget nearly whole, as soon as one user sent something long. Five of them in a row
    are how calls are now."""
    clock = FakeClock()
    store = MemoryStore(clock=clock)
    asked(cache=False, max_tokens=20)
    exp = judged(store, Judge(Politeness(), share=1.0, usd=0.005))
    messages = {"a": "short", **{f"b{number}": "long " * 30_000 for number in range(long)}, "c": "short", "d": "short"}
    with caplog.at_level(logging.WARNING, "dspy_prod"):
        for unit, message in messages.items():
            ask(exp, unit, message=message)
            settled(exp)
    clock.advance(61.0)  # those without a score are waited for
    ends = long == 5
    assert set(scores(exp)) == ({"a"} if ends else {"a", "c", "d"})
    whats = [each.what for each in exp._works.trials.decisions("e")]
    assert whats.count("judge_spent") == int(ends)
    assert "its budget does not cover this answer" in caplog.text


def test_a_judge_ends_at_once_where_what_is_left_is_below_a_usual_call(asked: Asked, store: str) -> None:
    """Whoever were refused until five are would be missing."""
    asked(cache=False, max_tokens=20)
    seen: list[str] = []
    judge = Politeness()

    def quality(example: Any, prediction: Any) -> bool:
        seen.append(example.message)
        return bool(judge(example, prediction))

    exp = judged(store, Judge(quality, share=1.0, usd=0.0005))
    for number in range(10, 50):
        ask(exp, f"u{number}", message=f"m{number}")
        settled(exp)
    assert 1 <= len(scores(exp)) == len(seen) - 1 < 35


def test_a_budget_of_its_lm_is_not_its_own(
    provider: Provider, asked: Asked, store: str, caplog: pytest.LogCaptureFixture
) -> None:
    """It may have money again in an hour: others are judged then, and the audit does not say that it has ended."""
    asked()
    seen: list[str] = []
    poor = asked(cache=False, max_tokens=20, budget=dspy_prod.Budget(usd=1e-9, per="hour", name="hourly"))

    def quality(example: Any, prediction: Any) -> float:
        seen.append(example.message)
        if example.message != "third":
            poor("rate it")
        return 1.0

    asked()
    exp = judged(store, Judge(quality, share=1.0, usd=100.0))
    for message in ("first", "second", "third"):
        ask(exp, message, message=message)
        settled(exp)
    assert seen == ["first", "second", "third"]
    assert not [each for each in exp._works.trials.decisions("e") if each.what == "judge_spent"]
    assert "hourly" in caplog.text


@pytest.mark.parametrize("scope", ["user", "tenant"])
def test_it_counts_for_no_budget_of_users_or_tenants(scope: Any, asked: Asked, store: str) -> None:
    """Nor for that of those who do not say who they are; and one that wants a name refuses no judge."""
    judge = Politeness()
    judge.set_lm(asked(max_tokens=20, budget=dspy_prod.Budget(usd=1e-9, scope=scope, require=True, name="theirs")))
    asked()
    exp = judged(store, Judge(judge, share=1.0))
    ask(exp, "u1")
    settled(exp)
    assert set(scores(exp)) == {"u1"}


def test_units_after_the_end_of_its_budget_are_not_missing(asked: Asked) -> None:
    clock = FakeClock()
    store = MemoryStore(clock=clock)
    asked(cache=False, max_tokens=20)
    exp = judged(store, Judge(Politeness(), share=1.0, usd=0.002))
    for number in range(90):
        ask(exp, f"u{number}", message=f"m{number}")
        settled(exp)
        clock.advance(0.001)
    have = len(scores(exp))
    clock.advance(61.0)
    exp.step()
    evidence = exp._works.opened.controller._reading._restored()
    assert have <= sum(evidence.units("quality", arm) for arm in ("control", "new")) <= have + 1


def test_a_budget_that_is_raised_goes_on_and_the_time_between_counts_for_nothing(asked: Asked) -> None:
    """By whoever makes the experiment with the higher one; who has the lower one ends it for itself alone."""
    clock = FakeClock()
    store = MemoryStore(clock=clock)
    asked(cache=False, max_tokens=20)

    def some(exp: Experiment, name: str, count: int) -> None:
        for number in range(count):
            ask(exp, f"{name}{number}", message=f"{name}{number}")
            settled(exp)
            clock.advance(0.001)

    low = judged(store, Judge(Politeness(), share=1.0, usd=0.001))
    some(low, "u", 60)
    have = set(scores(low))
    assert not {"u58", "u59"} & have
    clock.advance(1.0)
    high = judged(store, Judge(Politeness(), share=1.0, usd=0.01))
    some(high, "v", 5)
    again = judged(store, Judge(Politeness(), share=1.0, usd=0.001))
    some(again, "w", 3)
    some(high, "x", 2)
    whats = [each.what for each in high._works.trials.decisions("e") if each.what.startswith("judge")]
    assert whats == ["judge_spent", "judge_resumed"]
    clock.advance(61.0)
    assert set(scores(high)) - have == {"v0", "v1", "v2", "v3", "v4", "x0", "x1"}
    high.step()
    evidence = high._works.opened.controller._reading._restored()
    counted = sum(evidence.units("quality", arm) for arm in ("control", "new"))
    assert len(have) + 10 <= counted <= len(have) + 11, "those of w are missing, as there was a judge"


def in_two_processes(usd: float, others_usd: float | None) -> tuple[FakeClock, MemoryStore, Experiment, Experiment]:
    """A judge of answers in one process that are too large for what is left, and of small ones in another."""
    clock = FakeClock()
    store = MemoryStore(clock=clock)
    one, another = (judged(store, Judge(Politeness(), share=1.0, usd=cap)) for cap in (usd, others_usd))
    return clock, store, one, another


def some(clock: FakeClock, exp: Experiment, name: str, count: int, message: str = "short") -> None:
    for number in range(count):
        ask(exp, f"{name}{number}", message=f"{message} {number}")
        settled(exp)
        clock.advance(0.001)


def test_a_judge_that_one_process_has_ended_is_asked_in_no_other(asked: Asked, provider: Provider) -> None:
    """There was money left for smaller answers than those of the one that ended it; their scores counted nowhere."""
    asked(cache=False, max_tokens=20)
    clock, store, one, another = in_two_processes(0.005, 0.005)
    some(clock, another, "before", 2)
    some(clock, one, "large", 5, "long " * 30_000)
    had = provider.bill.usd
    some(clock, another, "small", 4)
    answers = [call for call in provider.calls if "polite" not in str(call.body)]
    assert len(answers) == 11
    assert set(scores(another)) == {"before0", "before1"}
    assert len(provider.calls) == 11 + 2, "of the judge no other calls"
    assert provider.bill.usd > had, "users were answered"
    high = judged(store, Judge(Politeness(), share=1.0, usd=0.05))
    some(clock, high, "high", 2)
    some(clock, another, "again", 2)
    clock.advance(61.0)
    assert set(scores(high)) == {"before0", "before1", "high0", "high1", "again0", "again1"}


@pytest.mark.parametrize("others_usd", [0.05, None])
def test_a_judge_with_a_higher_budget_goes_on_where_one_with_a_lower_one_ends(
    others_usd: float | None, asked: Asked
) -> None:
    """Made before that, it said nothing, and its scores counted nowhere."""
    asked(cache=False, max_tokens=20)
    clock, _, one, another = in_two_processes(0.005, others_usd)
    some(clock, one, "large", 5, "long " * 30_000)
    some(clock, another, "small", 3)
    whats = [each.what for each in another._works.trials.decisions("e") if each.what.startswith("judge")]
    assert whats == ["judge_spent", "judge_resumed"]
    clock.advance(61.0)
    another.step()
    evidence = another._works.opened.controller._reading._restored()
    counted = sum(evidence.units("quality", arm) for arm in ("control", "new"))
    assert counted >= 5 + 2, "but for those of the time between"
    assert set(scores(another)) == {"small0", "small1", "small2"}


def test_an_ended_judge_stays_so_while_the_store_is_away(asked: Asked, monkeypatch: pytest.MonkeyPatch) -> None:
    asked(cache=False, max_tokens=20)
    clock, store, one, another = in_two_processes(0.005, 0.005)
    some(clock, one, "large", 5, "long " * 30_000)
    some(clock, another, "small", 1)

    def away(name: str) -> Any:
        raise dspy_prod.StoreUnavailableError("away")

    with monkeypatch.context() as patched:
        patched.setattr(store.trials, "decisions", away)
        some(clock, another, "away", 2)
    assert scores(another) == {}


@pytest.mark.parametrize("how", ["fallback", "handled"])
def test_what_is_made_of_a_spent_budget_is_no_score(how: str, asked: Asked, store: str) -> None:
    """A fallback, or a metric that catches errors, answered every unit with 0 from then on; no judge ended."""
    asked(cache=False, max_tokens=20)
    program = dspy.Predict("message, label -> verdict")
    judge = dspy_prod.Production(program, fallback_response={"verdict": "no"} if how == "fallback" else None)
    seen: list[str] = []

    def quality(example: Any, prediction: Any) -> float:
        seen.append(example.message)
        try:
            verdict = judge(message=example.message, label=prediction.label).verdict
        except dspy_prod.BudgetExceededError:
            verdict = "no"
        return float(verdict != "no")

    exp = judged(store, Judge(quality, share=1.0, usd=0.0003))
    for number in range(20):
        ask(exp, f"u{number}", message=f"m{number}")
        settled(exp)
    assert 1 <= len(scores(exp)) == len(seen) - 1 < 15
    assert set(scores(exp).values()) == {1.0}
    assert [each.what for each in exp._works.trials.decisions("e")].count("judge_spent") == 1


def test_a_budget_that_a_call_under_way_holds_ends_no_judge(provider: Provider, asked: Asked, store: str) -> None:
    """Two processes judge from it: what one of them holds for a call that hangs, it gives back."""
    asked(cache=False, max_tokens=1_000, limit=dspy_prod.RateLimit(max_wait=0.05))
    hanging = threading.Event()

    def latency(call: Any) -> float:
        if "polite" in str(call.body) and not hanging.is_set():
            hanging.set()
            return 4.0
        return 0.0

    provider.latency = latency
    one, another = (judged(store, Judge(Politeness(), share=1.0, usd=0.0015)) for _ in range(2))
    ask(one, "u1")
    assert hanging.wait(30)
    ask(another, "u2")
    settled(another)
    settled(one)
    ask(another, "u3")
    settled(another)
    assert sum("polite" in str(call.body) for call in provider.calls) == 2, "u1 and u3"
    assert not [each for each in another._works.trials.decisions("e") if each.what == "judge_spent"]


def test_the_judge_of_an_experiment_that_was_removed_says_nothing_of_the_next_one(
    asked: Asked, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor is anybody asked for it any more: what stands in the queue is left."""
    asked()
    begun, free = threading.Event(), threading.Event()
    seen: list[str] = []

    def quality(example: Any, prediction: Any) -> float:
        seen.append(example.message)
        begun.set()
        assert free.wait(30)
        return 1.0

    old = judged(store, Judge(quality, share=1.0))
    for number in range(5):
        ask(old, f"u{number}", message=f"u{number}")
    assert begun.wait(30)
    old.remove(force=True)
    monkeypatch.setattr("dspy_prod.experiments.declaration.secrets.token_hex", lambda _: "another")
    new = judged(store, Judge(lambda e, p: 0.0, share=1.0))
    for number in range(5):
        ask(new, f"u{number}", message=f"u{number}")
    settled(new)
    free.set()
    settled(old)
    assert seen == ["u0"]
    assert scores(new) == dict.fromkeys([f"u{number}" for number in range(5)], 0.0)


@pytest.mark.parametrize("when", ["the store is away", "it is removed as the score is kept"])
def test_no_score_of_an_experiment_that_was_removed_reaches_the_next_one(
    when: str, asked: Asked, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even where the judge cannot know."""
    asked()
    begun, free = threading.Event(), threading.Event()

    def quality(example: Any, prediction: Any) -> float:
        begun.set()
        assert free.wait(30)
        return 1.0

    old = judged(store, Judge(quality, share=1.0))
    ask(old, "u0")
    assert begun.wait(30)
    judges = old._works.judges
    assert judges is not None

    def anew() -> Experiment:
        old.remove(force=True)
        monkeypatch.setattr("dspy_prod.experiments.declaration.secrets.token_hex", lambda _: "another")
        new = judged(store, Judge(lambda e, p: 0.0, share=1e-9))
        trials = new._works.trials
        trials.expose(Exposure("e", "u0", 0, "control", 0.5, trials.now()))
        return new

    made: list[Experiment] = []
    if when == "the store is away":
        made.append(anew())
        monkeypatch.setattr(judges, "_is_there", lambda: True)
    else:
        monkeypatch.setattr(judges, "_is_there", lambda: [made.append(anew())] == [None])
    free.set()
    settled(old)
    [new] = made
    assert scores(new) == {}
    judges._end("quality")
    assert [each.what for each in new._works.trials.decisions("e")] == ["start"]


# -- what it may do ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("trust", "verdict"), [("untrusted", "keep"), ("trusted", "promote")])
def test_an_untrusted_judge_alone_promotes_nothing(trust: Any, verdict: str, asked: Asked, store: str) -> None:
    asked()
    likes = {"control": 0.0, "new": 1.0}
    variants: dict[str, str] = {}
    judge = Judge(lambda example, prediction: likes[variants[example.message]], share=1.0)
    exp = judged(store, judge, Metric("quality", judge=trust), guardrails=())
    for number in range(150):
        unit = f"u{number}"
        variants[unit] = exp.assign(unit)
        ask(exp, unit, message=unit)
        if number % 30 == 29:
            settled(exp)
    card = exp.step()
    assert card.decision == verdict
    assert (card.serves or "") == ("new" if verdict == "promote" else "")
    if verdict == "keep":
        assert "only an untrusted judge says so" in card.reason


def test_a_judge_that_hangs_delays_nobody(asked: Asked, store: str) -> None:
    """What finds the queue full is left out; memory does not grow."""
    asked()
    free = threading.Event()
    exp = judged(store, Judge(lambda e, p: free.wait(30.0), share=1.0))
    began = time.monotonic()
    for number in range(100):
        ask(exp, f"u{number}")
    took = time.monotonic() - began
    assert exp._works.judges is not None
    try:
        assert took < 15.0
        assert exp._works.judges.left_out >= 100 - 64 - 1
    finally:
        free.set()
        settled(exp)


@pytest.mark.parametrize("error", [asyncio.CancelledError, SystemExit])
def test_a_judge_that_ends_its_thread_ends_no_judging(error: type[BaseException], asked: Asked, store: str) -> None:
    asked()
    seen: list[str] = []

    def quality(example: Any, prediction: Any) -> float:
        seen.append(example.message)
        if example.message == "second":
            raise error
        return 1.0

    exp = judged(store, Judge(quality, share=1.0))
    for message in ("first", "second", "third"):
        ask(exp, message, message=message)
    settled(exp)
    assert seen == ["first", "second", "third"]
    assert set(scores(exp)) == {"first"}, "the second is waited for"


def test_a_judge_that_fails_changes_no_answer(
    provider: Provider, asked: Asked, store: str, caplog: pytest.LogCaptureFixture
) -> None:
    asked(cache=False)
    provider.faults = lambda call: Status(500) if "polite" in str(call.body) else None
    exp = judged(store, Judge(Politeness(), share=1.0))
    with caplog.at_level(logging.WARNING, "dspy_prod"):
        for number in range(10):
            assert ask(exp, f"u{number}").label
            settled(exp)
    assert caplog.text.count("The judge of quality in e gave no score") == 1, "aloud the first time alone"
    assert scores(exp) == {}
    assert exp.step().decision == "keep"

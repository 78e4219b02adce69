"""An experiment on live calls: who gets what, what counts, and what becomes of it."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from typing import Any

import dspy
import pytest

import dspy_prod
from dspy_prod import BudgetedOptimizer, ConfigError, Experiment, Metric, Production, Rollout, call_context, call_report
from dspy_prod.experiments.flights import Flight
from dspy_prod.experiments.operating import remove
from dspy_prod.testing import Provider
from dspy_prod.testing.faults import Status
from tests.experiments.conftest import Triage

Asked = Callable[..., dspy_prod.LM]

EXAMPLES = [dspy.Example(message=f"m{number}", label="ok").with_inputs("message") for number in range(3)]
RESOLVED = Metric("resolved", margin=0.02)
IN_MEMORY = pytest.mark.parametrize("store", ["memory", pytest.param("sqlite", marks=pytest.mark.slow)], indirect=True)
"""Where thousands of users come: what they show is not the store's, which shorter tests look at."""


def two(name: str, store: str, **more: Any) -> Experiment:
    return Experiment(name, variants={"control": Triage(), "new": Triage("Think first.")}, store=store, **more)


def ask(exp: Any, unit: str | None, message: str = "hi") -> Any:
    with call_context(user=unit):
        return exp(message=message)


def units(exp: Experiment) -> dict[str, int]:
    """How many the store has, by variant."""
    return dict(exp.scorecard().users)


# -- who gets what -----------------------------------------------------------------------------------------------------
def test_a_process_that_still_has_a_removed_experiment_tells_the_next_one_of_its_name_nothing(
    asked: Asked, store: str
) -> None:
    """Its shares were other ones: within two seconds the next one looked as if its units did not arrive as declared."""
    asked()
    old = two("e", store, metrics=[RESOLVED], weights={"control": 1, "new": 9}, refresh=3_600.0)
    remove(old._works.trials, "e", force=True)
    new = two("e", store, metrics=[RESOLVED])
    for number in range(20):
        ask(old, f"u{number}")
        old.record(f"u{number}", resolved=0)
    assert units(new) == {"control": 0, "new": 0}
    ask(new, "u1")
    old.record("u1", resolved=0)
    new.record("u1", resolved=1)
    for exp in (old, new):
        exp._works.flights._tell(Flight("u1", 0.0, 0.0))
    card = new.step()
    assert sum(card.users.values()) == 1
    assert sum(each.calls for each in new._works.trials.ended("e")) == 1
    (unit,) = new._works.trials.matured("e", "resolved")
    assert (unit.values.size, unit.values.total) == (1, 1.0)


def test_a_unit_has_one_variant_however_it_calls(asked: Asked, store: str) -> None:
    """Also in a copy, and in an experiment that another process makes of the same store."""
    asked()
    exp, again = two("e", store), two("e", store)
    first = {unit: call_report(ask(exp, unit)).variant for unit in map(str, range(30))}
    assert set(first.values()) == {"control", "new"}
    for each in (exp, again, exp.deepcopy()):
        assert {unit: call_report(ask(each, unit)).variant for unit in first} == first
        assert {unit: each.assign(unit) for unit in first} == first

    async def later(unit: str) -> list[Any]:
        with call_context(user=unit):
            plain = await exp.acall(message="a")
            *_, streamed = [item async for item in dspy.streamify(exp)(message="b")]
        return [call_report(plain).variant, call_report(streamed).variant]

    async def everybody() -> list[list[Any]]:
        return await asyncio.gather(*map(later, first))

    assert asyncio.run(everybody()) == [[variant, variant] for variant in first.values()]
    for unit in list(first)[:4]:
        with call_context(user=unit):
            answers = dspy.Parallel(num_threads=2, disable_progress_bar=True)([(exp, {"message": m}) for m in "cde"])
        assert {call_report(answer).variant for answer in answers} == {first[unit]}
    assert sum(units(exp).values()) == 30


def test_assign_tells_who_was_in_a_candidate_before_it_took_no_more(asked: Asked, store: str) -> None:
    """While an experiment is paused, units of a candidate stay in it, and newcomers get control."""
    asked()
    exp = two("e", store)
    first = {unit: call_report(ask(exp, unit)).variant for unit in map(str, range(10))}
    exp.pause()
    assert {unit: exp.assign(unit) for unit in first} == first
    assert {exp.assign(unit) for unit in map(str, range(10, 30))} == {"control"}


def test_calls_of_nobody_get_control_and_count_for_nothing(asked: Asked, store: str) -> None:
    asked()
    exp = two("e", store)
    assert {call_report(ask(exp, None)).variant for _ in range(20)} == {"control"}
    assert units(exp) == {"control": 0, "new": 0}


@pytest.mark.parametrize("unit", ["session", "tenant"])
def test_the_unit_may_be_another_one(unit: str, asked: Asked, store: str) -> None:
    asked()
    exp = two("e", store, unit=unit)
    for number in range(30):
        with call_context(user=f"u{number}", **{unit: f"x{number % 3}"}):
            exp(message="hi")
    assert sum(units(exp).values()) == 3


def test_overrides_and_a_holdout_are_no_exposures(asked: Asked, store: str) -> None:
    asked()
    exp = two("e", store, overrides={"qa": "new"}, holdout=0.5)
    assert call_report(ask(exp, "qa")).variant == "new"
    for number in range(40):
        ask(exp, f"u{number}")
    assert 5 <= sum(units(exp).values()) <= 35


def test_an_lm_is_a_variant(provider: Provider, asked: Asked, store: str) -> None:
    cheap = asked()
    dear = dspy_prod.LM("openai/gpt-4o", api_base=provider.url, api_key="k", store=store)
    exp = Experiment("models", program=Triage(), variants={"control": cheap, "dear": dear}, store=store)
    models = {call_report(ask(exp, f"u{number}")).model for number in range(20)}
    assert models == {"openai/gpt-4o-mini", "openai/gpt-4o"}


# -- where it holds still ----------------------------------------------------------------------------------------------
def test_an_evaluation_asks_control_and_counts_nothing(asked: Asked, store: str) -> None:
    lm = asked()
    exp = two("e", store)
    with call_context(user="u1"):
        dspy.Evaluate(devset=EXAMPLES, metric=lambda *_: 1.0, num_threads=2)(exp)
    assert units(exp) == {"control": 0, "new": 0}
    assert [record.experiment for record in lm.ledger.records()] == [None] * 3


def test_it_is_not_compiled(asked: Asked, store: str) -> None:
    """Also inside of a Production, and by a budgeted optimizer: before anything is asked."""
    lm = asked()
    exp = two("e", store)
    optimizer = dspy.BootstrapFewShot(metric=lambda *_: 1.0)
    for program in (exp, Production(exp)):
        with pytest.raises(ConfigError, match="no program to compile"):
            optimizer.compile(program, trainset=EXAMPLES)
        with pytest.raises(ConfigError, match="no program to compile"):
            BudgetedOptimizer(optimizer, budget_usd=1, store=store, view=None).compile(program, trainset=EXAMPLES)
    assert lm.ledger.records() == []


# -- with a Production -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("order", ["inside", "outside"])
def test_a_production_inside_or_around_gives_one_report(
    order: str, provider: Provider, asked: Asked, store: str
) -> None:
    asked(cache=False)
    provider.faults = lambda call: Status(500) if "Fail." in str(call.body) else None
    bad: Any = Triage("Fail.")

    def guarded(program: Any) -> Any:
        return program if order == "outside" else Production(program, name="triage", fallback_response="Sorry.")

    exp: Any = Experiment(
        "e", variants={"control": guarded(Triage()), "bad": guarded(bad)}, store=store, weights={"control": 1, "bad": 1}
    )
    program = exp if order == "inside" else Production(exp, name="triage", fallback_response="Sorry.")
    seen = set()
    for number in range(12):
        report = call_report(ask(program, f"u{number}"))
        variant = exp.assign(f"u{number}")
        seen.add(variant)
        assert (report.program, report.status) == ("triage", "fallback" if variant == "bad" else "ok")
    assert seen == {"control", "bad"}
    rates = {each.metric: each.interval for each in exp.scorecard().metrics}
    told = "fallback_rate" if order == "inside" else "error_rate"
    assert (rates[told].control, rates[told].candidate) == (0.0, 1.0)


def test_an_error_is_raised_and_counted(provider: Provider, asked: Asked, store: str) -> None:
    asked(cache=False)
    provider.down(500)
    exp = two("e", store)
    for number in range(6):
        with pytest.raises(dspy.LMError):
            ask(exp, f"u{number}")
    assert sum(units(exp).values()) == 6
    rate = next(each.interval for each in exp.scorecard().metrics if each.metric == "error_rate")
    assert (rate.control, rate.candidate) == (1.0, 1.0)


# -- several -----------------------------------------------------------------------------------------------------------
def test_nested_experiments_do_not_mix(asked: Asked, store: str) -> None:
    """Both have a "control"; the inner one's calls count for a variant of each."""
    lm = asked(cache=False)
    inner = two("prompts", store)
    outer = Experiment("caches", variants={"control": inner, "new": inner}, store=store)
    for number in range(16):
        ask(outer, f"u{number}")
    assert sum(units(outer).values()) == sum(units(inner).values()) == 16
    for record in lm.ledger.records():
        assert record.user is not None
        assert (record.experiment, record.variant) == ("prompts", inner.assign(record.user))
        assert dict(record.tags)["experiment:caches"] == outer.assign(record.user)
    assert units(outer) == {name: sum(outer.assign(f"u{n}") == name for n in range(16)) for name in ("control", "new")}


def test_an_experiment_within_itself_is_refused(asked: Asked, store: str) -> None:
    asked()
    exp = two("e", store)
    with call_context(user="u", experiment="e", variant="new"), pytest.raises(ValueError, match="nested in itself"):
        exp(message="hi")


def test_another_experiment_of_the_same_name_is_refused(asked: Asked, store: str) -> None:
    two("e", store, metrics=[RESOLVED])
    with pytest.raises(ConfigError, match="with metrics="):
        two("e", store)
    with pytest.raises(ConfigError, match="with variants="):
        Experiment("e", variants={"control": Triage(), "other": Triage()}, metrics=[RESOLVED], store=store)


def test_another_program_of_the_same_class_is_refused(asked: Asked, store: str) -> None:
    """Its prompt was changed while it was measured; other LMs, keys or copies of the same one are no other program."""
    lm = asked()
    two("e", store)
    changed = {"control": Triage(), "new": Triage("Think twice.")}
    with pytest.raises(ConfigError, match="with variants="):
        Experiment("e", variants=changed, store=store)
    same = {"control": Triage(), "new": Triage("Think first.")}
    for program in same.values():
        program.set_lm(lm)
    Experiment("e", variants=same, store=store)
    gate = Experiment("f", variants=changed, store=store).evaluate(EXAMPLES, lambda *_: 1.0)
    with pytest.raises(ConfigError, match="variants"):
        two("g", store).start(gate=gate)


# -- outcomes ----------------------------------------------------------------------------------------------------------
def test_a_better_candidate_is_promoted(asked: Asked, store: str) -> None:
    """Its outcomes are told days later or at once, by whoever knows them."""
    asked()
    exp = two("e", store, metrics=[RESOLVED], guardrails=())
    for number in range(400):
        unit = f"u{number}"
        ask(exp, unit)
        right = number % 10 < (9 if exp.assign(unit) == "new" else 4)
        exp.record(unit, resolved=float(right))
        if number % 20 == 19 and exp.step().state == "decided":
            break
    card = exp.scorecard()
    assert (card.state, card.decision, card.winner, card.serves) == ("decided", "promote", "new", "new")
    assert "better on resolved" in card.reason
    assert {call_report(ask(exp, f"late{number}")).variant for number in range(10)} == {"new"}
    assert sum(units(exp).values()) == number + 1


@pytest.mark.parametrize(
    ("values", "told"),
    [({"solved": 1}, "no metric of it; it has resolved"), ({"cost": 1}, "calls tell by themselves"),
     ({"resolved": 2}, "between 0 and 1"), ({"resolved": float("nan")}, "between 0 and 1"),
     ({"resolved": "x"}, "resolved='x'")],
)  # fmt: skip
def test_an_outcome_that_cannot_be_is_refused_by_name(values: Any, told: str, asked: Asked, store: str) -> None:
    exp = two("e", store, metrics=[RESOLVED])
    with pytest.raises(ConfigError, match=told):
        exp.record("u1", **values)


# -- the rollout -------------------------------------------------------------------------------------------------------
ONE = Rollout(stages=(0.01, 0.1, 0.5), min_time=0.0)


def rolled_out(exp: Experiment, most: int, every: int = 5) -> Any:
    """Users come, one call each, and a controller looks now and then, until it is decided."""
    exp.start()
    for number in range(most):
        ask(exp, f"u{number}")
        if number % every == every - 1 and exp.step().state != "running":
            break
    return exp.step()


def test_before_the_start_everybody_gets_control(asked: Asked, store: str) -> None:
    asked()
    exp = two("e", store, rollout=ONE)
    assert exp.state == "created"
    assert {call_report(ask(exp, f"u{number}")).variant for number in range(20)} == {"control"}
    assert units(exp) == {"control": 0, "new": 0}


def test_a_candidate_that_always_fails_hurts_six_users_at_most(provider: Provider, asked: Asked, store: str) -> None:
    """At 1 %, and nobody sees an exception: a fallback answers."""
    asked(cache=False)
    provider.faults = lambda call: Status(500) if "Fail." in str(call.body) else None
    bad = Production(Triage("Fail."), fallback_response="Sorry.")
    exp = Experiment("e", variants={"control": Triage(), "bad": bad}, rollout=ONE, store=store)
    card = rolled_out(exp, 3_000)
    assert (card.state, card.decision, card.serves) == ("decided", "rollback", "control")
    assert "fallback_rate" in card.reason
    assert 1 <= card.hurt <= 6
    audit = exp._works.trials.decisions("e")
    assert [each.what for each in audit if each.what in ("rollback", "promote")] == ["rollback"]
    assert {call_report(ask(exp, f"x{number}")).variant for number in range(20)} == {"control"}


@IN_MEMORY
def test_a_candidate_with_parse_failures_is_found_soon(provider: Provider, asked: Asked, store: str) -> None:
    """30 % of its answers have not the signature's form; with a fallback that is no error of the ledger's."""
    asked(cache=False)

    def answer(call: Any) -> Any:
        text = str(call.body)
        broken = "Fail." in text and sum(map(ord, text[text.find("u=") :][:12])) % 10 < 3
        return "no form at all" if broken else None

    provider.answer = answer
    exp = Experiment(
        "e", variants={"control": Triage(), "bad": Production(Triage("Fail."), fallback_response="Sorry.")},
        rollout=ONE, store=store,
    )  # fmt: skip
    exp.start()
    for number in range(4_000):
        ask(exp, f"u{number}", message=f"u={number * 7919 % 10007:06d}")
        if number % 5 == 4 and exp.step().state != "running":
            break
    card = exp.step()
    assert (card.decision, card.state) == ("rollback", "decided")
    assert card.hurt <= 60


def test_a_pause_lets_nobody_new_in(asked: Asked, store: str) -> None:
    asked()
    exp = two("e", store, rollout=Rollout(stages=(0.5,), min_time=0.0))
    exp.start()
    before = {unit: call_report(ask(exp, unit)).variant for unit in map(str, range(20))}
    exp.pause("a look at it")
    assert exp.state == "paused"
    assert {call_report(ask(exp, f"n{number}")).variant for number in range(20)} == {"control"}
    assert {unit: call_report(ask(exp, unit)).variant for unit in before} == before
    exp.resume()
    assert {call_report(ask(exp, f"n{number}")).variant for number in range(20)} == {"control", "new"}
    exp.stop()
    assert {call_report(ask(exp, unit)).variant for unit in before} == {"control"}
    reasons = [json.loads(each.evidence)["reason"] for each in exp._works.trials.decisions("e")]
    assert reasons == ["by hand", "a look at it", "by hand", "by hand"]


def test_a_stage_brings_a_candidate_no_more_users_than_it_may(asked: Asked, store: str) -> None:
    asked()
    rollout = Rollout(stages=(0.5, 0.6), min_time=3_600.0, max_users=7, min_users=1)
    exp = two("e", store, rollout=rollout)
    exp.start()
    for number in range(60):
        ask(exp, f"u{number}")
        exp.step()
    assert units(exp)["new"] == 7


# -- what must not look like a difference ------------------------------------------------------------------------------
@IN_MEMORY
@pytest.mark.parametrize("share", [pytest.param(0.01, marks=pytest.mark.slow), 0.1])
def test_a_cold_cache_is_no_cost(share: float, asked: Asked, store: str) -> None:
    """Two programs of equal price and recurring questions: the candidate's cache is cold, so it is billed for more."""
    lm = asked()
    exp = two("e", store, rollout=Rollout(stages=(share,), min_time=0.0))
    exp.start()
    for number in range(1_500 if share == 0.1 else 4_000):
        ask(exp, f"u{number}", message=f"question {number * 37 % 150}")
        if number % 50 == 49:
            assert exp.step().decision == "keep"
    cost = next(each.interval for each in exp.scorecard().metrics if each.metric == "cost")
    assert 1 / 1.15 <= cost.candidate / cost.control <= 1.15
    [control, new] = sorted(lm.costs(by="variant"), key=lambda row: row.value)
    assert new.usd / (new.attempts + new.cached) > 2 * control.usd / (control.attempts + control.cached)


@pytest.mark.parametrize("whose", ["ours", "plain"])
def test_calls_without_a_price_are_not_taken_for_free(whose: str, provider: Provider, asked: Asked, store: str) -> None:
    """The guardrail would have proven that a dear candidate costs no more."""
    asked()
    options: dict[str, Any] = {"api_base": provider.url, "api_key": "k", "cache": False}
    made: Any = dspy.LM if whose == "plain" else dspy_prod.LM
    unknown = made("openai/nobody-knows-me", **options, **({"store": store} if whose == "ours" else {}))
    new = Triage()
    new.set_lm(unknown)
    exp = Experiment("e", variants={"control": Triage(), "new": Production(new, unguarded="allow")}, store=store)
    for number in range(12):
        ask(exp, f"u{number}")
    deadline = time.monotonic() + 10
    while exp.state == "running" and time.monotonic() < deadline:
        time.sleep(0.01)
    assert exp.state == "paused"
    [line] = [each for each in exp._works.trials.decisions("e") if each.what == "pause"]
    assert "a call of new has no known price" in line.evidence
    exp.resume()  # nothing was mended
    while exp.state == "running" and time.monotonic() < deadline:
        for number in range(12):
            ask(exp, f"u{number}")
    assert exp.state == "paused"
    free = Experiment(
        "f", variants={"control": Triage(), "new": Production(new, unguarded="allow")}, metrics=[RESOLVED],
        guardrails=(), store=store,
    )  # fmt: skip
    for number in range(12):
        ask(free, f"u{number}")
    assert free.step().state == "running"


@IN_MEMORY
def test_users_who_do_not_answer_promote_nothing(asked: Asked, store: str) -> None:
    """Equal variants; unhappy users of the new one answer half as often, so its answers look better."""
    asked()
    exp = two("e", store, metrics=[RESOLVED])
    for number in range(1_200):
        unit = f"u{number}"
        ask(exp, unit)
        happy = number % 10 < 6
        if happy or exp.assign(unit) == "control" or number % 20 < 10:
            exp.record(unit, resolved=float(happy))
        if number % 50 == 49:
            assert exp.step().decision != "promote"


@IN_MEMORY
def test_lost_exposures_are_noticed(asked: Asked, store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fifth of one arm's units never reach the store: whatever is measured then, those left are not all of them."""
    asked()
    exp = two("e", store)
    expose = type(exp._works.trials).expose
    lost = lambda unit: sum(map(ord, unit)) % 5 == 0  # noqa: E731
    monkeypatch.setattr(
        type(exp._works.trials), "expose",
        lambda self, exposure: None if exposure.arm == "new" and lost(exposure.unit) else expose(self, exposure),
    )  # fmt: skip
    for number in range(3_000):
        ask(exp, f"u{number}")
        if number % 100 == 99 and exp.step().state != "running":
            break
    card = exp.scorecard()
    assert (card.decision, card.state) == ("invalid", "paused")
    assert "declared shares" in card.reason


@pytest.mark.parametrize("then", ["pause", "hold"])
def test_a_stage_that_lasts_too_long_is_told(then: Any, asked: Asked, store: str) -> None:
    asked()
    events: list[Any] = []
    rollout = Rollout(stages=(0.5,), min_time=0.0, max_time=0.05, on_inconclusive=then)
    exp = two("e", store, rollout=rollout)
    exp.start()
    remove = dspy_prod.add_listener(events.append)
    try:
        ask(exp, "u1")
        time.sleep(0.06)
        states = [exp.step().state for _ in range(3)]
    finally:
        remove()
    assert set(states) == {"paused" if then == "pause" else "running"}
    told = [event for event in events if event.name == "experiment_alarm"]
    assert [event.data["what"] for event in told] == ["pause" if then == "pause" else "inconclusive"]
    assert "has lasted" in told[0].data["reason"]
    assert told[0].data["verdict"] == "keep"

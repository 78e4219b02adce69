"""The shadow stage: candidates are asked once more, unseen, at nobody's expense, and judged by what they answer."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import dspy
import pytest

import dspy_prod
from dspy_prod import ConfigError, Experiment, Production, Rollout, call_context, call_report
from dspy_prod.experiments import operating, shadow
from dspy_prod.experiments.declaration import Declaration
from dspy_prod.experiments.pairs import Pair, kept_under, owner_of
from dspy_prod.experiments.shadow import pairs_of
from dspy_prod.stores.opening import open_store
from dspy_prod.testing import Provider
from dspy_prod.testing.faults import Status
from tests.experiments.conftest import Triage
from tests.experiments.support import declared

Asked = Callable[..., dspy_prod.LM]


def ask(exp: Any, unit: str, message: str = "hi") -> Any:
    with call_context(user=unit):
        return exp(message=message)


def shadowed(store: str, bad: Any, **more: Any) -> Experiment:
    rollout = Rollout(stages=("shadow", 0.5), min_time=0.0, shadow_share=1.0, **more)
    return Experiment("e", variants={"control": Triage(), "new": bad}, rollout=rollout, store=store)


def only_pair(exp: Experiment) -> Pair | None:
    [(_, pair)], _ = pairs_of(exp._works.trials, kept_under("e", "salt"), 0)
    return pair


def seen_in_the_shadow(exp: Experiment, most: int) -> Any:
    exp.start()
    for number in range(most):
        assert call_report(ask(exp, f"u{number}", message=f"m{number}")).variant == "control"
        assert exp._works.shadow is not None
        assert exp._works.shadow.wait()
        card = exp.step()
        if card.state != "running" or card.stage != "shadow":
            break
    return exp.step()


def test_a_failing_candidate_ends_in_the_shadow_and_hurts_nobody(provider: Provider, asked: Asked, store: str) -> None:
    asked(cache=False)
    provider.faults = lambda call: Status(500) if "Fail." in str(call.body) else None
    exp = shadowed(store, Triage("Fail."))
    card = seen_in_the_shadow(exp, 40)
    assert (card.state, card.serves, card.hurt) == ("decided", "control", 0)
    [audit] = [each for each in exp._works.trials.decisions("e") if each.what == "rollback"]
    assert "worse on error_rate" in json.loads(audit.evidence)["reason"]
    assert 5 <= len([call for call in provider.calls if call.status == 500]) <= 14


def test_a_dearer_candidate_ends_in_the_shadow(provider: Provider, asked: Asked, store: str) -> None:
    lm = asked(cache=False)
    exp = shadowed(store, Triage("Think. " * 200))
    card = seen_in_the_shadow(exp, 200)
    assert (card.state, card.serves, card.hurt) == ("decided", "control", 0)
    rows = {row.value: row.attempts for row in lm.costs(by="variant")}
    assert rows["e/new"] == rows["e/control"]


@pytest.mark.parametrize("lm", ["ours", "plain"])
def test_both_answers_of_a_pair_cost_what_their_lms_have_billed(
    lm: str, provider: Provider, asked: Asked, store: str
) -> None:
    """Also those of a plain dspy.LM, which leave no record: they counted for control, and were free for a candidate."""
    asked(cache=False)
    exp = shadowed(store, Triage("Think. " * 200))
    exp.start()
    plain = dspy.LM("openai/gpt-4o-mini", api_base=provider.url, api_key="k", cache=False)
    with dspy.context(lm=plain) if lm == "plain" else contextlib.nullcontext():
        ask(exp, "u1")
    assert exp._works.shadow is not None
    assert exp._works.shadow.wait()
    pair = only_pair(exp)
    assert pair is not None
    assert pair.usd is not None
    control, new = pair.usd
    assert new > 2 * control > 0


class Held(dspy.Module):
    """A candidate that answers, or fails, once it is let."""

    def __init__(self, fails: bool = False) -> None:
        super().__init__()
        self.fails, self.calls, self.begun, self.free = fails, 0, threading.Event(), threading.Event()

    def __deepcopy__(self, memo: Any) -> Held:
        return self

    def forward(self, message: str) -> Any:
        self.calls += 1
        self.begun.set()
        assert self.free.wait(30)
        if self.fails:
            raise ValueError("bad")
        return dspy.Prediction(label="fine")


def waiting(exp: Experiment, held: Held, calls: int) -> None:
    """The candidate is being asked, and more stand in the queue."""
    exp.start()
    for number in range(calls):
        ask(exp, f"u{number}", message=f"m{number}")
    assert held.begun.wait(30)


def let(exp: Experiment, held: Held) -> None:
    held.free.set()
    assert exp._works.shadow is not None
    assert exp._works.shadow.wait()


@pytest.mark.parametrize("how", ["stop", "pause", "remove", "rollback", "next stage"])
def test_no_candidate_is_asked_for_what_is_over(how: str, asked: Asked, store: str) -> None:
    """What stands in the queue is not asked any more, and what was being asked makes no pair, unless it is paused."""
    asked()
    held = Held()
    exp = shadowed(store, held, shadow_calls=1)
    trials = exp._works.trials
    waiting(exp, held, 8)
    trial = trials.trial("e")
    assert trial is not None
    if how == "remove":
        exp.remove(force=True)
    elif how == "rollback":
        gone = replace(Declaration.from_json(trial.declaration), dropped=["new"])
        trials.change("e", trial.revision, declaration=gone.to_json())
    elif how == "next stage":
        trials.change("e", trial.revision, stage=1)
    else:
        getattr(exp, how)("enough")
    let(exp, held)
    assert held.calls == 1
    assert len(pairs_of(trials, kept_under("e", "salt"), 0)[0]) == (how == "pause")


@pytest.mark.parametrize("breaks", ["at the experiment", "at its pairs"])
def test_a_removal_that_is_broken_off_leaves_no_experiment_whose_pairs_are_kept_nowhere(
    breaks: str, provider: Provider, asked: Asked, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is there with its pairs, or it is not; and what is left of them, the removal of another one forgets."""
    asked(cache=False)
    exp = shadowed(store, Triage("Think."), shadow_calls=1_000)
    other = Experiment(
        "other", variants={"control": Triage(), "new": Triage()}, rollout=Rollout(stages=("shadow", 0.5)), store=store
    )
    exp.start()
    ask(exp, "u1", message="m1")
    assert exp._works.shadow is not None
    assert exp._works.shadow.wait()
    trials, pairs = exp._works.trials, kept_under("e", "salt")
    away = "e" if breaks == "at the experiment" else pairs
    remove = trials.remove

    def removes(name: str) -> None:
        if name == away:
            raise dspy_prod.StoreUnavailableError("away")
        remove(name)

    with monkeypatch.context() as patched:
        patched.setattr(trials, "remove", removes)
        failing = pytest.raises(dspy_prod.StoreUnavailableError) if away == "e" else contextlib.nullcontext()
        with failing:
            exp.remove(force=True)
    ask(exp, "u2", message="m2")
    assert exp._works.shadow.wait()
    there = away == "e"
    assert sum("Think." in str(call.body) for call in provider.calls) == 1 + there
    assert len(pairs_of(trials, pairs, 0)[0]) == 1 + there
    if there:
        exp.remove(force=True)
    else:
        declared(other._works.store, "third", state=None)
        operating.remove(trials, "third")
    assert [each.name for each in trials.trials()] == ["other", kept_under("other", "salt")]


def test_an_experiment_that_is_removed_while_a_process_makes_it_leaves_nothing(
    store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = shadowed(store, Triage())  # the store that is patched is open for as long as it is there
    trials = first._works.trials
    create = trials.create

    def creates(name: str, *rest: Any, **more: Any) -> Any:
        if name == kept_under("e", "salt"):
            operating.remove(trials, "e", force=True)
        return create(name, *rest, **more)

    monkeypatch.setattr(trials, "create", creates)
    with pytest.raises(ConfigError, match="no experiment 'e'"):
        shadowed(store, Triage()).step()
    assert trials.trials() == []


def test_whose_pairs_a_name_has() -> None:
    for name in ("e", "e [salt]", "e (shadow)", "e\n[x] [y]", "ü"):
        assert owner_of(kept_under(name, "0123456789")) == (name, "01234567")
        assert owner_of(f"{name}!") is None
    assert owner_of("e (shadow)") == ("e", None), "of an earlier release"


def test_pairs_of_an_experiment_that_is_there_are_left_where_another_one_is_removed(store: str) -> None:
    """Also those that an earlier release has kept, of whatever name, and of one that cannot be read."""
    shadowed(store, Triage()).remove()
    trials = open_store(store, "default").trials
    there = ["e [x]", "e [x] (shadow)", "old", "old (shadow)", "bad", "bad [12345678] (shadow)"]
    for name in [*there, "gone (shadow)", "gone [12345678] (shadow)", "e"]:
        trials.create(name, "{}", {None: 0.0})
    operating.remove(trials, "e")
    assert [each.name for each in trials.trials()] == sorted(there)


def test_while_the_store_is_away_each_candidate_is_what_was_known_of_it(
    asked: Asked, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that was dropped said so of all others; and a candidate was asked in a pause."""
    asked()
    rollout = Rollout(stages=("shadow", 0.5), min_time=0.0, shadow_share=1.0)
    variants = {"control": Triage(), "bad": Triage("Bad."), "new": Triage("New.")}
    exp = Experiment("e", variants=variants, rollout=rollout, store=store)
    exp.start()
    found, trials = exp._works.shadow, exp._works.trials
    assert found is not None
    trial = trials.trial("e")
    assert trial is not None
    gone = replace(Declaration.from_json(trial.declaration), dropped=["bad"])
    trials.change("e", trial.revision, declaration=gone.to_json())
    bad, new = exp.variants["bad"], exp.variants["new"]
    away = pytest.raises(dspy_prod.StoreUnavailableError)

    def read(name: str) -> Any:
        raise dspy_prod.StoreUnavailableError("away")

    assert not found._is_wanted(bad, "running")
    with monkeypatch.context() as patched, away:
        patched.setattr(trials, "trial", read)
        assert (found._is_wanted(bad, "running"), found._is_wanted(new, "running")) == (False, True)
        trials.trial("e")
    exp.pause("enough")
    assert found._is_wanted(new, "running", "paused")
    with monkeypatch.context() as patched, away:
        patched.setattr(trials, "trial", read)
        assert not found._is_wanted(new, "running")
        trials.trial("e")


def test_the_shadow_of_an_experiment_that_was_removed_is_none_of_the_next_one(
    asked: Asked, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even where it cannot know, for the store is away when it looks."""
    asked()
    held = Held(fails=True)
    old = shadowed(store, held, shadow_usd=1.0)
    waiting(old, held, 20)
    old.remove(force=True)
    monkeypatch.setattr("dspy_prod.experiments.declaration.secrets.token_hex", lambda _: "another")
    new = shadowed(store, Triage())
    new.start()
    assert old._works.shadow is not None
    monkeypatch.setattr(old._works.shadow, "_is_wanted", lambda *_: True)
    let(old, held)
    assert held.calls == 20
    old._works.shadow._end("new")
    assert [each.what for each in new._works.trials.decisions("e")] == ["start"]
    time.sleep(1.1)  # a unit without a call would be waited for
    card = new.step()
    assert card.unseen is not None
    assert (card.state, card.unseen.pairs, card.unseen.refused) == ("running", {"new": 0}, {"new": 0})
    new.remove(force=True)
    assert new._works.trials.trials() == []


@pytest.mark.parametrize("error", [asyncio.CancelledError, SystemExit, KeyboardInterrupt])
def test_a_candidate_has_failed_whatever_it_raises(error: type[BaseException], asked: Asked, store: str) -> None:
    """The thread that asks ended with it, for good and in silence."""
    asked()

    class Ends(dspy.Module):
        def forward(self, message: str) -> Any:
            raise error

    exp = shadowed(store, Ends())
    exp.start()
    for number in range(3):
        ask(exp, f"u{number}", message=f"m{number}")
    assert exp._works.shadow is not None
    assert exp._works.shadow.wait()
    exp.step()
    unseen = exp.scorecard().unseen
    assert unseen is not None
    assert (unseen.pairs, unseen.failed, unseen.refused) == ({"new": 3}, {"new": 3}, {"new": 0})


def test_an_equal_candidate_leaves_the_shadow(asked: Asked, store: str) -> None:
    asked()
    exp = shadowed(store, Triage(), shadow_calls=20)
    card = seen_in_the_shadow(exp, 40)
    assert (card.state, card.stage) == ("running", "50 %")
    assert {call_report(ask(exp, f"x{number}")).variant for number in range(20)} == {"control", "new"}


def test_a_shadow_costs_what_it_may(provider: Provider, asked: Asked, store: str) -> None:
    lm = asked(cache=False, max_tokens=20)
    exp = shadowed(store, Triage("Think."), shadow_usd=0.0005)
    exp.start()
    for number in range(60):
        ask(exp, f"u{number}", message=f"m{number}")
        assert exp._works.shadow is not None
        assert exp._works.shadow.wait()
    costs = {row.value: row.usd for row in lm.costs(by="variant")}
    assert 0.0003 <= costs["e/new"] <= 0.0005
    assert exp.step().state == "running"


def test_a_shadow_at_its_cap_is_told_and_not_taken_for_a_failure(asked: Asked, store: str) -> None:
    """Also where a fallback answers what the cap refuses."""
    asked(cache=False, max_tokens=20)
    exp = shadowed(store, Production(Triage("Think."), fallback_response="Sorry."), shadow_usd=0.0003, shadow_calls=50)
    seen_in_the_shadow(exp, 20)
    card = exp.scorecard()
    assert (card.state, card.stage) == ("running", "shadow")
    assert card.unseen is not None
    assert (card.unseen.spent, card.unseen.cap_usd, card.unseen.failed) == (True, 0.0003, {"new": 0})
    assert 0 < card.unseen.pairs["new"] < 15
    assert 0.0001 < (card.unseen.usd or 0) <= 0.0003
    assert any("budget of 0.0003 USD is used up before it can end: of 50 calls new has" in w for w in card.warnings)
    assert [each.what for each in card.audit].count("shadow_spent") == 1
    assert card.to_dict()["unseen"]["spent"]
    assert f"{card.unseen.pairs['new']} of 50" in str(card)


def test_what_a_cache_answers_says_nothing_of_the_money_left(provider: Provider, asked: Asked, store: str) -> None:
    """A recurring question among the others hid that it was used up, and pairs were made of nothing else."""
    asked(max_tokens=20)
    exp = shadowed(store, Triage("Think."), shadow_usd=0.0003, shadow_calls=1_000)
    exp.start()
    assert exp._works.shadow is not None
    for number in range(60):
        ask(exp, f"u{number}", message=f"m{number}" if number % 4 else "the same")
        assert exp._works.shadow.wait()
    time.sleep(1.1)  # a unit without a call is waited for
    exp.step()
    unseen = exp.scorecard().unseen
    assert unseen is not None
    assert (unseen.spent, unseen.refused) == (True, {"new": 5})
    paid = sum("Think." in str(call.body) for call in provider.calls)
    assert 0 < paid < unseen.pairs["new"] <= 2 * paid + 5


@pytest.mark.parametrize("order", [("cheap", "dear"), ("dear", "cheap")])
def test_a_cheap_candidate_does_not_hide_that_there_is_no_money_left_for_a_dear_one(
    order: tuple[str, str], provider: Provider, asked: Asked, store: str
) -> None:
    """It is told at once, and the dear one is asked nothing more; the cheap one is, for which there is money."""
    asked(cache=False, max_tokens=20)
    programs = {"cheap": Triage("Cheap."), "dear": Triage("Dear. " * 9_000)}
    exp = Experiment(
        "e", variants={"control": Triage(), **{name: programs[name] for name in order}}, store=store,
        rollout=Rollout(stages=("shadow", 0.5), min_time=0.0, shadow_share=1.0, shadow_usd=0.001, shadow_calls=1_000),
    )  # fmt: skip
    exp.start()
    assert exp._works.shadow is not None
    told = []
    for number in range(8):
        ask(exp, f"u{number}", message=f"m{number}")
        assert exp._works.shadow.wait()
        told.append([each.what for each in exp._works.trials.decisions("e")].count("shadow_spent"))
    assert told == [0, 0, 0, 0, 1, 1, 1, 1]
    time.sleep(1.1)  # a unit without a call is waited for
    exp.step()
    card = exp.scorecard()
    assert card.unseen is not None
    assert dict(card.unseen.pairs) == {"cheap": 8, "dear": 0}
    assert (dict(card.unseen.refused), card.unseen.spent) == ({"cheap": 0, "dear": 5}, True)
    assert "dear is asked nothing more" in json.loads(exp._works.trials.decisions("e")[-1].evidence)["reason"]


def test_a_call_that_is_larger_than_the_money_left_is_refused_and_ends_no_shadow(asked: Asked, store: str) -> None:
    """Others are asked; and what is refused makes no pair, also where the program handles the refusal."""
    asked(cache=False, max_tokens=20)

    class Handles(Triage):
        def forward(self, message: str) -> Any:
            try:
                return super().forward(message)
            except dspy_prod.BudgetExceededError:
                return dspy.Prediction(label="none")

    exp = shadowed(store, Handles("Think."), shadow_usd=0.0005)
    exp.start()
    assert exp._works.shadow is not None
    for message in ("m1", "long " * 9_000, "m2", "long " * 9_000, "m3"):
        ask(exp, "u1", message=message)
        assert exp._works.shadow.wait()
    time.sleep(1.1)  # a unit without a call is waited for
    exp.step()
    unseen = exp.scorecard().unseen
    assert unseen is not None
    assert (unseen.pairs, unseen.refused, unseen.spent) == ({"new": 3}, {"new": 2}, False)


def test_money_that_a_call_under_way_holds_is_not_used_up(provider: Provider, asked: Asked, store: str) -> None:
    """As where two processes ask: what one of them holds for a call that hangs, it gives back."""
    asked(cache=False, max_tokens=1_000, limit=dspy_prod.RateLimit(max_wait=0.05))
    hanging = threading.Event()

    def latency(call: Any) -> float:
        if "Think." in str(call.body) and not hanging.is_set():
            hanging.set()
            return 4.0
        return 0.0

    provider.latency = latency
    one, another = (shadowed(store, Triage("Think."), shadow_usd=0.0015) for _ in range(2))
    one.start()
    another._works.standing.look()
    ask(one, "u1")
    assert hanging.wait(30)
    for number in range(6):
        ask(another, f"u{number}", message=f"m{number}")
    assert another._works.shadow is not None
    assert another._works.shadow.wait(30)
    assert one._works.shadow is not None
    assert one._works.shadow.wait()
    ask(another, "u2", message="once more")
    assert another._works.shadow.wait()
    time.sleep(1.1)  # a unit without a call is waited for
    another.step()
    unseen = another.scorecard().unseen
    assert unseen is not None
    assert (unseen.pairs, unseen.refused, unseen.spent) == ({"new": 2}, {"new": 6}, False)


def test_a_shadow_has_a_deadline_of_its_own(provider: Provider, asked: Asked, store: str) -> None:
    """What control left of the caller's says nothing of the candidate."""
    asked(cache=False)
    provider.latency = 0.5
    exp = shadowed(store, Triage(), shadow_calls=2)
    exp.start()
    for number in range(2):
        with call_context(user="u1", deadline=0.95):
            exp(message=f"m{number}")
    assert exp._works.shadow is not None
    assert exp._works.shadow.wait()
    unseen = exp.scorecard().unseen
    assert unseen is not None
    assert (unseen.pairs, unseen.failed, unseen.refused) == ({"new": 2}, {"new": 0}, {"new": 0})
    assert exp.step().stage == "50 %"


def test_an_experiment_made_anew_has_its_own_money_for_shadows(
    asked: Asked, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was spent on the one that was removed is not counted against it."""
    asked(cache=False, max_tokens=20)
    for salt in ("one", "another"):
        monkeypatch.setattr("dspy_prod.experiments.declaration.secrets.token_hex", lambda _, salt=salt: salt)
        exp = shadowed(store, Triage("Think."), shadow_usd=0.0003)
        seen_in_the_shadow(exp, 20)
        unseen = exp.scorecard().unseen
        assert unseen is not None
        assert unseen.pairs["new"] > 0
        assert 0.0001 < (unseen.usd or 0) <= 0.0003
        exp.remove(force=True)


@pytest.mark.parametrize("engine", ["lm15", "litellm"])
def test_a_candidate_that_hangs_has_failed(
    engine: str, provider: Provider, asked: Asked, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever was sent and not answered, that is; who waits for a limit tells nothing of the candidate."""
    monkeypatch.setattr(shadow, "PATIENCE", 0.5)
    asked(cache=False, engine=engine)
    provider.latency = lambda call: 3.0 if "Fail." in str(call.body) else 0.0
    exp = shadowed(store, Triage("Fail."))
    exp.start()
    ask(exp, "u1")
    assert exp._works.shadow is not None
    assert exp._works.shadow.wait()
    unseen = exp.step() and exp.scorecard().unseen
    assert unseen is not None
    assert (unseen.pairs, unseen.failed, unseen.refused) == ({"new": 1}, {"new": 1}, {"new": 0})


@pytest.mark.parametrize("engine", ["lm15", "litellm"])
@pytest.mark.parametrize("fallback", [None, "Sorry."])
def test_a_call_of_control_that_hangs_has_failed_as_well(
    fallback: str | None, engine: str, provider: Provider, asked: Asked, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a candidate that is control's equal would have all the hanging calls of a provider, and control none."""
    monkeypatch.setattr(shadow, "PATIENCE", 0.8)
    asked(cache=False, engine=engine)
    control, new = (Production(Triage(), fallback_response=fallback) for _ in range(2))
    rollout = Rollout(stages=("shadow", 0.5), min_time=0.0, shadow_share=1.0)
    exp = Experiment("e", variants={"control": control, "new": new}, rollout=rollout, store=store)
    ask(exp, "u1")  # what a first call imports counts for no deadline
    provider.latency = 2.0
    exp.start()
    failing = contextlib.nullcontext() if fallback else pytest.raises(dspy_prod.DeadlineExceededError)
    with failing, call_context(user="u1", deadline=0.8):
        exp(message="hi")
    assert exp._works.shadow is not None
    assert exp._works.shadow.wait()
    pair = only_pair(exp)
    assert pair is not None
    both, none = (True, True), (False, False)
    assert (pair.failed, pair.fell_back) == ((both, none) if fallback is None else (none, both))


class TwoSteps(dspy.Module):
    """Its first call hangs, and is answered in the end; its second one is refused by a budget."""

    def __init__(self, store: str, provider: Provider, mended_by: str) -> None:
        super().__init__()
        of_provider: dict[str, Any] = {"api_base": provider.url, "api_key": "k", "store": store, "cache": False}
        retry = dspy_prod.Retry(attempts=2 if mended_by == "retry" else 1, backoff=0.01)
        timeout = 0.4 if mended_by == "retry" else None
        lm = dspy_prod.LM("openai/gpt-4o-mini", timeout=timeout, retry=retry, breaker=False, **of_provider)
        empty = dspy_prod.Budget(usd=1e-9, per="total", name="empty")
        slow, self.second = Triage("Slow."), Triage()
        slow.set_lm(lm)
        self.first = Production(slow, fallback_response="Sorry.", deadline=0.4) if mended_by == "fallback" else slow
        self.second.set_lm(dspy_prod.LM("openai/gpt-4o-mini", max_tokens=20, budget=empty, **of_provider))

    def forward(self, message: str) -> Any:
        self.first(message=message)
        return self.second(message=message)


@pytest.mark.parametrize("mended_by", ["retry", "fallback"])
@pytest.mark.parametrize("fallback", [None, "Sorry."])
@pytest.mark.parametrize("where", ["candidate", "control"])
def test_a_time_out_of_one_call_makes_no_failure_of_what_a_budget_refuses_another(
    where: str, fallback: str | None, mended_by: str, provider: Provider, asked: Asked, store: str
) -> None:
    asked(cache=False)
    began = iter([1.2])
    provider.latency = lambda call: next(began, 0.0) if "Slow." in str(call.body) else 0.0
    two = Production(TwoSteps(store, provider, mended_by), fallback_response=fallback)
    control, new = (two, Triage()) if where == "control" else (Triage(), two)
    rollout = Rollout(stages=("shadow", 0.5), min_time=0.0, shadow_share=1.0)
    exp = Experiment("e", variants={"control": control, "new": new}, rollout=rollout, store=store)
    exp.start()
    refused = where == "control" and fallback is None
    with pytest.raises(dspy_prod.BudgetExceededError) if refused else contextlib.nullcontext():
        ask(exp, "u1")
    assert exp._works.shadow is not None
    assert exp._works.shadow.wait()
    time.sleep(1.1)  # a unit without a call is waited for
    exp.step()
    unseen = exp.scorecard().unseen
    assert unseen is not None
    assert next(began, None) is None, "it has hung"
    assert (unseen.pairs, unseen.refused) == ({"new": 0}, {"new": int(where == "candidate")})


@pytest.mark.parametrize("fallback", [None, "Sorry."])
def test_a_call_that_timed_out_has_failed_though_a_budget_refuses_to_ask_once_more(
    fallback: str | None, provider: Provider, asked: Asked, store: str
) -> None:
    asked(cache=False)
    provider.latency = lambda call: 1.2 if "Slow." in str(call.body) else 0.0
    slow = Triage("Slow.")
    once = dspy_prod.Budget(usd=0.0004, per="total", name="once")
    slow.set_lm(
        dspy_prod.LM(
            "openai/gpt-4o-mini", api_base=provider.url, api_key="k", store=store, cache=False, max_tokens=100,
            timeout=0.4, retry=dspy_prod.Retry(attempts=2, backoff=0.01), budget=once, breaker=False,
        )
    )  # fmt: skip
    exp = shadowed(store, Production(slow, fallback_response=fallback))
    exp.start()
    ask(exp, "u1")
    assert exp._works.shadow is not None
    assert exp._works.shadow.wait()
    assert sum("Slow." in str(call.body) for call in provider.calls) == 1, "the second attempt was refused"
    pair = only_pair(exp)
    assert pair is not None
    assert (pair.failed[1], pair.fell_back[1]) == (fallback is None, fallback is not None)


class Group(Exception):
    """As an `ExceptionGroup`, which Python 3.10 has from a backport."""

    def __init__(self, *exceptions: Exception) -> None:
        super().__init__("several")
        self.exceptions = exceptions


class Handles(dspy.Module):
    """Its call hangs, and then it asks another LM, which has no time left either."""

    def __init__(self, second: Any, groups: int = 0) -> None:
        super().__init__()
        self.slow, self.second, self.groups = Triage("Slow."), second, groups

    def forward(self, message: str) -> Any:
        try:
            return self.slow(message=message)
        except dspy_prod.DeadlineExceededError as error:
            if self.second is not None:
                return self.second(message=message)
            found: Exception = error
            for _ in range(self.groups):
                found = Group(found)
        raise found  # which has no context

    async def aforward(self, message: str) -> Any:
        try:
            return await self.slow.acall(message=message)
        except dspy_prod.DeadlineExceededError:
            return await self.second.acall(message=message)


def asks_another(how: str) -> Any:
    """A program whose LM hangs, and that has another one asked then, or nobody."""
    second = Triage("Second.")
    return {
        "a module answers": lambda: Production(Triage("Slow."), fallback_response=second),
        "a module with a text answers": lambda: Production(
            Triage("Slow."), fallback_response=Production(second, fallback_response="Sorry.")
        ),
        "a text answers after the module": lambda: Production(
            Production(Triage("Slow."), fallback_response=second), fallback_response="Sorry."
        ),
        "handled": lambda: Handles(second),
        "handled by one with a text": lambda: Handles(Production(second, fallback_response="Sorry.")),
        "handled by one with a text, within": lambda: Production(
            Handles(Production(second, fallback_response="Sorry."))
        ),
        "a group of groups": lambda: Handles(None, groups=2),
        "a text answers for a group of groups": lambda: Production(Handles(None, 2), fallback_response="Sorry."),
    }[how]()


ANOTHER = ["a module answers", "a module with a text answers", "a text answers after the module", "handled",
           "handled by one with a text", "handled by one with a text, within"]  # fmt: skip


@pytest.mark.parametrize("store", ["memory"], indirect=True)
@pytest.mark.parametrize("engine", ["lm15", "litellm"])
@pytest.mark.parametrize("how", [*ANOTHER, "a group of groups", "a text answers for a group of groups"])
def test_a_candidate_that_hangs_has_failed_though_what_it_asks_instead_has_no_time_left(
    how: str, engine: str, provider: Provider, asked: Asked, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shadow, "PATIENCE", 0.5)
    asked(cache=False, engine=engine)
    provider.latency = lambda call: 1.5 if "Slow." in str(call.body) else 0.0
    exp = shadowed(store, asks_another(how))
    exp.start()
    ask(exp, "u1")
    assert exp._works.shadow is not None
    assert exp._works.shadow.wait()
    assert not any("Second." in str(call.body) for call in provider.calls), "it was refused"
    pair, fell_back = only_pair(exp), "text" in how
    assert pair is not None
    assert (pair.failed[1], pair.fell_back[1]) == (not fell_back, fell_back)


@pytest.mark.parametrize("store", ["memory"], indirect=True)
@pytest.mark.parametrize("way", ["sync", "async"])
@pytest.mark.parametrize("how", ANOTHER)
def test_so_has_control(how: str, way: str, provider: Provider, asked: Asked, store: str) -> None:
    asked(cache=False)
    variants = {"control": asks_another(how), "new": Triage()}
    rollout = Rollout(stages=("shadow", 0.5), min_time=0.0, shadow_share=1.0)
    exp = Experiment("e", variants=variants, rollout=rollout, store=store)
    ask(exp, "u1")  # what a first call imports counts for no deadline
    provider.latency = lambda call: 1.5 if "Slow." in str(call.body) else 0.0
    exp.start()
    fell_back = "text" in how
    failing = contextlib.nullcontext() if fell_back else pytest.raises(dspy_prod.DeadlineExceededError)
    with failing, call_context(user="u1", deadline=0.5):
        if way == "sync":
            exp(message="hi")
        else:
            asyncio.run(exp.acall(message="hi"))
    assert exp._works.shadow is not None
    assert exp._works.shadow.wait()
    pair = only_pair(exp)
    assert pair is not None
    assert (pair.failed[0], pair.fell_back[0]) == (not fell_back, fell_back)


@pytest.mark.parametrize("store", ["memory"], indirect=True)
@pytest.mark.parametrize("fallback", [None, "Sorry."])
def test_what_hung_before_the_experiment_was_called_is_none_of_its_calls(
    fallback: str | None, provider: Provider, asked: Asked, store: str
) -> None:
    """Whoever handles it by asking the experiment makes no failure of what a budget refuses there."""
    lm = asked(cache=False)
    provider.latency = lambda call: 1.5 if "Slow." in str(call.body) else 0.0
    asked(cache=False, max_tokens=20, budget=dspy_prod.Budget(usd=1e-9))
    rollout = Rollout(stages=("shadow", 0.5), min_time=0.0, shadow_share=1.0)
    variants = {"control": Production(Triage(), fallback_response=fallback), "new": Triage()}
    exp = Experiment("e", variants=variants, rollout=rollout, store=store)
    exp.start()
    try:
        with dspy.context(lm=lm), call_context(deadline=0.3):
            Triage("Slow.")(message="hi")
    except dspy_prod.DeadlineExceededError:
        with contextlib.nullcontext() if fallback else pytest.raises(dspy_prod.BudgetExceededError):
            ask(exp, "u1")
    assert exp._works.shadow is not None
    assert exp._works.shadow.wait()
    assert sum("Slow." in str(call.body) for call in provider.calls) == 1, "it was sent"
    assert exp._works.trials.tally(kept_under("e", "salt")).units == 0, "nobody is asked once more"


@pytest.mark.parametrize("scope", ["user", "tenant"])
def test_a_shadow_spends_no_budget_of_a_user_or_tenant(scope: Any, asked: Asked, store: str) -> None:
    """Who was asked for has as many answers as without it, and a budget that wants a name refuses no shadow."""
    lm = asked(cache=False, max_tokens=20, budget=dspy_prod.Budget(usd=0.0003, per="total", scope=scope, require=True))
    exp = shadowed(store, Triage(), shadow_calls=1_000)
    exp.start()
    answered = dict.fromkeys(("u0", "u1"), 0)
    for who in [*answered] * 6:
        with contextlib.suppress(dspy_prod.BudgetExceededError), call_context(user=who, tenant=who):
            exp(message=f"{who} {answered[who]}")
            answered[who] += 1
        assert exp._works.shadow is not None
        assert exp._works.shadow.wait()
    assert answered == {"u0": 4, "u1": 4}
    rows = {row.value: row.attempts for row in lm.costs(by="variant")}
    assert (rows["e/control"], rows["e/new"]) == (8, 8)


def test_what_a_budget_refuses_makes_no_pair_and_ends_no_shadow(asked: Asked, store: str) -> None:
    """One of the candidate's LM, which begins anew with its window; nor does what control was refused."""
    asked(cache=False, max_tokens=20)
    poor = Triage()
    budget = dspy_prod.Budget(usd=1e-9, per="hour", name="poor")
    poor.set_lm(dspy_prod.LM("openai/gpt-4o-mini", api_key="k", max_tokens=20, store=store, budget=budget))
    exp = shadowed(store, poor)
    card = seen_in_the_shadow(exp, 30)
    time.sleep(1.1)  # a unit without a call is waited for
    card = exp.step()
    assert (card.state, card.stage) == ("running", "shadow")
    assert card.unseen is not None
    assert (card.unseen.pairs, card.unseen.refused, card.unseen.spent) == ({"new": 0}, {"new": 30}, False)
    assert any("30 of 30 unseen calls of new were refused" in each for each in card.warnings)


def test_a_call_that_control_was_refused_is_asked_of_nobody_unseen(asked: Asked, store: str) -> None:
    lm = asked(cache=False, max_tokens=20, budget=dspy_prod.Budget(usd=1e-9))
    exp = shadowed(store, Triage())
    exp.start()
    with pytest.raises(dspy_prod.BudgetExceededError):
        ask(exp, "u1")
    assert exp._works.shadow is not None
    assert exp._works.shadow.wait()
    assert {each.variant for each in lm.ledger.program_calls(limit=9)} == {"control"}


@pytest.mark.parametrize("judging", [False, True])
def test_what_nobody_sees_is_no_exposure_of_an_experiment_within(judging: bool, asked: Asked, store: str) -> None:
    """Its user has the variant there that he would have, and neither a unit nor a call nor a score is counted."""
    asked()
    seen: list[str | None] = []

    class Told(Triage):
        def forward(self, message: str) -> Any:
            seen.append(dspy_prod.context.current.current().variant)
            return super().forward(message)

    scored: list[str] = []
    judges = {"quality": dspy_prod.Judge(lambda e, p: scored.append(e.message) or 1.0, share=1.0)} if judging else None
    inner = Experiment(
        "inner", variants={"control": Told(), "b": Told("B.")}, store=store, judges=judges,
        metrics=[dspy_prod.Metric("quality", judge="untrusted")] if judging else [],
    )  # fmt: skip

    class New(dspy.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, message: str) -> Any:
            return self.inner(message=message)

    outer = shadowed(store, New(), shadow_calls=1_000)
    outer.start()
    for number in range(20):
        ask(outer, f"u{number}", message=f"m{number}")
        assert outer._works.shadow is not None
        assert outer._works.shadow.wait()
    assert seen == [inner.assign(f"u{number}") for number in range(20)]
    assert set(seen) == {"control", "b"}
    assert inner._works.trials.tally("inner").units == 0
    assert sum(each.calls for each in inner._works.trials.ended("inner")) == 0
    assert inner._works.judges is None or inner._works.judges.wait()
    assert scored == []
    ask(inner, "u1")
    assert inner._works.trials.tally("inner").units == 1, "what he sees counts"


def test_a_program_with_tools_has_no_shadow(store: str) -> None:
    def refund(order: str) -> str:
        return "done"

    agent = dspy.ReAct("message -> label", tools=[refund])
    with pytest.raises(ConfigError, match=r"uses tools in self.*ReAct"):
        shadowed(store, agent)
    shadowed(store, agent, shadow_tools="allow")

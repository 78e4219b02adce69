"""Situations in which an experiment must neither hurt a user nor deceive whoever reads it."""

from __future__ import annotations

import asyncio
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import dspy
import pytest

import dspy_prod
from dspy_prod import ConfigError, Experiment, Metric, Production, Redactor, Rollout, call_context, call_report
from dspy_prod.errors import StoreUnavailableError
from dspy_prod.experiments.listing import listing
from dspy_prod.experiments.opened import Opened
from dspy_prod.experiments.pairs import SUFFIX
from dspy_prod.experiments.variants import Variant
from dspy_prod.privacy import redactor as privacy
from dspy_prod.stores.base import Store
from dspy_prod.stores.opening import open_store
from dspy_prod.stores.trials import Call, Exposure, Outcome
from dspy_prod.testing import Provider
from tests.experiments.conftest import Triage
from tests.experiments.support import OK, declared, feed

Asked = Callable[..., dspy_prod.LM]

RESOLVED = Metric("resolved", margin=0.02)
HALF = Rollout(stages=(0.5,), min_time=0.0)


def two(name: str, store: Any, **more: Any) -> Experiment:
    return Experiment(name, variants={"control": Triage(), "new": Triage("Think first.")}, store=store, **more)


def ask(exp: Any, unit: str | None, message: str = "hi") -> Any:
    with call_context(user=unit):
        return exp(message=message)


def variant_of(exp: Any, unit: str) -> Any:
    return call_report(ask(exp, unit)).variant


def refuse(*_: Any, **__: Any) -> Any:
    raise StoreUnavailableError("gone")


@pytest.fixture
def kept(store: str) -> Iterator[Store]:
    found = open_store(store, "test")
    yield found
    found.close()


# -- no exception of the experiment's own reaches a user ---------------------------------------------------------------
def test_a_store_that_cannot_be_read_costs_no_user_an_answer(
    asked: Asked, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Paused, and in a process that does not know who was in a candidate: they get control until that can be read."""
    asked()
    first = two("e", store, rollout=HALF)
    first.start()
    before = {f"u{number}": variant_of(first, f"u{number}") for number in range(20)}
    first.pause()
    again = two("e", store, rollout=HALF)
    with monkeypatch.context() as without:
        without.setattr(type(again._works.trials), "seen", refuse)
        assert {variant_of(again, unit) for unit in before} == {"control"}
    assert {unit: variant_of(again, unit) for unit in before} == before


@pytest.mark.parametrize("wrong", [lambda unit: 1 / 0, lambda unit: "nobody knows", lambda unit: ["new"]])
def test_an_assign_of_somebody_else_that_fails_gives_control(wrong: Any, asked: Asked, store: str) -> None:
    asked()
    exp = two("e", store, assign=wrong)
    assert {variant_of(exp, f"u{number}") for number in range(5)} == {"control"}
    assert exp.scorecard().users == {"control": 0, "new": 0}


def test_an_emergency_switch_is_no_reason_not_to_begin(
    asked: Asked, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shadow's budget would not hold, so there is no shadow; users are answered."""
    monkeypatch.setenv("DSPY_PROD_DISABLED", "1")
    lm = asked()
    exp = two("e", store, rollout=Rollout(stages=("shadow", 0.5), shadow_share=1.0, shadow_usd=1.0))
    exp.start()
    assert {variant_of(exp, f"u{number}") for number in range(5)} == {"control"}
    assert exp._works.shadow is not None
    assert exp._works.shadow.wait()
    assert {record.variant for record in lm.ledger.records()} == {"control"}


# -- who gets what -----------------------------------------------------------------------------------------------------
def test_a_pause_also_holds_where_somebody_else_assigns(asked: Asked, store: str) -> None:
    asked()
    exp = two("e", store, assign=lambda unit: "new" if int(unit[1:]) % 2 else "control")
    assert variant_of(exp, "u1") == "new"
    exp.pause()
    assert {variant_of(exp, f"u{number}") for number in range(2, 8)} == {"control"}
    assert [variant_of(each, "u1") for each in (exp, two("e", store, assign=lambda unit: "new"))] == ["new", "new"]
    assert sum(exp.scorecard().users.values()) == 1


def test_an_override_is_found_under_its_pseudonym(asked: Asked, store: str) -> None:
    """And its name is not in the store."""
    asked()
    restore = privacy.install(Redactor())
    try:
        names = [f"qa{number}@acme.org" for number in range(6)]
        exp = two("e", store, overrides=dict.fromkeys(names, "new"), metrics=[RESOLVED])
        assert {variant_of(exp, name) for name in names} == {"new"} == set(map(exp.assign, names))
        known = exp._works.trials.trial("e")
        assert known is not None
        assert "acme" not in known.declaration
        for number in range(10):
            ask(exp, f"u{number}@acme.org")
            exp.record(f"u{number}@acme.org", resolved=1.0)
        assert (sum(exp.scorecard().users.values()), exp.scorecard().stray) == (10, 0)
    finally:
        restore()


def test_an_experiment_that_was_removed_leaves_the_next_one_of_its_name_alone(
    asked: Asked, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that still has the old one gives control, and tells nothing of units that the new one has."""
    asked()
    old = two("e", store, metrics=[RESOLVED])
    opened = Opened(old._works.store, "e")
    old.remove(force=True)
    monkeypatch.setattr("dspy_prod.experiments.declaration.secrets.token_hex", lambda _: "other")
    new = two("e", store)
    assert old.state == "removed"
    assert {variant_of(old, f"u{number}") for number in range(20)} == {"control"}
    assert new.scorecard().users == {"control": 0, "new": 0}
    assert opened.controller.step() is None
    assert opened.controller.over
    for card in (old.scorecard, opened.scorecard):
        with pytest.raises(ConfigError, match="another one"):
            card()
    assert {variant_of(new, f"u{number}") for number in range(20)} == {"control", "new"}


def test_what_was_read_last_holds(asked: Asked, store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A look that was slow does not bring back what is over: a decision stays."""
    asked()
    exp = two("e", store)
    standing, trials = exp._works.standing, exp._works.trials
    counts, reads, goes_on = trials.counts, threading.Event(), threading.Event()

    def slowly(name: str) -> Any:
        if threading.current_thread() is slow:
            reads.set()
            goes_on.wait(10)
        return counts(name)

    monkeypatch.setattr(trials, "counts", slowly)
    slow = threading.Thread(target=standing.look)
    slow.start()
    assert reads.wait(10)
    stops = threading.Thread(target=exp.stop)
    stops.start()
    stops.join(0.3)
    goes_on.set()
    for thread in (slow, stops):
        thread.join(10)
    assert standing.serves == "control"


def test_a_production_that_follows_an_alias_is_no_part_of_a_variant(store: str) -> None:
    class Outer(dspy.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.inner = Production(Triage())
            self.inner._follower = object()  # type: ignore[assignment]

    with pytest.raises(ConfigError, match="follows an alias"):
        Experiment("e", variants={"control": Triage(), "new": Outer()}, store=store)


def test_a_program_that_was_loaded_from_another_version_is_not_measured_as_this_one(
    store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dspy_prod.experiments.variants.mark_of", lambda program: getattr(program, "told", None))

    def begun(version: str) -> Experiment:
        program = Triage()
        program.told = version
        return Experiment("e", variants={"control": Triage(), "new": program}, store=store)

    begun("triage/3")
    begun("triage/3")
    with pytest.raises(ConfigError, match="is triage/4 here, but triage/3 where it was made"):
        begun("triage/4")


def test_of_two_that_begin_at_once_while_an_alias_moves_both_run_what_is_pinned(
    store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second one has looked the alias up before it finds that there is an experiment of this name by now."""
    newest = ["triage/3"]

    def resolved(name: str, variants: Any, program: Any, uri: Any = None, pinned: Any = None) -> Any:
        version = (pinned or {}).get("new") or newest[0]
        new = Variant("new", Production(Triage()), "version", "triage@canary", version, "canary")
        return Variant("control", Production(Triage()), "program", "Triage"), new

    monkeypatch.setattr("dspy_prod.experiments.experiment.resolved", resolved)
    monkeypatch.setattr("dspy_prod.experiments.experiment.registry_of", lambda *_: None)
    first = two("e", store)
    trials = first._works.trials
    known, asked = trials.trial, []

    def not_yet(name: str) -> Any:
        asked.append(name)
        return None if len(asked) == 1 else known(name)

    monkeypatch.setattr(trials, "trial", not_yet)
    newest[0] = "triage/4"
    second = two("e", store)
    assert [each.variants["new"].version for each in (first, second)] == ["triage/3", "triage/3"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_forked_worker_goes_on_with_the_experiment_that_was_made_before(asked: Asked, tmp_path: Path) -> None:
    """As workers of a server that loads the program first. What they expose and record is counted."""
    store = f"sqlite:///{tmp_path}/state.db"
    asked()
    exp = two("e", store, metrics=[RESOLVED])
    exp._works.trials.tally("e")  # its writer runs
    child = os.fork()
    if not child:
        try:
            for number in range(20):
                with call_context(user=f"u{number}"), suppress(Exception):
                    exp(message=f"m{number}")
                exp.record(f"u{number}", resolved=1.0)
            exp.scorecard()
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    card = exp.scorecard()
    assert (sum(card.users.values()), card.stray) == (20, 0)
    assert variant_of(exp, "u1") == exp.assign("u1")


# -- what is measured --------------------------------------------------------------------------------------------------
def test_without_guardrails_units_that_are_lost_are_noticed(kept: Store) -> None:
    opened = declared(kept)
    metrics = [OK]
    assert [each.name for each in opened.metrics] == [each.name for each in metrics]
    trials = opened.trials
    for number in range(3_000):
        unit, now = f"u{number}", trials.now()
        got = opened.design.assign(unit)
        if got.variant == "control" or number % 5:
            trials.expose(Exposure("e", unit, got.stage, got.variant, got.propensity, now, got.full))
            trials.call(Call("e", unit, now))
            trials.outcome(Outcome("e", unit, "ok", 1.0, now))
    opened.controller.step()
    card = opened.scorecard()
    assert (card.decision, card.state) == ("invalid", "paused")
    assert "declared shares" in card.reason


def test_units_in_two_arms_are_noticed_also_after_they_were_read(kept: Store) -> None:
    """With no window to wait for, outcomes are told within seconds; the other arm is seen when the user returns."""
    opened = declared(kept)
    feed(opened, 300, {"control": 0.8, "new": 0.8})
    opened.controller.step()
    assert opened.scorecard().decision == "keep"
    for number in range(10):
        got = opened.design.assign(f"u{number}")
        other = "new" if got.variant == "control" else "control"
        opened.trials.expose(Exposure("e", f"u{number}", 0, other, 1.0, opened.trials.now()))
    opened.controller.step()
    card = opened.scorecard()
    assert (card.decision, card.state, card.crossed) == ("invalid", "paused", 10)
    assert "10 of 300 units" in card.reason


def test_a_clock_that_is_set_back_stops_no_controller(kept: Store) -> None:
    """Neither does whatever else a call or an outcome may tell."""
    amount = Metric("amount", relative=True, window=0.0)
    latency = Metric("latency", direction="lower", role="guardrail", margin=0.02, tail=0.95, missing="exclude")
    opened = declared(kept, metrics=[each.model_dump(mode="json") for each in (OK, latency)])
    trials = opened.trials
    for number in range(40):
        unit, now = f"u{number}", trials.now()
        got = opened.design.assign(unit)
        trials.expose(Exposure("e", unit, 0, got.variant, got.propensity, now))
        trials.call(Call("e", unit, now, latency=-3_600.0 if number % 2 else 1e300))
        trials.outcome(Outcome("e", unit, "ok", 1.0, now))
    assert opened.controller.step() is not None
    with pytest.raises(ValueError, match="an amount of 0 or more"):
        amount.checked(1e150)
    assert amount.checked(1e60) == 1e60


def test_the_largest_and_the_least_amounts_can_be_counted(kept: Store) -> None:
    amount = Metric("ok", relative=True, margin=0.1)
    opened = declared(kept, metrics=[amount.model_dump(mode="json")])
    trials = opened.trials
    for number in range(400):
        unit, now = f"u{number}", trials.now()
        got = opened.design.assign(unit)
        trials.expose(Exposure("e", unit, 0, got.variant, got.propensity, now))
        trials.outcome(Outcome("e", unit, "ok", (1e60, 5e-324)[number % 2 if number < 200 else 1], now))
    assert opened.controller.step() is not None
    json.dumps(opened.to_dict(), allow_nan=False)


def test_a_latency_is_no_difference_of_two_clock_times(
    asked: Asked, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked()
    exp = two("e", store)
    told: list[Call] = []
    trials, now = exp._works.trials, exp._works.trials.now
    monkeypatch.setattr(trials, "call", told.append)
    times = iter(range(0, -10_000, -100))
    monkeypatch.setattr(trials, "now", lambda: now() + next(times))
    ask(exp, "u1")
    assert told[0].latency is not None
    assert 0 <= told[0].latency < 60


def test_a_call_that_never_ends_is_no_success(kept: Store) -> None:
    """Its process was killed, or it hangs for longer than anybody waits."""
    from dspy_prod.experiments.reading import value_of
    from dspy_prod.options.metrics import error_rate
    from dspy_prod.stores.trials import Matured

    metric = error_rate()
    unit = Matured(1, "u", 0, "new", 0.5, 0.0, 0, False)
    assert value_of(metric, unit) is None
    assert metric.missing == 1.0


def test_calls_of_those_who_were_in_before_a_candidate_was_full_count_in_every_process(
    asked: Asked, store: str
) -> None:
    asked()
    rails = [dspy_prod.Metric("error_rate", direction="lower", role="guardrail", margin=0.02, window="1h")]
    exp = two("e", store, rollout=HALF, guardrails=rails)
    exp.start()
    arms = {f"u{number}": variant_of(exp, f"u{number}") for number in range(8)}
    exp.pause()
    again = two("e", store, rollout=HALF, guardrails=rails)
    told: list[Call] = []
    again._works.trials.call = told.append  # type: ignore[method-assign]
    for unit in arms:
        ask(again, unit)
    assert [call.unit for call in told] == list(arms)
    assert exp.scorecard().stray == 0


def test_a_fallback_inside_of_a_nested_experiment_is_one_for_both(provider: Provider, asked: Asked, store: str) -> None:
    asked(cache=False)
    provider.down(500)
    inner = Experiment(
        "inner", store=store,
        variants={name: Production(Triage(), fallback_response="Sorry.") for name in ("control", "new")},
    )  # fmt: skip
    outer = Experiment("outer", variants={"control": inner, "new": inner}, store=store)
    for number in range(8):
        assert call_report(ask(outer, f"u{number}")).status == "fallback"
    for each in (inner, outer):
        rate = next(one.interval for one in each.scorecard().metrics if one.metric == "fallback_rate")
        assert (rate.control, rate.candidate) == (1.0, 1.0)


def test_a_production_around_an_experiment_reports_its_stage(asked: Asked, store: str) -> None:
    asked()
    exp = two("e", store, rollout=HALF)
    exp.start()
    report = call_report(ask(Production(exp, name="triage"), "u1"))
    assert (report.program, report.experiment, report.variant, report.stage) == (
        "triage",
        "e",
        exp.assign("u1"),
        "50 %",
    )


@pytest.mark.parametrize(
    ("more", "told"),
    [({"unit": 7}, "unit=7 must be text"), ({"id": 7}, "id=7 must be text"), ({"at": float("nan")}, "at=nan"),
     ({"at": "now"}, "at='now'")],
)  # fmt: skip
def test_what_the_store_would_lose_is_refused(more: Any, told: str, store: str) -> None:
    exp = two("e", store, metrics=[RESOLVED])
    with pytest.raises(ConfigError, match=told):
        exp.record(**{"unit": "u1", "resolved": 1.0, **more})


@pytest.mark.parametrize("own", [True, False])
def test_a_user_who_leaves_a_stream_is_no_failure_of_the_variant(own: bool, asked: Asked, tmp_path: Path) -> None:
    """Whether the program is asynchronous or runs in a thread of DSPy's."""
    long = "[[ ## label ## ]]\n" + "word " * 300 + "\n\n[[ ## completed ## ]]"
    with Provider(answer=long, chunks=100, chunk_delay=0.02) as provider:
        lm = dspy_prod.LM(
            "openai/gpt-4o-mini", api_base=provider.url, api_key="k", store=f"memory://{tmp_path.name}", cache=False
        )
        exp = two("e", f"memory://{tmp_path.name}")
        listener = dspy.streaming.StreamListener(signature_field_name="label")

        async def leave() -> None:
            began = asyncio.Event()

            async def read() -> None:
                stream = dspy.streamify(exp, stream_listeners=[listener], is_async_program=own)
                with call_context(user="u1"):
                    async for _ in stream(message="q"):
                        began.set()

            with dspy.context(lm=lm):
                reader = asyncio.create_task(read())
                await asyncio.wait_for(began.wait(), 60)
                reader.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await reader

        asyncio.run(leave())
        until = time.monotonic() + 60
        while not (told := exp._works.trials.matured("e", None)) and time.monotonic() < until:
            time.sleep(0.02)
    [unit] = told
    assert (unit.calls.calls, unit.calls.failed) == (1, 0)


# -- what is kept ------------------------------------------------------------------------------------------------------
def test_an_experiment_is_forgotten_with_its_shadow(asked: Asked, store: str) -> None:
    exp = two("e", store, rollout=Rollout(stages=("shadow", 0.5)))
    trials = exp._works.trials
    assert [each.experiment for each in listing(trials)] == ["e"]
    exp.remove(force=True)
    assert trials.trials() == []
    with pytest.raises(ConfigError, match="does not end in"):
        two("e" + SUFFIX, store)

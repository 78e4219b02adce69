"""What refusals leave behind: in the ledger who was refused and why, in health and on the command line how full budgets
are. The provider bills nothing for any of it."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

import dspy_prod
from dspy_prod import Budget, BudgetExceededError, call_context
from dspy_prod.cli import main
from dspy_prod.compat.dspy import engines_of
from dspy_prod.pipeline.refusing import BURST, EVERY, Refusals
from dspy_prod.testing import Provider
from tests.e2e.support import MODEL, assert_equals_bill, fresh_memory, make_lm, outcome, records, request

pytestmark = pytest.mark.filterwarnings("ignore:.*more than 5 %")

A_CENT = {MODEL: (0.0, 100.0)}


@pytest.fixture(params=["memory", "sqlite"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return fresh_memory() if request.param == "memory" else f"sqlite:///{tmp_path}/state.db"


def test_a_refusal_is_recorded_with_who_and_why(store: str) -> None:
    """Nothing in the ledger told that a tenant had been turned away all afternoon."""
    with Provider() as provider:
        lm = make_lm(provider.url, store=store, prices=A_CENT, budget=Budget(usd=0.005, per="day", scope="tenant"))
        with call_context(tenant="acme", user="ann"):
            assert isinstance(outcome(lambda: lm("q")), BudgetExceededError)
        (record,) = records(lm)
        assert (record.outcome, record.cost_nano, record.estimated, record.attempt) == ("refused", 0, False, 0)
        assert (record.tenant, record.user, record.model, record.error) == ("acme", "ann", MODEL, "BudgetExceededError")
        assert record.reason == "budget_exceeded: day/tenant=acme"
        assert lm.ledger.records(outcome="refused", tenant="acme") == [record]
        assert_equals_bill(lm, provider)


def test_every_way_to_call_and_every_reason_leaves_a_record(store: str) -> None:
    with Provider() as provider:
        lm = make_lm(provider.url, store=store, prices={})
        engine, _ = engines_of(lm.copy(budget=Budget(usd=1)))
        lm.breaker("force_open")
        with call_context(user="sync"):
            outcome(lambda: lm("q"))
        with call_context(user="async"):
            outcome(lambda: asyncio.run(lm.acall("q")))
        lm.breaker("reset")
        with call_context(user="stream"):
            outcome(lambda: list(engine.stream(request())))
        assert {(record.user, record.reason) for record in records(lm)} == {
            ("sync", "circuit_open"),
            ("async", "circuit_open"),
            ("stream", "unpriced_model"),
        }
        assert not provider.calls


def test_refusals_disturb_no_sum_and_no_history(store: str) -> None:
    """A refused call is no attempt, no failure and no cost, and a user who was only refused is in no table."""
    with Provider() as provider:
        lm = make_lm(provider.url, store=store, prices=A_CENT, budget=Budget(usd=0.011))
        with call_context(user="ann"):
            lm("q")
        before = lm.costs(by="day"), lm.costs(by="user"), lm.costs(by="model")
        with call_context(user="bob"):
            for _ in range(3):
                outcome(lambda: lm("another", max_tokens=200))
        assert (lm.costs(by="day"), lm.costs(by="user"), lm.costs(by="model")) == before
        assert len(lm.history) == 1
        assert len(lm.ledger.records(outcome="refused")) == 1


def test_a_storm_of_refusals_is_told_in_few_records(store: str) -> None:
    with Provider() as provider:
        lm = make_lm(provider.url, store=store, prices=A_CENT, budget=Budget(usd=0.001))
        for _ in range(500):
            outcome(lambda: lm("q"))
        assert [record.outcome for record in records(lm)] == ["refused"]


def test_alike_refusals_are_counted_and_told_with_the_next_record() -> None:
    refusals = Refusals()
    assert [refusals.stands_for(("ann",), now) for now in (0.0, 0.1, 0.2, EVERY - 1)] == [1, 0, 0, 0]
    assert refusals.stands_for(("bob",), 1.0) == 1, "somebody else is somebody else"
    assert refusals.stands_for(("ann",), EVERY) == 4
    assert refusals.stands_for(("ann",), EVERY + 1) == 0


def test_many_different_callers_stay_below_a_rate() -> None:
    """Ten thousand users refused in a second must not push the calls that were sent out of a bounded ledger."""
    refusals = Refusals()
    assert sum(refusals.stands_for((str(user),), 0.0) for user in range(10_000)) == BURST
    assert sum(refusals.stands_for((str(user),), 10.0) for user in range(20_000, 30_000)) == 10
    assert len(refusals._kinds) <= 1_000


# -- how full budgets with a scope are -------------------------------------------------------------------------------
def crowded(provider: Provider, store: str, tenants: int) -> Any:
    budget = [Budget(usd=0.0101, per="day", scope="tenant"), Budget(usd=5, name="whole"), Budget(usd=1, per="call")]
    lm = make_lm(provider.url, store=store, prices=A_CENT, budget=budget)
    for number in range(tenants):
        with call_context(tenant=f"tenant {number:02}"):
            lm("q " * number, max_tokens=100 - number)
    return lm


def test_health_shows_the_fullest_accounts_of_a_budget_with_a_scope(store: str) -> None:
    """Four tenants stood at 96 % and health was "healthy", with no budget in it."""
    with Provider(answer=lambda call: "word " * (call.max_tokens or 1)) as provider:
        lm = crowded(provider, store, 14)
        health = lm.health()
        whole, *scoped = health.costs.budgets
        assert (whole.title, whole.who) == ("whole", None)
        assert [budget.who for budget in scoped] == [f"tenant {number:02}" for number in range(10)]
        assert scoped[0].title == "day/tenant=tenant 00"
        assert health.status == "warning"
        assert any("day/tenant=tenant 00" in reason for reason in health.reasons)
        assert health.costs.budget_usd == 5, "the summary's fields are the global budget's"


def test_the_command_lists_accounts_of_every_budget(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the program that uses them: name, scope, who, window, limit, spent, held, left, percent."""
    monkeypatch.setenv("COLUMNS", "120")
    store = f"sqlite:///{tmp_path}/state.db"
    with Provider(answer=lambda call: "word " * (call.max_tokens or 1)) as provider:
        lm = crowded(provider, store, 3)
        lm.set_budget(Budget(usd=10, name="whole"))
        lm.close()
    where = ("--store", store, "--namespace", "e2e")
    assert main(["budgets", *where, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row["name"], row["scope"], row["who"]) for row in rows] == [
        ("call", "global", None),
        ("day/tenant", "tenant", "tenant 00"),
        ("day/tenant", "tenant", "tenant 01"),
        ("day/tenant", "tenant", "tenant 02"),
        ("whole", "global", None),
    ]
    assert rows[4]["limit_usd"] == 10
    assert rows[1]["spent_usd"] + rows[1]["held_usd"] + rows[1]["remaining_usd"] == pytest.approx(0.0101)
    assert main(["budgets", *where]) == 0
    text = capsys.readouterr().out
    for word in ("tenant 00", "whole", "0.0101", "10", "%"):
        assert word in text


def test_the_command_lists_a_budget_of_which_nobody_has_spent(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One with a scope was in no row: "No budget is known", although every call was held to it."""
    store = f"sqlite:///{tmp_path}/state.db"
    budgets = [Budget(usd=1, per="day", scope="tenant", require=True), Budget(usd=2, name="run", per="run")]
    make_lm("http://127.0.0.1:1", store=store, budget=budgets).close()
    assert main(["budgets", "--store", store, "--namespace", "e2e", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row["title"], row["who"], row["limit_usd"], row["spent_usd"]) for row in rows] == [
        ("day/tenant", None, 1, 0),
        ("run", None, 2, 0),
    ]


def test_the_command_says_where_there_is_no_budget(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dspy_prod.LM(MODEL, store=f"sqlite:///{tmp_path}/state.db", namespace="e2e", api_key="x").close()
    assert main(["budgets", "--store", f"sqlite:///{tmp_path}/state.db", "--namespace", "e2e"]) == 0
    assert "No budget" in capsys.readouterr().out


def test_accounts_with_a_bar_in_their_names_are_kept_apart(store: str) -> None:
    """Run "a|b" of user "c" and run "a" of user "b|c" had one account: a stranger could spend another's money."""
    with Provider() as provider:
        lm = make_lm(
            provider.url, store=store, prices=A_CENT, budget=Budget(usd=0.011, per="run", scope="user", name="r")
        )
        for run, user in (("a|b", "c"), ("a", "b|c"), ("a", "anonymous"), ("a", None), ("a%7Cb", "c")):
            with call_context(run=run, user=user):
                lm("q")
        found = {budget.who for budget in lm.health().costs.budgets}
        assert len(lm.health().costs.budgets) == 5
        assert found == {"'a|b'|c", "a|'b|c'", "a|'anonymous'", "a|anonymous", "a%7Cb|c"}

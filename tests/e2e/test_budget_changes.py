"""Budgets whose settings change while calls are made, against a provider that bills."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import dspy_prod
from dspy_prod import Budget, BudgetExceededError
from dspy_prod.testing import Provider
from tests.e2e.support import MODEL, fresh_memory, make_lm, outcome, until


@pytest.fixture(params=["memory", "sqlite"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return fresh_memory() if request.param == "memory" else f"sqlite:///{tmp_path}/state.db"


@pytest.fixture
def changes() -> Iterator[list[Any]]:
    """What listeners heard of budgets."""
    heard: list[Any] = []
    remove = dspy_prod.add_listener(lambda event: heard.append(event.data) if event.name == "budget_changed" else None)
    yield heard
    remove()


def small(provider: Provider, store: str, usd: float) -> Any:
    return make_lm(provider.url, store=store, budget=Budget(usd=usd, name="b"), prices={MODEL: (0.0, 100.0)})


@pytest.mark.filterwarnings("ignore:.*more than 5 %")
def test_a_notebook_cell_is_run_again_with_another_budget(store: str, changes: list[Any]) -> None:
    """It said "already in use with other settings"; its remedies (another name or namespace) forgot what was spent."""
    with Provider() as provider:
        lm = small(provider, store, 0.015)
        lm("one")
        spent = lm.costs().budgets[0].spent_usd
        again = small(provider, store, spent + 0.0099)
        for each in (lm, again):
            assert isinstance(outcome(lambda each=each: each("two")), BudgetExceededError)  # type: ignore[misc]
        small(provider, store, spent + 0.0101)
        again("two")
        assert [change["limit_usd"] for change in changes] == [spent + 0.0099, spent + 0.0101]
        assert len(provider.calls) == 2


@pytest.mark.filterwarnings("ignore:.*more than 5 %")
def test_a_copy_with_another_budget_of_the_same_name_changes_it_for_all(store: str, changes: list[Any]) -> None:
    """And a copy that changes something else leaves the newest settings alone."""
    with Provider() as provider:
        lm = small(provider, store, 1)
        lm.copy(budget=Budget(usd=0.005, name="b"))
        assert isinstance(outcome(lambda: lm("one")), BudgetExceededError)
        old = lm.copy(timeout=30)
        assert isinstance(outcome(lambda: old("one")), BudgetExceededError)
        assert isinstance(outcome(lambda: lm("one", timeout=20)), BudgetExceededError)
        assert [change["limit_usd"] for change in changes] == [0.005]
        assert not provider.calls


@pytest.mark.filterwarnings("ignore:.*more than 5 %")
def test_raising_a_budget_wakes_who_waits_for_it(store: str) -> None:
    """An operator need not wait for calls in flight to end."""
    with Provider() as provider:
        provider.hold()
        lm = small(provider, store, 0.011)
        threads = [threading.Thread(target=lm, args=(f"question {n}",), daemon=True) for n in range(2)]
        threads[0].start()
        until(lambda: len(provider.calls) == 1)
        threads[1].start()
        until(lambda: lm.health().waiting == 1)
        lm.set_budget(Budget(usd=1, name="b"))
        until(lambda: len(provider.calls) == 2)
        provider.release()
        for thread in threads:
            thread.join(30)


def test_the_health_of_an_idle_process_shows_what_another_one_said(tmp_path: Path) -> None:
    """Two store objects on one file stand for two processes."""
    from dspy_prod.stores.sqlite.store import SqliteStore

    with Provider() as provider:
        lm = make_lm(provider.url, store=f"sqlite:///{tmp_path}/state.db", budget=Budget(usd=1, name="b"))
        elsewhere = SqliteStore(str(tmp_path / "state.db"), "e2e")
        elsewhere.steer(Budget(usd=2, name="b"))
        assert lm.health().costs.budgets[0].limit_usd == 2
        elsewhere.close()


@pytest.mark.filterwarnings("ignore:.*more than 5 %")
def test_soft_threshold_and_cheaper_model_follow_the_new_settings() -> None:
    """A call is degraded by the settings of now: raising the limit brings the better model back."""
    with Provider() as provider:
        lm = make_lm(provider.url, budget=Budget(usd=0.05, name="b"))
        lm.set_budget(Budget(usd=0.05, name="b", soft=0.00001, degrade_to="openai/e2e-cheap"))
        for number in range(3):
            lm(f"question {number}")
        assert provider.calls[-1].body["model"] == "e2e-cheap"
        lm.set_budget(Budget(usd=5, name="b"))
        lm("question")
        assert provider.calls[-1].body["model"] == "e2e"

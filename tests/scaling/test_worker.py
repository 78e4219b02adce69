"""What a worker of an evaluation does and what travels to it, without Ray: here it is an object of this process."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dspy
import pytest

import dspy_prod
from dspy_prod import ConfigError
from dspy_prod.context.current import current
from dspy_prod.scaling.carried import NOTE, Carried, Place
from dspy_prod.scaling.on_ray import OnRay, _work
from dspy_prod.scaling.parcel import Parcel, unpacked
from dspy_prod.scaling.worker import Outcome, Worker
from dspy_prod.testing import Provider
from tests.e2e.support import MODEL, make_lm
from tests.scaling.programs import TwoSteps, devset, even

KEY = "sk-not-to-be-seen-anywhere"


@pytest.fixture
def provider() -> Iterator[Provider]:
    with Provider() as provider:
        yield provider


@pytest.fixture
def lm(tmp_path: Path, provider: Provider) -> Iterator[Any]:
    lm = make_lm(provider.url, store=f"sqlite:///{tmp_path}/state.db", api_key=KEY)
    with dspy.context(lm=lm):
        yield lm


def begun(program: Any, metric: Any) -> Worker:
    """A worker that has what it needs from here, within the run in force."""
    work, stores = _work(program, metric, None)
    for store in stores:
        store.runs.put_note(work.run, NOTE, work.mark)
    worker = Worker()
    worker.ready(Parcel({"work": work}).data)
    return worker


def done(worker: Worker, example: Any, again: bool = False) -> Outcome:
    told = worker.answer(Parcel({"example": example}).data, again)
    assert told is not None
    outcome: Outcome = unpacked(told)["outcome"]
    return outcome


def test_no_key_travels_and_everything_else_does(lm: Any) -> None:
    """The parcel has the address of the provider and not the key; the LM in it shares the store."""
    data = Parcel({"the program": TwoSteps(), "lm": lm}).data
    assert KEY.encode() not in data
    assert lm.settings.clients["api_base"].encode() in data
    assert unpacked(data)["lm"].pipeline.store is lm.pipeline.store


def test_what_cannot_go_is_named_with_what_to_do(lm: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A key in a metric, an LM that takes its key along, a store of this process, a run in a closure, a lock."""
    memory = dspy_prod.LM(MODEL, store="memory://alone", api_key=KEY)
    plain = dspy.LM("openai/gpt-4o-mini", api_key=KEY)
    run = dspy_prod.Run("mine", store=f"sqlite:///{tmp_path}/state.db")
    monkeypatch.setenv("JUDGE_API_KEY", "a-judge-has-this-key")
    held = os.environ["JUDGE_API_KEY"]
    for thing, told in [
        (lambda: held, "the metric holds what is known as a key"),
        (lambda: plain, "the metric cannot go to a worker: LM.'openai/gpt-4o-mini'. would take its key along"),
        (lambda: memory, "memory://alone, which no other process sees"),
        (lambda: run, "it holds Run.'mine'.: give that to evaluate.run=....."),
        ((each for each in ""), "the metric cannot go to a worker .TypeError: "),
    ]:
        with pytest.raises(ConfigError, match=told) as caught:
            Parcel({"the program": TwoSteps(), "the metric": thing})
        assert KEY not in str(caught.value)
        assert held not in str(caught.value)


def test_settings_context_and_runs_hold_in_the_worker(lm: Any, tmp_path: Path) -> None:
    """Who calls, until when, and under which caps, is there as it was here; its records come back."""

    class Looks(dspy.Module):
        def forward(self, question: str) -> Any:
            context, settings = current(), dspy.settings
            return dspy.Prediction(
                text=settings.lm(question), left=context.deadline - time.monotonic(), tags=dict(context.tags),
                adapter=type(settings.adapter), threads=settings.num_threads,
            )  # fmt: skip

    run = dspy_prod.Run("capped", usd=1.0, calls=2, store=lm.pipeline.store)
    with dspy.context(adapter=dspy.JSONAdapter(), num_threads=3):
        with dspy_prod.call_context(user="anna", tags={"team": "a"}, deadline=60, run=run):
            worker = begun(Looks(), even)
    with dspy_prod.call_context(user="somebody else"):
        outcome = done(worker, devset(1)[0])
    found = outcome.prediction
    assert (found.text, found.tags, found.adapter, found.threads) == (["ok"], {"team": "a"}, dspy.JSONAdapter, 3)
    assert 0 < found.left < 60
    assert outcome.score == 1.0
    assert [(each.user, each.run, each.outcome) for each in outcome.records] == [("anna", "capped", "ok")]
    assert run.used().calls == 1
    refused = [done(worker, each).error for each in devset(2)]
    assert refused[0] is None
    assert isinstance(refused[1], dspy_prod.BudgetExceededError)


def test_what_a_dead_worker_was_answered_is_not_paid_again(lm: Any, provider: Provider) -> None:
    """Done again, an example gets what is kept by now; for the first time, it asks."""
    run = dspy_prod.Run("kept", usd=1.0, store=lm.pipeline.store, keep_answers=True)
    with dspy_prod.call_context(run=run):
        first, second = begun(TwoSteps(), even), begun(TwoSteps(), even)
    [example] = devset(1)
    told = done(first, example).prediction
    assert len(provider.calls) == 2
    assert done(second, example, again=True).prediction.answer == told.answer
    assert len(provider.calls) == 2
    before = run.used()
    assert done(second, example, again=False).error is None
    assert len(provider.calls) == 4
    assert before.usd is not None
    assert (run.used().usd or 0) == pytest.approx(2 * before.usd)


def test_a_stopped_worker_sends_nothing_more(lm: Any, provider: Provider) -> None:
    """Neither for an example that is new nor for one that is done again."""
    with dspy_prod.call_context(run=dspy_prod.Run("ends", store=lm.pipeline.store, keep_answers=True)):
        worker = begun(TwoSteps(), even)
    worker.stop("enough")
    errors = [done(worker, example, again).error for example in devset(1) for again in (False, True)]
    assert [type(error) for error in errors] == [dspy_prod.RunStoppedError] * 2
    assert provider.calls == []


def test_a_process_that_has_just_begun_says_so() -> None:
    """Ray may have started it again unheard: the example is given out again."""
    assert Worker().answer(Parcel({"example": devset(1)[0]}).data, False) is None


def test_a_worker_with_another_store_is_refused(lm: Any) -> None:
    """A file of the same name on another machine would let everybody spend the whole budget."""
    work, _ = _work(TwoSteps(), even, None)
    with pytest.raises(ConfigError, match="another store for a worker"):
        Worker().ready(Parcel({"work": work}).data)


def test_an_error_that_cannot_travel_comes_back_as_text(lm: Any) -> None:
    """Whatever a program raises, the evaluation hears of it."""

    class Odd(Exception):
        def __init__(self, one: str, two: str) -> None:
            super().__init__(f"{one} and {two}")

    class Raises(dspy.Module):
        def forward(self, question: str) -> Any:
            raise Odd("this", "that")

    error = done(begun(Raises(), even), devset(1)[0]).error
    assert "this and that" in str(error)


def test_an_optimizer_s_own_guard_does_not_go_along(lm: Any) -> None:
    """What is no run is of this process."""

    class Guard:
        name = "guard"

        def check(self) -> None: ...

        def takes_over(self, other: object) -> bool:
            return False

    with dspy_prod.call_context(run=Guard()), pytest.raises(ConfigError, match="engine='threads'"):
        Carried.from_here()


def test_the_password_of_a_store_is_the_environment_s(monkeypatch: pytest.MonkeyPatch) -> None:
    """A place is written without it; whoever opens it knows it from there."""
    from dspy_prod.stores.addresses import with_password

    monkeypatch.setenv("DSPY_PROD_STORE", "redis://user:secret@host:6379/0")
    from dspy_prod.privacy.names import bare_url

    bare = bare_url("redis://user:secret@host:6379/0")
    assert "secret" not in bare
    assert with_password(bare) == "redis://user:secret@host:6379/0"
    assert with_password("sqlite:///other.db") == "sqlite:///other.db"
    assert Place("sqlite:///other.db", "n").url == "sqlite:///other.db"


def test_ray_is_asked_for_only_by_its_name() -> None:
    """Nothing of it is imported for the class."""
    assert OnRay(devset=devset(1), metric=even).workers == 2

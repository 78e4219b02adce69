"""Runs that go on in every way: optimizers that walk far, more trials, two at once, after `kill -9`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import dspy
import pytest

from benchmarks.subjects import optimizers
from benchmarks.world import World
from dspy_prod import BudgetedOptimizer, ConfigError
from dspy_prod.optimize import headers
from dspy_prod.optimize.opening import Scribe
from dspy_prod.stores.opening import default_namespace, open_store

ROOT = Path(__file__).parents[2]


def go(world: World, name: str, store: str, lm: dict[str, Any], *, resume: bool | None = None, **more: Any) -> Any:
    """One of DSPy's optimizers on new LMs, as another process would run it."""
    task, proposer = world.lm(**lm), world.prompt_lm(**lm)
    arguments = more.pop("arguments", {})
    with dspy.context(lm=task):
        subject = optimizers(world, lm=task, prompt_lm=proposer, threads=4, only=name)[name]
        budgeted = BudgetedOptimizer(subject.optimizer, store=store, name="it", view=None, metric=world.metric, **more)
        return budgeted.compile(subject.student, resume=resume, **{**subject.arguments, **arguments})


def state(program: Any) -> dict[str, Any]:
    """Without its LMs."""
    return {name: {**part, "lm": None} for name, part in program.dump_state().items() if name != "metadata"}


def a_world() -> World:
    """The same one each time: its proposals depend on how many came before them."""
    return World(1, train=24, val=24, test=12, varied=False)


def uninterrupted(name: str, store: str, lm: dict[str, Any], **more: Any) -> tuple[dict[str, Any], float, int]:
    """(the program that a whole run finds, what that is billed, how many calls it makes)."""
    with a_world() as world:
        return state(go(world, name, store, lm, budget_usd=1.0, **more)), world.bill_usd, len(world.calls)


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "cut"),
    [
        ("MIPROv2", False),
        ("GEPA", True),
        *(
            pytest.param(name, cut, marks=pytest.mark.slow)
            for name, cut in (("MIPROv2", True), ("GEPA", False), ("SIMBA", False), ("SIMBA", True))
        ),
    ],
)
def test_a_raised_cap_goes_on_without_a_cache_and_with_answers_that_were_cut(
    name: str, cut: bool, tmp_path: Path
) -> None:
    """Both parts cost what the whole does, and find the same program."""
    lm: dict[str, Any] = {"cache": False, **({"max_tokens": 24} if cut else {})}
    whole, alone, _ = uninterrupted(name, f"sqlite:///{tmp_path}/whole.db", lm)
    store = f"sqlite:///{tmp_path}/runs.db"
    with a_world() as world:
        part = go(world, name, store, lm, budget_usd=0.5 * alone)
        assert part.optimization.stopped_by == "budget"
        assert world.bill_usd <= 0.5 * alone
        best = go(world, name, store, lm, budget_usd=1.0, resume=True)
        report = best.optimization
        assert report.stopped_by == "completed"
        assert report.spent_usd == pytest.approx(world.bill_usd, abs=1e-9)
        assert world.bill_usd <= 1.05 * alone
        assert state(best) == whole
        assert not any("differ from all" in each for each in report.warnings)


@pytest.mark.parametrize("part", [0.7, *(pytest.param(part, marks=pytest.mark.slow) for part in (0.5, 0.9))])
def test_what_is_evaluated_at_the_end_of_a_part_is_what_the_optimizer_would_come_back_to(
    part: float, tmp_path: Path
) -> None:
    """Of each of SIMBA's rounds the best one alone is evaluated at its end: the others would be paid for in vain."""
    whole, alone, _ = uninterrupted("SIMBA", f"sqlite:///{tmp_path}/whole.db", {})
    store = f"sqlite:///{tmp_path}/runs.db"
    with a_world() as world:
        first = go(world, "SIMBA", store, {}, budget_usd=part * alone).optimization
        assert first.stopped_by == "budget"
        best = go(world, "SIMBA", store, {}, budget_usd=1.0, resume=True)
        assert world.bill_usd == pytest.approx(alone, rel=0.002)
        assert state(best) == whole
        complete = {each.key for each in best.optimization.candidates if each.status == "complete"}
        assert {each.key for each in first.candidates if each.status == "complete"} <= complete


@pytest.mark.long
def test_more_trials_cost_what_they_add(tmp_path: Path) -> None:
    """What the shorter run asked at its end only, need not be asked: nobody takes the way for another one."""
    store, lm = f"sqlite:///{tmp_path}/runs.db", {"cache": False}
    fewer, more = ({"num_trials": number, "minibatch_size": 8} for number in (3, 8))
    whole, _, calls = uninterrupted("MIPROv2", f"sqlite:///{tmp_path}/whole.db", lm, arguments=more)
    with a_world() as world:
        go(world, "MIPROv2", store, lm, budget_usd=1.0, arguments=fewer)
        best = go(world, "MIPROv2", store, lm, budget_usd=1.0, arguments=more, resume=True)
        assert len(world.calls) <= calls + 24, "one evaluation of the shorter run's best came at its end"
        assert state(best) == whole
        warnings = best.optimization.warnings
        assert any("compile's num_trials is 8 instead of 3" in each for each in warnings)
        assert not any("differ from all" in each for each in warnings)


def small(world: World, store: str, **more: Any) -> Any:
    optimizer = dspy.BootstrapFewShotWithRandomSearch(
        metric=world.metric, max_bootstrapped_demos=2, max_labeled_demos=2, num_candidate_programs=2, num_threads=4
    )
    resume = more.pop("resume", None)
    budgeted = BudgetedOptimizer(optimizer, store=store, view=None, **{"name": "it", **more})
    return budgeted.compile(world.program(), trainset=world.trainset, valset=world.valset, resume=resume)


@pytest.mark.parametrize("resume", [True, None])
def test_of_two_that_begin_at_once_one_is_refused_by_name(
    resume: bool | None, world: World, asked: Any, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both have looked before either of them had written that it goes on."""
    if resume:
        small(world, store, max_calls=30)
    both, claim = threading.Barrier(2), Scribe.claim

    def together(self: Scribe) -> None:
        both.wait(60)
        claim(self)

    monkeypatch.setattr(Scribe, "claim", together)
    outcomes: list[Any] = []

    def one() -> None:
        try:
            with dspy.context(lm=asked):
                outcomes.append(small(world, store, max_calls=60, resume=resume).optimization.run)
        except ConfigError as error:
            outcomes.append(str(error))

    threads = [threading.Thread(target=one) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    went, refused = sorted(outcomes, key=len)
    assert went == "it"
    assert "the run 'it' was just begun elsewhere" in refused
    assert "optimizations stop it" in refused
    assert len(world.calls) <= 60


def test_a_name_with_a_number_is_a_name_of_its_own(world: World, asked: Any, store: str) -> None:
    """Whoever goes on with `it` does not go on with what somebody called `it-2`."""
    small(world, store, max_calls=30)
    small(world, store, max_calls=30, name="it-2")
    report = small(world, store, max_calls=60, resume=True).optimization
    assert (report.run, report.replayed > 0) == ("it", True)
    assert small(world, store, max_calls=30, resume=False).optimization.run == "it-3"
    assert small(world, store, max_calls=60, resume=True).optimization.run == "it-3"
    found = open_store(store, default_namespace(None))
    headers.remove(found, "it")
    assert small(world, store, max_calls=90, resume=True).optimization.run == "it-3", "the first of the name is gone"


def test_what_another_machine_left_can_be_gone_on_with(world: World, asked: Any, store: str) -> None:
    """A container that was killed has another name when it is started again."""
    small(world, store, max_calls=30)
    found = open_store(store, default_namespace(None))
    left = headers.load(found, "it")
    assert left is not None
    process = "elsewhere " + (left.process or "").partition(" ")[2]
    row = replace(left, state="running", process=process).to_dict()
    found.runs.put_note("it", "header", json.dumps({**row, "seen_at": time.time()}))
    with pytest.raises(ConfigError, match="'it' goes on elsewhere"):
        small(world, store, max_calls=60, resume=True)
    found.runs.put_note("it", "header", json.dumps({**row, "seen_at": time.time() - 600}))
    assert small(world, store, max_calls=60, resume=True).optimization.replayed > 0


CHILD = """
import sys, dspy
sys.path.insert(0, sys.argv[3])
from benchmarks.world import World
from tests.optimize.test_resume_ways import small
url, store = sys.argv[1:3]
world = World(1, train=24, val=24, test=12, url=url)
dspy.configure(lm=world.lm(cache=False, store=store))
small(world, store, budget_usd=1.0, max_calls=70)
"""


@pytest.mark.long
def test_what_a_killed_process_held_is_not_waited_for_and_is_told(tmp_path: Path) -> None:
    """Its calls in flight are charged at once, so that whoever goes on is not kept waiting for the end of its lease."""
    store = f"sqlite:///{tmp_path}/runs.db"
    with World(1, train=24, val=24, test=12, latency=0.3) as world:
        child = subprocess.Popen(
            [sys.executable, "-c", CHILD, world.url, store, str(ROOT)], stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE, env={**os.environ, "LITELLM_LOCAL_MODEL_COST_MAP": "True"},
        )  # fmt: skip
        while len(world.calls) < 50:
            assert child.poll() is None, child.communicate()[1][-2000:]
            time.sleep(0.01)
        child.kill()
        child.communicate(timeout=30)
        world.provider.latency = 0.0
        began = time.monotonic()
        with dspy.context(lm=world.lm(cache=False, store=store)):
            report = small(world, store, budget_usd=1.0, max_calls=70, resume=True).optimization
        assert time.monotonic() - began < 20.0, "the lease of the dead process lasts for 30 s"
        assert report.stopped_by == "calls"
        assert report.replayed > 30
        assert len(world.calls) <= 70
        dearest = max(row.usd for row in world.provider.bill.rows)
        assert world.bill_usd <= report.spent_usd <= world.bill_usd + 4 * 10 * dearest, "four at their bound"
        assert any("of what earlier parts spent is an upper bound" in each for each in report.warnings)

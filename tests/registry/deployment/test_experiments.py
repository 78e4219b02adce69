"""What an experiment decides moves an alias, once, by compare-and-set, and continues the deployment that led to it."""

from __future__ import annotations

import json
from typing import Any

import pytest
from mlflow import MlflowClient

from dspy_prod import ConfigError, Experiment, Rollout, registry
from dspy_prod.experiments import aliases as following
from dspy_prod.experiments.opened import Opened
from dspy_prod.experiments.operating import promote, stop
from dspy_prod.experiments.shortening import shortened
from dspy_prod.registry import PromotionConflictError, PromotionRefusedError
from dspy_prod.registry.aliases.journal import SHORT
from dspy_prod.registry.server import Server
from dspy_prod.stores.memory import MemoryStore
from dspy_prod.stores.trials import DECIDED, PAUSED
from tests.experiments.support import OK, audit, feed, lines
from tests.registry.aliases.test_promotion import aliases, moves, publish
from tests.registry.deploying import Bench
from tests.registry.programs import qa

BETTER = {"control": 0.3, "cot": 0.9}
WORSE = {"control": 0.9, "cot": 0.3}


@pytest.fixture
def trials() -> MemoryStore:
    """The store of the experiment."""
    return MemoryStore("registry")


@pytest.fixture
def two(store: str) -> None:
    """Versions 1 in production and 2 as canary; there is a third one."""
    publish(3)
    registry.promote("it", 1)
    registry.promote("it", 2, alias="canary")


def compare(trials: MemoryStore, **more: Any) -> Opened:
    """An experiment of both, made by a process that has the code, opened by one that has not."""
    Experiment(
        "e", program=qa(), variants={"control": "it@production", "cot": "it@canary"}, metrics=[OK], guardrails=(),
        store=trials, **more,
    )  # fmt: skip
    return Opened(trials, "e")


@pytest.mark.usefixtures("two")
def test_a_worse_candidate_is_rolled_back_once(trials: MemoryStore, client: MlflowClient) -> None:
    """The canary alias goes back to control's version, with the reason and the evidence; again changes nothing."""
    opened = compare(trials)
    feed(opened, 200, WORSE)
    opened.controller.step()
    assert (opened.trial().state, opened.scorecard().serves) == (DECIDED, "control")
    assert aliases(client) == {"production": 1, "canary": 1}
    newest = registry.history("it")[0]
    assert (newest.action, newest.alias, newest.from_version, newest.to_version) == ("rollback", "canary", 2, 1)
    assert newest.by == "dspy-prod experiment"
    assert newest.reason is not None
    assert newest.reason.startswith("cot is worse on ok")
    scorecard = newest.evidence["scorecard"]
    assert scorecard["verdict"] == "rollback"
    told = scorecard["candidates"]["cot"]["metrics"]["ok"]
    assert told["status"] == "worse"
    assert told["e_values"]["worse"][0] >= told["e_values"]["worse"][1]
    assert (sum(told["units"]), len(told["interval"])) == (200, 3)
    before = registry.history("it")
    for _ in range(2):
        again = Opened(trials, "e")
        again.controller.step()
        assert again.controller.over
    assert registry.history("it") == before
    assert [what for what, _ in audit(opened)] == ["start", "rollback", "alias"]
    assert json.loads(lines(opened, "alias")[0].evidence)["reason"] == "it@canary from 2 to 1: applied"


@pytest.mark.usefixtures("two")
def test_a_better_candidate_is_promoted_once(trials: MemoryStore, client: MlflowClient) -> None:
    """And what a person takes back later is not promoted again by whoever looks."""
    opened = compare(trials)
    feed(opened, 200, BETTER)
    opened.controller.step()
    assert opened.scorecard().serves == "cot"
    assert aliases(client) == {"production": 2, "previous": 1, "canary": 2}
    newest = registry.history("it")[0]
    assert (newest.action, newest.from_version, newest.to_version) == ("promote", 1, 2)
    assert newest.evidence["experiment"]["name"] == "e"
    registry.rollback("it", reason="an incident")
    for _ in range(2):
        Opened(trials, "e").controller.step()
    assert aliases(client)["production"] == 1


def three(trials: MemoryStore, rates: dict[str, float]) -> Opened:
    """An experiment of control and two candidates, of which one was found worse and dropped before."""
    registry.promote("it", 3, alias="staging")
    Experiment(
        "e", program=qa(), variants={"control": "it@production", "cot": "it@canary", "bad": "it@staging"}, metrics=[OK],
        guardrails=(), store=trials,
    )  # fmt: skip
    opened = Opened(trials, "e")
    feed(opened, 400, rates)
    for _ in range(2):
        opened.controller.step()
    return opened


@pytest.mark.usefixtures("two")
def test_a_promotion_takes_the_alias_of_what_was_dropped_along(trials: MemoryStore, client: MlflowClient) -> None:
    """It stayed at the version that had lost, for whoever loads by it; done once, by whoever looks."""
    opened = three(trials, {"control": 0.5, "cot": 0.5, "bad": 0.05})
    assert [what for what, _ in audit(opened)] == ["start", "drop"]
    assert aliases(client) == {"production": 1, "canary": 2, "staging": 3}, "it goes on, and measures what they name"
    promote(opened, "cot", force=True, reason="the better style", by="ada")
    assert aliases(client) == {"production": 2, "previous": 1, "canary": 2, "staging": 2}
    newest = registry.history("it", alias="staging")[0]
    assert (newest.action, newest.from_version, newest.to_version, newest.by) == ("rollback", 3, 2, "ada")
    assert newest.evidence["experiment"]["name"] == "e"
    before = registry.history("it")
    Opened(trials, "e").controller.step()
    assert registry.history("it") == before
    registry.promote("it", 3, alias="staging", reason="again, by hand")
    again = Opened(trials, "e")
    again.controller.step()
    assert again.controller.over
    assert aliases(client)["staging"] == 3


@pytest.mark.usefixtures("two")
def test_stopping_gives_the_candidates_aliases_back(trials: MemoryStore, client: MlflowClient) -> None:
    """Of those that still have what was measured; of one that never began nothing moves."""
    opened = three(trials, {"control": 0.5, "cot": 0.5, "bad": 0.5})
    registry.promote("it", 2, alias="staging", reason="by others")
    stop(opened, "enough", "ada")
    assert aliases(client) == {"production": 1, "canary": 1, "staging": 2}
    newest = registry.history("it")[0]
    assert (newest.action, newest.alias, newest.by, newest.reason) == ("rollback", "canary", "ada", "enough")
    said = json.loads(lines(opened, "alias")[0].evidence)["reason"]
    assert said == "it@canary from 2 to 1: applied; it@staging from 3 to 1: conflict"
    before = registry.history("it")
    again = Opened(trials, "e")
    again.controller.step()
    assert again.controller.over
    assert registry.history("it") == before


@pytest.mark.usefixtures("two")
def test_an_experiment_that_never_began_moves_nothing(trials: MemoryStore, client: MlflowClient) -> None:
    opened = compare(trials, rollout=Rollout())
    stop(opened)
    assert aliases(client) == {"production": 1, "canary": 2}


@pytest.mark.usefixtures("two")
@pytest.mark.parametrize("rates", [BETTER, WORSE])
def test_a_move_that_was_not_noted_is_not_made_again(
    rates: dict[str, float], trials: MemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between the move and its line in the audit: the journal says that it was made."""
    opened = compare(trials)
    feed(opened, 200, rates)
    with monkeypatch.context() as patched:
        patched.setattr(type(trials.trials), "decide", _die)
        with pytest.raises(KeyboardInterrupt):
            opened.controller.step()
    moved = registry.history("it")[0]
    registry.promote("it", moved.from_version, alias=moved.alias, reason="back", by="ada")
    before = registry.history("it")
    Opened(trials, "e").controller.step()
    assert registry.history("it") == before
    assert json.loads(lines(opened, "alias")[0].evidence)["moves"][0]["outcome"] == "applied"


def _die(*_: Any) -> int:
    raise KeyboardInterrupt


@pytest.mark.usefixtures("two")
def test_an_alias_that_somebody_else_moves_pauses_the_experiment(trials: MemoryStore, client: MlflowClient) -> None:
    opened = compare(trials)
    registry.promote("it", 3, reason="by others")
    feed(opened, 200, BETTER)
    opened.controller.step()
    assert opened.trial().state == PAUSED
    paused = lines(opened, "pause")[0]
    assert "somebody moved it@production from 1 to 3" in json.loads(paused.evidence)["reason"]
    with pytest.raises(PromotionConflictError, match="expected to have version 1"):
        promote(opened)
    assert opened.trial().state == PAUSED
    assert aliases(client)["production"] == 3


@pytest.mark.usefixtures("two")
def test_an_alias_that_moves_between_decision_and_move_stays(
    trials: MemoryStore, client: MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is a conflict, which is noted once; nothing is overwritten."""
    opened = compare(trials)
    feed(opened, 200, BETTER)
    follow = following.Aliases.follow

    def late(self: Any, trial: Any, audit: Any) -> bool:
        if trial.state == DECIDED and aliases(client)["production"] == 1:
            registry.promote("it", 3)
        return follow(self, trial, audit)

    monkeypatch.setattr(following.Aliases, "follow", late)
    for _ in range(2):
        opened.controller.step()
    assert opened.controller.over
    assert aliases(client)["production"] == 3
    assert [json.loads(each.evidence)["moves"][0]["outcome"] for each in lines(opened, "alias")] == ["conflict"]
    with pytest.raises(PromotionConflictError) as error:
        promote(opened)
    assert (error.value.alias, error.value.expected, error.value.actual) == ("production", 1, 3)


@pytest.mark.usefixtures("two")
def test_while_mlflow_is_down_it_is_tried_again(
    trials: MemoryStore, client: MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = compare(trials)
    feed(opened, 200, WORSE)
    with monkeypatch.context() as patched:
        patched.setattr(Server, "_ask", _unavailable)
        opened.controller.step()
        assert opened.trial().state == DECIDED
        assert not opened.controller.over
    assert aliases(client)["canary"] == 2
    opened.controller.step()
    assert opened.controller.over
    assert aliases(client)["canary"] == 1


def _unavailable(*_: Any) -> Any:
    raise registry.RegistryUnavailableError("no answer")


@pytest.mark.usefixtures("two")
def test_another_mlflow_pauses_nothing(trials: MemoryStore, tmp_path: Any) -> None:
    """The store with the versions is known; one that is named wrongly is refused by the name of what it lacks."""
    opened = compare(trials)
    assert opened.declaration.registry is not None
    feed(opened, 200, BETTER)
    wrong = Opened(trials, "e", f"sqlite:///{tmp_path}/other.db")
    assert wrong.aliases is not None
    with pytest.raises(registry.UnknownVersionError, match="--tracking-uri"):
        wrong.aliases.check()
    assert wrong.aliases.moved() == []
    with pytest.raises(registry.UnknownVersionError):
        promote(wrong)


@pytest.mark.usefixtures("two")
def test_by_hand_only_what_the_evidence_says_but_by_force(trials: MemoryStore, client: MlflowClient) -> None:
    opened = compare(trials)
    feed(opened, 10, BETTER)
    with pytest.raises(PromotionRefusedError, match="not proven better") as error:
        promote(opened)
    assert error.value.report.result == "inconclusive"
    with pytest.raises(ConfigError, match="reason="):
        promote(opened, "cot", force=True)
    with pytest.raises(ConfigError, match="no candidate"):
        promote(opened, "control", force=True, reason="why")
    promote(opened, "cot", force=True, reason="the CEO wants it", by="ada")
    assert aliases(client)["production"] == 2
    newest = registry.history("it")[0]
    assert (newest.by, newest.reason, newest.evidence["scorecard"]["forced"]) == ("ada", "the CEO wants it", True)
    assert audit(opened)[1:] == [("promote", "ada"), ("alias", "controller")]
    before = registry.history("it")
    promote(opened, "cot", force=True, reason="again")
    assert registry.history("it") == before
    assert len(audit(opened)) == 3


@pytest.mark.usefixtures("two")
def test_what_is_proven_worse_is_not_promoted_by_force(trials: MemoryStore) -> None:
    opened = compare(trials)
    feed(opened, 200, WORSE)
    with pytest.raises(PromotionRefusedError, match="worse") as error:
        promote(opened, "cot", force=True, reason="why not")
    assert error.value.report.result == "fail"
    opened.controller.step()
    with pytest.raises(ConfigError, match="everybody gets 'control'"):
        promote(opened, "cot", force=True, reason="why not")


# -- deployments -------------------------------------------------------------------------------------------------------
def test_a_deployment_stops_at_canary_and_the_experiment_goes_on(
    bench: Bench, trials: MemoryStore, client: MlflowClient
) -> None:
    """The promotion belongs to the same deployment, which is then done."""
    publish(2)
    registry.promote("it", 1)
    assert bench.deploy(2, "--canary") == 0
    assert aliases(client) == {"production": 1, "staging": 2, "canary": 2}
    assert "waiting" in bench.out
    assert "dspy-prod experiment start NAME" in bench.out
    assert '"control": "it@production", "candidate": "it@canary"' in " ".join(bench.out.split())
    assert bench.report(2)[0]["outcome"] == "waiting"
    assert bench.deploy(2, "--canary") == 0
    assert "waiting" in bench.out
    opened = compare(trials)
    feed(opened, 200, BETTER)
    opened.controller.step()
    assert aliases(client) == {"production": 2, "previous": 1, "staging": 2, "canary": 2}
    production, canary, staging, _ = registry.history("it")
    assert production.evidence["deployment"] == canary.evidence["deployment"] == staging.evidence["deployment"]
    assert production.evidence["scorecard"]["verdict"] == "promote"
    before = registry.history("it")
    for more in ((), ("--canary",)):
        assert bench.deploy(2, *more) == 0
        assert "There was nothing to do" in bench.out
    assert registry.history("it") == before
    assert [(step["name"], step["result"]) for step in bench.report(2)[0]["steps"]][1:] == [
        ("staging", "before"), ("canary", "before"), ("production", "before"),
    ]  # fmt: skip
    assert bench.evaluations == [1]


def test_a_deployment_whose_candidate_was_rolled_back_does_not_go_on(
    bench: Bench, trials: MemoryStore, client: MlflowClient
) -> None:
    publish(2)
    registry.promote("it", 1)
    bench.deploy(2, "--canary")
    opened = compare(trials)
    feed(opened, 200, WORSE)
    opened.controller.step()
    assert aliases(client) == {"production": 1, "staging": 2, "canary": 1}
    for more in ((), ("--canary",)):
        assert bench.deploy(2, *more) == 4
        assert "cot is worse on ok" in bench.err
    assert aliases(client)["production"] == 1


def test_a_deployment_that_waits_is_finished_by_hand(bench: Bench, client: MlflowClient) -> None:
    publish(2)
    registry.promote("it", 1)
    bench.deploy(2, "--canary")
    assert bench.deploy(2) == 0
    assert aliases(client)["production"] == 2
    assert len({entry.evidence["deployment"]["id"] for entry in registry.history("it")[:3]}) == 1
    assert [entry[1:] for entry in moves()[1:]] == [("applied", None, 2), ("applied", None, 2), ("applied", 1, 2)]
    assert bench.evaluations == [1]


@pytest.mark.parametrize("stages", ["staging,production", "production"])
def test_a_stage_that_is_none_is_refused(stages: str, bench: Bench) -> None:
    publish(1)
    assert bench.deploy(1, "--canary", "--stages", stages) == 2
    assert "until='canary'" in bench.err


# -- evidence ----------------------------------------------------------------------------------------------------------
def test_evidence_fits_into_the_journal() -> None:
    """Whatever it is of: verdict and reason stay, and of the metrics what decided."""
    metric = {
        "metric": "m", "status": "unclear", "better": 1.23456789, "worse": 0.1, "no_worse": None, "better_at": 50.0,
        "worse_at": 100.0, "no_worse_at": 20.0, "control_units": 100_000, "candidate_units": 100_000,
        "interval": {"difference": 0.123456, "low": -0.1, "high": None},
    }  # fmt: skip
    sizes = []
    for candidates, metrics, length in ((1, 5, 50), (7, 12, 50), (7, 60, 2_000), (7, 900, 9_000)):
        one = [{**metric, "metric": f"m{number}", "status": "worse" if number == 0 else "unclear"}
               for number in range(metrics)]  # fmt: skip
        about = {f"c{number}": {"verdict": "keep", "metrics": one} for number in range(candidates)}
        found = shortened(
            {"reason": "r" * length, "decision": {"verdict": "promote", "winner": "c0", "candidates": about}}
        )
        sizes.append(len(json.dumps(found)))
        assert (found["verdict"], found["winner"], found["reason"][:50]) == ("promote", "c0", "r" * 50)
        assert found["candidates"]["c0"]["metrics"]["m0"]["status"] == "worse"
    assert max(sizes) <= SHORT
    assert found["candidates"]["c0"]["metrics"].keys() == {"m0"}

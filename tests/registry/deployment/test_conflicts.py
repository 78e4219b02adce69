"""Deployments that meet others: racing deployers, moves by hand, rollbacks, and a server that goes away."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from mlflow import MlflowClient

from dspy_prod import registry
from dspy_prod.registry.deployment import run as deploying
from tests.registry.aliases.test_promotion import aliases, publish
from tests.registry.deploying import STAGES, Bench, everywhere
from tests.registry.processes import Nursery, Other


@pytest.mark.parametrize("candidates", [(1, 2), (2, 2)], ids=["different", "the same"])
def test_of_two_deployers_at_once_one_wins(
    bench: Bench, client: MlflowClient, others: tuple[Other, Other], candidates: tuple[int, int]
) -> None:
    """The other one gets a conflict, and the winner's version is everywhere."""
    publish(2)
    bench.case(together=2)
    code = (
        "import os, sys; os.chdir(sys.argv[1])\n"
        "import contextlib, io; from dspy_prod.cli import main\n"
        "with contextlib.redirect_stdout(io.StringIO()): code = main(sys.argv[2:])\n"
        "print(code)"
    )
    for other, candidate in zip(others, candidates, strict=True):
        other.begin(code, str(bench.folder), *bench.arguments(candidate))
    codes = [int(other.said()[0]) for other in others]
    assert sorted(codes) == [0, 4]
    assert aliases(client) == everywhere(candidates[codes.index(0)])
    assert len(bench.evaluations) == 2


def interfering(monkeypatch: pytest.MonkeyPatch, alias: str, act: Callable[[], Any]) -> None:
    """Do something just before the deployment moves an alias."""
    original = deploying.settled

    def settled(server: Any, name: str, this: str, *more: Any) -> Any:
        if this == alias and registry.versions(name)[0].aliases:
            monkeypatch.setattr(deploying, "settled", original)
            act()
        return original(server, name, this, *more)

    monkeypatch.setattr(deploying, "settled", settled)


def test_a_later_stage_that_somebody_else_moved_stops_it(
    bench: Bench, client: MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was moved stays, the report says how to go on or back, and only `--recheck` overrides."""
    publish(3)
    for alias in STAGES:
        registry.promote("it", 1, alias=alias)
    interfering(monkeypatch, "production", lambda: registry.promote("it", 2))
    assert bench.deploy(3) == 4
    assert aliases(client) == {"staging": 3, "canary": 3, "production": 2, "previous": 1}
    assert "has version 2" in bench.err
    report, text = bench.report(3)
    assert (report["outcome"], report["after"]) == ("conflict", {"staging": 3, "canary": 3, "production": 2})
    for words in ("staging, canary have version 3; that stays", "--recheck", "rollback it --alias canary"):
        assert words in text
    assert bench.deploy(3) == 4
    assert bench.evaluations == [2]
    assert bench.deploy(3, "--recheck") == 0
    assert bench.evaluations == [2, 2]
    assert aliases(client) == everywhere(3, previous=2)


def test_a_move_by_hand_in_mlflow_is_a_conflict_too(
    bench: Bench, client: MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also while the gate is evaluated: then nothing is moved at all."""
    publish(3)
    registry.promote("it", 1)
    original = deploying.Run._judged

    def judged(self: Any, earlier: Any) -> Any:
        found = original(self, earlier)
        client.set_prompt_alias("it", "production", 2)
        return found

    monkeypatch.setattr(deploying.Run, "_judged", judged)
    assert bench.deploy(3) == 4
    assert aliases(client)["production"] == 2
    assert "staging" not in aliases(client)


def test_what_was_rolled_back_is_not_deployed_again_by_a_repeated_command(bench: Bench, client: MlflowClient) -> None:
    """A CI job that is run again does not undo a person's rollback."""
    publish(2)
    registry.promote("it", 1)
    assert bench.deploy(2) == 0
    registry.rollback("it", reason="it lies", by="ada")
    assert bench.deploy(2) == 4
    assert "by ada: it lies" in bench.err
    assert aliases(client)["production"] == 1
    assert bench.deploy(2, "--recheck") == 0
    assert aliases(client)["production"] == 2


def test_a_finished_deployment_stays_finished_when_the_next_one_is_on_its_way(bench: Bench) -> None:
    """Its first stages belong to the next candidate then."""
    publish(3)
    assert bench.deploy(2) == 0
    registry.promote("it", 3, alias="staging")
    assert bench.deploy(2) == 0
    assert "nothing to do" in bench.out
    assert bench.deploy(3) == 0
    assert [step["result"] for step in bench.report(3)[0]["steps"]] == ["done", "skipped", "done", "done", "done"]
    assert bench.deploy(2) == 4


def test_a_passed_gate_holds_for_other_stages_under_the_same_conditions(bench: Bench, client: MlflowClient) -> None:
    """Other thresholds, or another version as the baseline, are another gate."""
    publish(3)
    registry.promote("it", 1)
    bench.case(baseline="it@production")
    assert bench.deploy(2, "--stages", "staging") == 0
    assert aliases(client) == {"staging": 2, "production": 1}
    assert bench.deploy(2, "--stages", "canary") == 0
    assert bench.evaluations == [1, 0]
    bench.case(baseline="it@production", thresholds={"score": 0.6})
    assert bench.deploy(2, "--stages", "demo") == 0
    assert bench.evaluations == [1, 0] * 2
    registry.promote("it", 3)
    assert bench.deploy(2, "--stages", "other") == 0
    assert bench.evaluations == [1, 0] * 2 + [1, 2]
    assert bench.deploy(2, "--stages", "other", "--recheck") == 0
    assert "There was nothing to do" in bench.out
    assert bench.evaluations == [1, 0] * 2 + [1, 2] * 2


def test_a_server_that_goes_away_is_waited_out_by_running_again(
    bench: Bench, client: MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit code 2, the report says what is done, and the same command continues."""
    publish(2)

    def gone() -> None:
        raise registry.RegistryUnavailableError("no answer")

    interfering(monkeypatch, "canary", gone)
    assert bench.deploy(2) == 2
    report, text = bench.report(2)
    assert (report["outcome"], report["steps"][-1]["name"]) == ("interrupted", "canary")
    assert "run the same command again" in text
    assert aliases(client) == {"staging": 2}
    assert bench.deploy("it@staging") == 0
    assert aliases(client) == everywhere(2)
    assert bench.evaluations == [1]


def test_evidence_that_is_too_long_to_keep_does_not_lose_the_verdict(bench: Bench, nursery: Nursery) -> None:
    """A gate of thousands of metrics passes once, too."""
    publish(1)
    metrics = {f"metric {number}": number for number in range(5000)}
    bench.case(metrics={"score": 1, **metrics}, kill="moved:staging")
    assert nursery.main(bench.folder, *bench.arguments(1)) == -9
    assert "too long" in registry.history("it")[0].evidence["note"]
    bench.case(metrics={"score": 1, **metrics})
    assert bench.deploy(1) == 0
    assert len(bench.evaluations) == 1

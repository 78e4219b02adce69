"""A deployment gates, publishes and promotes; broken off at any moment, the same command continues it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from dspy_prod import registry
from dspy_prod.cli import main
from dspy_prod.registry import deploying
from tests.registry.conftest import Nursery, Other, forget
from tests.registry.programs import qa
from tests.registry.test_promotion import aliases, moves, publish

STAGES = ("staging", "canary", "production")


class Bench:
    """A working directory with an evaluation file, and the command line in it."""

    def __init__(self, folder: Path, uri: str, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder, self.uri, self._capsys = folder, uri, capsys
        shutil.copy(Path(__file__).with_name("evaluation.py"), folder / "evals.py")
        self.finds(score=0.9)
        self.out = self.err = ""

    def case(self, **case: Any) -> None:
        """Say what the evaluation shall do."""
        (self.folder / "case.json").write_text(json.dumps(case))

    def finds(self, **metrics: Any) -> None:
        """Say what it shall measure."""
        self.case(metrics=metrics)

    def arguments(self, candidate: object, *more: str) -> list[str]:
        """The command."""
        return [
            "deploy", "it", "--candidate", str(candidate), "--eval", "evals.py", "--tracking-uri", self.uri, *more
        ]  # fmt: skip

    def deploy(self, candidate: object, *more: str) -> int:
        """The exit code."""
        forget()
        code = main(self.arguments(candidate, *more))
        self.out, self.err = self._capsys.readouterr()
        return code

    @property
    def evaluations(self) -> list[int]:
        """The number of demos of each program that was evaluated."""
        path = self.folder / "evaluated"
        return list(map(int, path.read_text().split())) if path.exists() else []

    def report(self, version: int | str) -> tuple[dict[str, Any], str]:
        """The report as JSON and Markdown."""
        path = self.folder / ".dspy_prod" / "deployments" / f"deployment-it-{version}.json"
        return json.loads(path.read_text()), path.with_suffix(".md").read_text()


@pytest.fixture
def bench(store: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Bench:
    """A place to deploy from."""
    return Bench(tmp_path, store, capsys)


def everywhere(version: int, previous: int | None = None) -> dict[str, int]:
    """The aliases after a deployment."""
    return {**dict.fromkeys(STAGES, version), **({} if previous is None else {"previous": previous})}


def test_a_candidate_goes_through_the_gate_and_up_to_production(bench: Bench, client: MlflowClient) -> None:
    """One evaluation, three moves with evidence, and a report; the same command again does nothing and says so."""
    publish(2)
    registry.promote("it", 1)
    assert bench.deploy(2, "--reason", "better | cheaper") == 0
    assert aliases(client) == everywhere(2, previous=1)
    assert bench.evaluations == [1]
    assert moves()[1:] == [
        ("promote", "applied", None, 2), ("promote", "applied", None, 2), ("promote", "applied", 1, 2),
    ]  # fmt: skip
    production, canary, staging, _ = registry.history("it")
    assert staging.evidence["gate"]["metrics"] == {"score": 0.9}
    assert "gate" not in canary.evidence
    told = staging.evidence["deployment"]
    assert told["before"] == {"staging": None, "canary": None, "production": 1}
    assert production.evidence["deployment"] == told
    assert (production.reason, production.forced) == ("better | cheaper", False)
    assert "deployed" in bench.out
    assert "dspy-prod rollback it" in bench.out
    before = registry.history("it")
    assert bench.deploy(2) == 0
    assert "There was nothing to do" in bench.out
    assert bench.evaluations == [1]
    assert registry.history("it") == before


def test_the_report_tells_everything(bench: Bench) -> None:
    """Steps with times, checks, metrics beside the baseline's, aliases before and after, and the difference."""
    publish(2)
    registry.promote("it", 1)
    bench.case(baseline="it@production", metrics={"score": 0.75, "usd": 0.1})
    assert bench.deploy(2) == 0
    report, text = bench.report(2)
    assert (report["name"], report["version"], report["outcome"], report["previous"]) == ("it", 2, "deployed", 1)
    assert [(step["name"], step["result"]) for step in report["steps"]] == [
        (name, "done") for name in ("load", "gate", *STAGES)
    ]
    assert report["before"] == {"staging": None, "canary": None, "production": 1}
    assert report["after"] == dict.fromkeys(STAGES, 2)
    assert [check["name"] for check in report["gate"]["checks"]] == ["score", "score vs it/1"]
    assert (report["gate"]["metrics"], report["gate"]["baseline"]) == ({"score": 0.75, "usd": 0.1},) * 2
    assert report["changes"] == {"self": "changed"}
    assert "+1. question: a {{question}}?" in report["difference"]
    assert bench.evaluations == [1, 0]
    for part in (
        "# Deployment of it/2: deployed", "| score | 0.75 | 0.75 | 0 |", "| production | 1 | 2 |", "- `self`: changed",
        "```diff\n", "+1. question: a {{question}}?", "| score vs it/1 | pass |", "dspy-prod rollback it",
    ):  # fmt: skip
        assert part in text
    assert bench.deploy(2) == 0
    again, text = bench.report(2)
    assert (again["outcome"], again["resumed"], again["gate"]["checks"]) == (
        "unchanged", True, report["gate"]["checks"],
    )  # fmt: skip
    assert [(step["name"], step["result"]) for step in again["steps"]][-3:] == [(name, "before") for name in STAGES]
    assert {path.suffix for path in (bench.folder / ".dspy_prod" / "deployments").iterdir()} == {".json", ".md"}


@pytest.mark.parametrize(
    ("case", "code", "outcome", "words"),
    [
        ({"metrics": {"score": 0.4}}, 1, "failed", "cannot be overruled"),
        ({"raise": "no dataset"}, 1, "error", "no dataset"),
        ({"exit": True}, 1, "error", "SystemExit"),
        ({"metrics": {"score": "nan"}}, 3, "inconclusive", "--force --reason"),
        ({"metrics": {"score": "inf"}}, 3, "inconclusive", "--force --reason"),
        ({"metrics": {}}, 3, "inconclusive", "--force --reason"),
        ({"metrics": {"score": 1, "examples": 0}}, 3, "inconclusive", "no examples"),
        ({"baseline": "it@production"}, 3, "inconclusive", "no it@production to compare with"),
    ],
)
def test_only_a_gate_that_passes_lets_through(
    bench: Bench, client: MlflowClient, case: dict[str, Any], code: int, outcome: str, words: str
) -> None:
    """Nothing moves, the attempt is on record, and the report says how to proceed."""
    publish(1)
    bench.case(**case)
    assert bench.deploy(1) == code
    assert aliases(client) == {}
    assert moves() == [("refused", "refused", None, 1)]
    report, text = bench.report(1)
    assert (report["outcome"], report["steps"][-1]["name"], report["steps"][-1]["result"]) == (
        outcome, "gate", "stopped",
    )  # fmt: skip
    assert words in " ".join((bench.out + bench.err).split())
    assert words in " ".join(text.split())
    assert bench.deploy(1) == code
    assert len(bench.evaluations) == 2


def test_a_person_overrules_what_was_inconclusive(bench: Bench, client: MlflowClient) -> None:
    """With a reason, for the record; what is overruled is the verdict that was seen, and no new one is made."""
    publish(1)
    bench.finds(score="nan")
    assert bench.deploy(1) == 3
    assert bench.deploy(1, "--force") == 2
    assert "reason" in bench.err
    assert bench.deploy(1, "--force", "--reason", "I looked at all answers") == 0
    assert aliases(client) == everywhere(1)
    assert bench.evaluations == [0]
    assert [(entry.forced, entry.reason) for entry in registry.history("it")[:3]] == [
        (True, "I looked at all answers")
    ] * 3
    report, _ = bench.report(1)
    assert (report["forced"], report["gate"]["metrics"]) == (True, {"score": "nan"})


def test_a_gate_that_fails_is_not_overruled(bench: Bench, client: MlflowClient) -> None:
    """Force is for what is not known, not for what is known to be bad."""
    publish(1)
    bench.finds(score=0.1)
    assert bench.deploy(1, "--force", "--reason", "please") == 1
    assert aliases(client) == {}


def test_a_file_is_gated_then_published_then_promoted(bench: Bench, client: MlflowClient) -> None:
    """A candidate that fails is not even published; one that passes is a version with its metrics."""
    qa().save("candidate.json")
    bench.finds(score=0.4)
    assert bench.deploy("candidate.json") == 1
    assert registry.programs() == []
    assert bench.report("unpublished")[0]["outcome"] == "failed"
    bench.finds(score=0.8, usd="nan")
    assert bench.deploy("candidate.json", "--reason", "new demos") == 0
    (version,) = registry.versions("it")
    assert (version.version, dict(version.metrics), version.message) == (1, {"score": 0.8}, "new demos")
    assert aliases(client) == everywhere(1)
    assert [step["name"] for step in bench.report(1)[0]["steps"]] == ["load", "gate", "publish", *STAGES]
    assert bench.deploy("candidate.json") == 0
    assert "nothing to do" in bench.out
    assert bench.evaluations == [3, 3]


def test_killed_at_any_moment_the_same_command_continues(bench: Bench, client: MlflowClient, nursery: Nursery) -> None:
    """In the gate, after publishing, between a move's entry and its alias, and between two moves."""
    publish(1)
    registry.promote("it", 1)
    qa().save("candidate.json")
    seen = []
    for kill in ("gate", "published", "written:staging", "moved:canary", "written:production"):
        bench.case(kill=kill)
        assert nursery.main(bench.folder, *bench.arguments("candidate.json")) == -9, (
            bench.folder / "output"
        ).read_text()
        seen.append((len(registry.versions("it")), aliases(client), len(bench.evaluations)))
    old = {"production": 1}
    assert seen == [
        (1, old, 1),  # nothing but the evaluation was done
        (2, old, 2),
        (2, old, 3),  # the evidence of a passed gate comes with the first move: from here on it is not repeated
        (2, {**old, "staging": 2, "canary": 2}, 3),
        (2, {**old, "staging": 2, "canary": 2}, 3),
    ]
    bench.case()
    assert bench.deploy("candidate.json") == 0
    assert aliases(client) == everywhere(2, previous=1)
    assert len(bench.evaluations) == 3
    assert [move for move in moves() if move[1] == "applied"][1:] == [
        ("promote", "applied", None, 2), ("promote", "applied", None, 2), ("promote", "applied", 1, 2),
    ]  # fmt: skip
    assert len({entry.evidence["deployment"]["id"] for entry in registry.history("it")[:3]}) == 1
    report, _ = bench.report(2)
    assert (report["resumed"], report["before"]["production"], report["previous"]) == (True, 1, 1)


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

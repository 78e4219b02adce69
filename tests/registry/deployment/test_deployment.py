"""A deployment gates, publishes and promotes; broken off at any moment, the same command continues it."""

from __future__ import annotations

from typing import Any

import pytest
from mlflow import MlflowClient

from dspy_prod import registry
from tests.registry.aliases.test_promotion import aliases, moves, publish
from tests.registry.deploying import STAGES, Bench, everywhere
from tests.registry.processes import Nursery
from tests.registry.programs import qa


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
        pytest.param({"exit": True}, 1, "error", "SystemExit", marks=pytest.mark.slow),
        ({"metrics": {"score": "nan"}}, 3, "inconclusive", "--force --reason"),
        pytest.param({"metrics": {"score": "inf"}}, 3, "inconclusive", "--force --reason", marks=pytest.mark.slow),
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

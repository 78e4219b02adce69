"""`dspy-prod experiment`: experiments are looked at, run and decided from a shell, by who has the store alone."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dspy_prod import Rollout
from dspy_prod.cli import main
from dspy_prod.experiments import attending
from dspy_prod.stores.base import Store
from dspy_prod.stores.opening import open_store
from dspy_prod.stores.trials import CREATED, DECIDED, PAUSED, RUNNING, STOPPED
from tests.experiments.support import audit, declared, feed
from tests.ports import free_port

BETTER = {"control": 0.3, "new": 0.9}
WORSE = {"control": 0.9, "new": 0.3}
SAME = {"control": 0.5, "new": 0.5}
ROLLOUT = Rollout(stages=(0.1, 0.5), min_users=(2, 5), min_time=0.0).model_dump(mode="json")

Said = Callable[..., Any]


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/state.db"


@pytest.fixture
def store(url: str) -> Iterator[Store]:
    store = open_store(url, "cli")
    yield store
    store.close()


@pytest.fixture
def said(url: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Said:
    """What a command prints: JSON as values, else text; its error, when it ends with a code."""
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)

    def said(action: str, *arguments: str, code: int = 0) -> Any:
        assert main(["experiment", action, "--store", url, "--namespace", "cli", *arguments]) == code
        out = capsys.readouterr()
        if code:
            assert out.err.startswith("dspy-prod experiment: ")
            return out.err
        return json.loads(out.out) if "--json" in arguments else out.out

    return said


def test_all_are_listed_the_latest_first(said: Said, store: Store) -> None:
    """With the decision, or what the evidence said at the last look."""
    assert "No experiment is known" in said("list")
    assert said("list", "--json") == []
    declared(store, "waits", state=None)
    for name, rates in (("goes on", SAME), ("is decided", WORSE)):
        opened = declared(store, name)
        feed(opened, 150, rates)
        opened.controller.step()
    rows = said("list", "--json")
    assert [(row["experiment"], row["state"], row["decision"], row["serves"], row["users"]) for row in rows] == [
        ("is decided", DECIDED, "rollback", "control", 150),
        ("goes on", RUNNING, "keep", None, 150),
        ("waits", CREATED, None, None, 0),
    ]
    table = said("list")
    for words in ("goes on", "is decided", "rollback", "split", "150"):
        assert words in table


def test_status_says_where_it_stands_and_what_it_waits_for(said: Said, store: Store) -> None:
    opened = declared(store, rollout=ROLLOUT)
    feed(opened, 5, SAME)
    text = said("status", "e")
    for words in ("running", "10 %", "Next stage: 50 %, once each candidate has 2 users", "given as"):
        assert words in text
    found = said("status", "e", "--json")
    assert (found["state"], found["stage"], found["decision"], sum(found["users"].values())) == (
        RUNNING, "10 %", "keep", 5,
    )  # fmt: skip
    assert found["variants"] == {"control": "A", "new": "B"}
    assert found["candidates"]["new"]["metrics"][0]["metric"] == "ok"


def test_status_of_a_shadow_stage_says_how_many_calls_it_waits_for(said: Said, store: Store) -> None:
    declared(store, rollout=Rollout(stages=("shadow", 0.5), shadow_calls=40, shadow_usd=2.0).model_dump(mode="json"))
    text = said("status", "e")
    for words in ("50 %, once each candidate has answered 40 calls unseen (now new 0)", "0 of 40", "0.0000 of 2 USD"):
        assert words in text
    found = said("status", "e", "--json")["unseen"]
    assert (found["pairs"], found["needed"], found["cap_usd"], found["spent"]) == ({"new": 0}, 40, 2.0, False)


def test_a_look_takes_in_decides_and_acts(said: Said, store: Store) -> None:
    """As a cron job does it."""
    opened = declared(store, rollout=ROLLOUT)
    feed(opened, 60, SAME)
    assert "stage 50 %" in said("step", "e")
    feed(opened, 300, WORSE, begin=60)
    found = said("step", "e", "--json")
    assert (found["state"], found["serves"], found["looked"]) == (DECIDED, "control", True)
    assert [line["what"] for line in found["audit"]] == ["stage", "rollback"]
    assert found["hurt"] == found["users"]["new"] > 0
    text = said("step", "e")
    assert "decided (rollback by controller)" in text
    assert "everybody gets control" in text
    assert len(audit(opened)) == 2


def test_a_look_decides_also_while_mlflow_is_down(said: Said, store: Store, caplog: pytest.LogCaptureFixture) -> None:
    """Users get control at once; the alias follows with a later look."""
    opened = declared(
        store, variants={"control": "it@production", "new": "it@canary"}, registry=f"http://127.0.0.1:{free_port()}",
        pinned={"control": "it/1", "new": "it/2"},
    )  # fmt: skip
    feed(opened, 200, WORSE)
    found = said("step", "e", "--json")
    assert (found["state"], found["serves"]) == (DECIDED, "control")
    assert "are moved when MLflow is back" in caplog.text
    assert audit(opened) == [("rollback", "controller")], "no alias yet"


def test_a_look_beside_another_controller_says_so(said: Said, store: Store) -> None:
    declared(store)
    store.trials.lease("experiment/e", "another", 60.0)
    assert "Another controller is looking at e" in said("step", "e")
    assert said("step", "e", "--json")["looked"] is False


def test_it_is_started_paused_resumed_and_stopped(said: Said, store: Store) -> None:
    """Each with who and why in the audit; doing it again changes nothing."""
    opened = declared(store, state=None)
    for what, state in (("start", RUNNING), ("pause", PAUSED), ("resume", RUNNING), ("stop", STOPPED)):
        assert said(what, "e", "--reason", f"to {what}", "--json") == {
            "experiment": "e", "state": state, "changed": True
        }  # fmt: skip
        assert f"is {state} already" in said(what, "e")
        line = opened.trials.decisions("e")[-1]
        assert (line.what, json.loads(line.evidence)) == (what, {"reason": f"to {what}"})
        assert "@" in line.by, "user@machine"
    assert len(audit(opened)) == 4
    for what in ("start", "pause", "resume"):
        assert f"is stopped; there is nothing to {what}" in said(what, "e", code=2)


def test_by_hand_only_what_the_evidence_says_is_promoted(said: Said, store: Store) -> None:
    opened = declared(store)
    feed(opened, 10, SAME)
    error = said("promote", "e", code=3)
    assert "not proven better" in error
    assert "--force" in error
    assert "--variant and --reason" in said("promote", "e", "--force", code=2)
    assert "no candidate" in said("promote", "e", "--variant", "nobody", code=2)
    feed(opened, 200, BETTER, begin=10)
    found = said("promote", "e", "--json")
    assert (found["state"], found["serves"]) == (DECIDED, "new")
    assert "everybody gets new" in said("promote", "e", "--variant", "new")
    assert [what for what, _ in audit(opened)] == ["promote"]


def test_a_person_may_overrule_what_is_not_proven(said: Said, store: Store) -> None:
    opened = declared(store)
    feed(opened, 10, SAME)
    why = ("--variant", "new", "--force", "--reason", "the contract says so")
    assert said("promote", "e", *why, "--json")["serves"] == "new"
    line = opened.trials.decisions("e")[-1]
    assert (json.loads(line.evidence)["reason"], json.loads(line.evidence)["forced"]) == ("the contract says so", True)


def test_nobody_overrules_what_is_proven_worse(said: Said, store: Store) -> None:
    feed(declared(store), 200, WORSE)
    assert "worse" in said("promote", "e", "--variant", "new", "--force", "--reason", "all the same", code=1)
    assert said("promote", "e", code=1)


def test_the_report_is_a_page(said: Said, store: Store, tmp_path: Path) -> None:
    opened = declared(store, "a/b <c>")
    feed(opened, 150, WORSE)
    assert said("report", "a/b <c>", "--json")["file"] == ".dspy_prod/experiments/a-b-c.html"
    page = tmp_path / ".dspy_prod" / "experiments" / "a-b-c.html"
    text = page.read_text()
    assert text.startswith("<!doctype html>")
    assert "<c>" not in text
    assert "a/b &lt;c&gt;" in text
    assert "Report: elsewhere.html" in said("report", "a/b <c>", "--out", "elsewhere.html")
    assert (tmp_path / "elsewhere.html").exists()
    assert "--out" in said("report", "a/b <c>", "--out", f"{page}/below.html", code=2)


def test_the_plan_says_what_it_takes(said: Said, store: Store) -> None:
    """Also before it has begun."""
    declared(store, state=None)
    found = said("plan", "e", "--users-per-day", "800", "--baseline", "ok=0.8", "--json")
    assert found["slowest"]["metric"] == "ok"
    quicker = said("plan", "e", "--users-per-day", "800", "--baseline", "ok=0.8,0.2", "--effect", "ok=0.1", "--json")
    assert quicker["needs"][0]["units"] < found["needs"][0]["units"]
    assert "the slowest" in said("plan", "e", "--users-per-day", "800")
    for option, words in (("--baseline=ok", "is no number"), ("--baseline=no=0.1", "no metric"),
                          ("--effect=ok=1,2", "is no number"), ("--power=2", "power")):  # fmt: skip
        assert words in said("plan", "e", "--users-per-day", "800", option, code=2)
    assert "must be over 0" in said("plan", "e", "--users-per-day", "0", code=2)


def test_what_is_removed_is_gone(said: Said, store: Store) -> None:
    declared(store)
    assert "stop it first" in said("rm", "e", code=2)
    assert store.trials.trial("e") is not None
    assert said("rm", "e", "--force", "--json") == {"experiment": "e", "removed": True}
    assert store.trials.trials() == []
    assert "only none yet" in said("rm", "e", code=2)


def test_one_that_cannot_be_read_is_listed_and_can_be_removed(said: Said, store: Store) -> None:
    declared(store, "good")
    store.trials.create("bad", '{"of": "another release"}', {None: 0.0})
    assert {row["experiment"]: row["state"] for row in said("list", "--json")} == {"good": RUNNING, "bad": "damaged"}
    assert "damaged" in said("list")
    assert "experiment rm bad --force" in said("status", "bad", code=2)
    said("rm", "bad", "--force")
    assert [each.name for each in store.trials.trials()] == ["good"]


def test_run_looks_until_it_is_over_and_tells_what_changes(said: Said, store: Store) -> None:
    feed(declared(store), 200, WORSE)
    text = said("run", "e", "--every", "0.1")
    assert text.count("e: decided (rollback by controller)") == 1
    assert "it is over" in text
    assert "every=0.01" in said("run", "e", "--every", "0.01", code=2)


def test_run_ends_when_it_is_removed(said: Said, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = declared(store)
    look = attending.Looks.look

    def last(self: attending.Looks) -> bool:
        over = look(self)
        if store.trials.trial("e") is not None:
            store.trials.remove("e")
        return over

    monkeypatch.setattr(attending.Looks, "look", last)
    assert "it is over" in said("run", "e", "--every", "0.1")
    assert opened.trials.trial("e") is None


NAMES = ["two words", "[bold red]x[/]", "new\nline", "\x1b[31mred", "ü|%;'\"", " ", "list", "x" * 300, "-x", "a\ud800"]


@pytest.mark.parametrize("name", NAMES)
def test_every_name_can_be_shown_and_removed(name: str, said: Said, store: Store) -> None:
    declared(store, name)
    declared(store, "another")
    given = ("--json", "--", name)
    kept = said("list", "--json")[-1]["experiment"]
    for action in ("status", "step"):
        assert said(action, *given)["name"] == kept
        assert "\x1b" not in said(action, "--", name)
    assert said("stop", *given)["state"] == STOPPED
    said("rm", *given)
    assert [each.name for each in store.trials.trials()] == ["another"]
    assert "\x1b" not in said("list")


@pytest.mark.parametrize(
    "action", ["status", "report", "step", "run", "promote", "start", "pause", "resume", "stop", "rm"]
)
def test_one_that_there_is_not_is_told_with_those_there_are(action: str, said: Said, store: Store) -> None:
    for number in range(12):
        declared(store, f"e{number:02}")
    error = said(action, "nobody", code=2)
    assert "there is no experiment 'nobody'" in error
    assert "'e09' and 2 more" in error


def test_no_store_is_made_by_looking(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["experiment", "list", "--store", f"sqlite:///{tmp_path}/none.db"]) == 2
    assert "no store at" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())

"""Aliases move by compare-and-set; every move is on record, and a rollback is one idempotent call."""

from __future__ import annotations

import json
import threading
import time
from typing import Any

import dspy
import pytest
from mlflow import MlflowClient

import dspy_prod
from dspy_prod import ConfigError, registry
from dspy_prod.registry.aliases import journal, projection
from dspy_prod.registry.server import server_at
from tests.registry.processes import MlflowServer, Other, wait_until
from tests.registry.programs import qa


def publish(count: int, name: str = "it", tracking_uri: str | None = None) -> None:
    """Some versions that differ."""
    for number in range(count):
        program = qa()
        program.demos = program.demos[:1] * number
        registry.publish(program, name, metrics={"accuracy": number / 10}, tracking_uri=tracking_uri)


def aliases(client: MlflowClient, name: str = "it") -> dict[str, int]:
    """The aliases as MLflow has them."""
    found = {}
    for version in client.search_prompt_versions(name):
        for alias in client.get_prompt_version(name, version.version).aliases:
            found[alias] = version.version
    return found


def moves(name: str = "it") -> list[tuple[str, str, int | None, int | None]]:
    """The history, oldest first."""
    return [(e.action, e.outcome, e.from_version, e.to_version) for e in reversed(registry.history(name))]


def test_a_promotion_moves_the_alias_and_is_on_record(store: str, client: MlflowClient) -> None:
    """Who, when, why, from, to, and the metrics as evidence."""
    publish(2)
    first = registry.promote("it", 1, reason="the first", by="ada")
    assert (first.moved, first.from_version, first.to_version) == (True, None, 1)
    second = registry.promote("it", registry.versions("it")[0])
    assert second.from_version == 1
    assert aliases(client) == {"production": 2, "previous": 1}
    newest, oldest = registry.history("it")
    assert (oldest.by, oldest.reason, oldest.evidence["metrics"]) == ("ada", "the first", {"accuracy": 0.0})
    assert (newest.id, newest.evidence["metrics"]) == (second.id, {"accuracy": 0.1})
    assert newest.at >= oldest.at
    assert "production: 1 -> 2 (promote)" in str(newest)
    assert json.loads(json.dumps(newest.to_dict()))["to_version"] == 2
    assert len(registry.load("it@production", dspy.Predict("question, context: list[str] -> answer")).demos) == 1


def test_other_aliases_move_apart_from_production(store: str, client: MlflowClient) -> None:
    """`staging` and `canary` have a history of their own and leave `previous` alone."""
    publish(3)
    for version, alias in ((1, "production"), (2, "canary"), (3, "canary"), (3, "staging")):
        registry.promote("it", version, alias=alias)
    assert aliases(client) == {"production": 1, "canary": 3, "staging": 3}
    registry.promote("it", "it@canary")
    assert aliases(client) == {"production": 3, "previous": 1, "canary": 3, "staging": 3}
    assert registry.rollback("it", alias="canary").to_version == 2
    assert [entry.alias for entry in registry.history("it", alias="canary")] == ["canary"] * 3
    assert [(v.version, v.aliases) for v in registry.versions("it")] == [
        (3, ("production", "staging")), (2, ("canary",)), (1, ("previous",)),
    ]  # fmt: skip


def test_promoting_to_the_version_it_has_does_nothing_and_says_so(store: str) -> None:
    """No entry is written for it."""
    publish(1)
    registry.promote("it", 1)
    again = registry.promote("it", 1)
    assert (again.outcome, again.moved, again.number) == ("unchanged", False, None)
    assert "nothing to do" in str(again)
    assert len(registry.history("it")) == 1


def test_an_alias_that_is_not_what_was_expected_is_not_moved(store: str, client: MlflowClient) -> None:
    """The error tells what was expected and what is; `expected=0` means that it must not exist."""
    publish(3)
    registry.promote("it", 1, expected=0)
    registry.promote("it", 2, expected=1)
    for expected in (1, 0):
        with pytest.raises(registry.PromotionConflictError, match="has version 2") as caught:
            registry.promote("it", 3, expected=expected)
        assert (caught.value.alias, caught.value.expected, caught.value.actual) == ("production", expected, 2)
    assert aliases(client) == {"production": 2, "previous": 1}


def test_a_rollback_is_idempotent(store: str, client: MlflowClient) -> None:
    """It takes the last promotion back once; further calls do nothing, until there is another promotion."""
    publish(4)
    for version in (1, 2, 3):
        registry.promote("it", version)
    assert registry.rollback("it", reason="it lies").to_version == 2
    for _ in range(2):
        assert registry.rollback("it").outcome == "unchanged"
        assert registry.rollback("it", expected=3).outcome == "unchanged"
    assert aliases(client) == {"production": 2, "previous": 1}
    registry.promote("it", 4)
    assert aliases(client) == {"production": 4, "previous": 2}
    assert registry.rollback("it", expected=4).to_version == 2
    assert registry.rollback("it", to=1).to_version == 1
    assert registry.rollback("it", to=1).outcome == "unchanged"
    assert aliases(client) == {"production": 1}
    with pytest.raises(registry.PromotionConflictError):
        registry.rollback("it", expected=3)


def test_a_rollback_without_anything_to_go_back_to_says_what_to_do(store: str) -> None:
    """Neither an alias that never moved nor one with a single version can be rolled back."""
    publish(1)
    with pytest.raises(registry.RegistryError, match="ever promoted"):
        registry.rollback("it")
    registry.promote("it", 1)
    with pytest.raises(registry.RegistryError, match="no other version than 1"):
        registry.rollback("it")


def test_a_fresh_process_rolls_back(store: str, others: tuple[Other, Other], client: MlflowClient) -> None:
    """What the alias had before is on the server."""
    publish(2)
    registry.promote("it", 1)
    registry.promote("it", 2)
    code = "import sys, dspy_prod; print(dspy_prod.registry.rollback('it', tracking_uri=sys.argv[1]).to_version)"
    assert others[0].run(code, store) == ["1"]
    assert aliases(client) == {"production": 1}


RACE = """
import sys, time, dspy_prod
from dspy_prod.registry import PromotionConflictError, promote
uri, version, start = sys.argv[1:]
dspy_prod.registry.versions("it", tracking_uri=uri)
while time.time() < float(start):
    pass
for round in range(1, 6):
    try:
        promote("it", int(version), alias=f"r{round}", expected=0, tracking_uri=uri)
        print("won", flush=True)
    except PromotionConflictError as error:
        print("lost", error.actual, flush=True)
"""


@pytest.mark.parametrize("over", ["sqlite", "http"])
def test_of_two_racing_processes_exactly_one_wins(
    over: str, others: tuple[Other, Other], request: pytest.FixtureRequest
) -> None:
    """Both expect the same version and promote different ones: one wins, the other is told who did."""
    if over == "http":
        running: MlflowServer = request.getfixturevalue("server")
        uri, database = running.uri, running.database
    else:
        uri = request.getfixturevalue("store")
        database = request.getfixturevalue("database")
    publish(2, tracking_uri=uri)
    for other in others:
        assert other.run("import dspy_prod.registry.aliases.promotion, dspy, mlflow") == []
    for version, other in enumerate(others, 1):
        other.begin(RACE, uri, str(version), str(time.time() + 0.5))
    said = [other.said() for other in others]
    assert [len(lines) for lines in said] == [5, 5]
    has = aliases(MlflowClient(tracking_uri=f"sqlite:///{database}", registry_uri=f"sqlite:///{database}"))
    for number in range(5):
        words = [said[0][number], said[1][number]]
        winner = words.index("won")
        assert words[1 - winner] == f"lost {winner + 1}"
        assert has[f"r{number + 1}"] == winner + 1
    applied = [entry for entry in registry.history("it", tracking_uri=uri) if entry.moved]
    assert sorted(entry.alias for entry in applied) == ["r1", "r2", "r3", "r4", "r5"]


def test_many_threads_leave_the_alias_where_the_journal_ends(store: str, client: MlflowClient) -> None:
    """Unconditional promotions all succeed, and the last one in the journal is what MLflow shows."""
    publish(4)
    failures: list[BaseException] = []

    def work(version: int) -> None:
        try:
            for _ in range(3):
                registry.promote("it", version)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(version,)) for version in (1, 2, 3, 4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(100)
    assert failures == []
    last = next(entry for entry in registry.history("it") if entry.moved)
    assert aliases(client)["production"] == last.to_version


def test_a_promotion_that_was_broken_off_is_finished_by_the_next(
    store: str, client: MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A promoter that dies after its entry and before the alias has promoted: whoever comes next moves the alias."""
    publish(3)
    registry.promote("it", 1)

    def die(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("dspy_prod.registry.aliases.promotion.project", die)
    with pytest.raises(KeyboardInterrupt):
        registry.promote("it", 2)
    monkeypatch.undo()
    assert aliases(client)["production"] == 1
    with pytest.raises(registry.PromotionConflictError, match="has version 2"):
        registry.promote("it", 3, expected=1, tracking_uri=store)
    assert aliases(client) == {"production": 2, "previous": 1}


def test_a_promotion_that_was_broken_off_at_the_very_end_is_finished_too(
    store: str, client: MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`production` has moved and `previous` has not: the next one moves it, and respects a later move by hand."""
    publish(3)
    registry.promote("it", 1)
    registry.promote("it", 2)
    point = projection._point

    def die_at_previous(server: Any, name: str, alias: str, version: int | None) -> None:
        if alias == "previous":
            raise KeyboardInterrupt
        point(server, name, alias, version)

    monkeypatch.setattr(projection, "_point", die_at_previous)
    with pytest.raises(KeyboardInterrupt):
        registry.promote("it", 3)
    monkeypatch.undo()
    assert aliases(client) == {"production": 3, "previous": 1}
    assert registry.promote("it", 3, tracking_uri=store).outcome == "unchanged"
    assert aliases(client) == {"production": 3, "previous": 2}
    client.set_prompt_alias("it", "production", 1)
    assert registry.promote("it", 1, tracking_uri=store).outcome == "unchanged"
    assert aliases(client)["production"] == 1


def test_a_move_in_mlflow_itself_is_respected_and_noted(store: str, client: MlflowClient) -> None:
    """Somebody who moves the alias in MLflow's UI has moved it; the journal says so at the next occasion."""
    publish(3)
    registry.promote("it", 1)
    client.set_prompt_alias("it", "production", 2)
    assert registry.promote("it", 3, expected=2).from_version == 2
    assert moves() == [
        ("promote", "applied", None, 1), ("moved", "applied", 1, 2), ("promote", "applied", 2, 3),
    ]  # fmt: skip
    assert registry.rollback("it").to_version == 2
    client.delete_prompt_alias("it", "production")
    assert registry.promote("it", 1, expected=0).from_version is None


def test_a_request_that_was_sent_twice_counts_once(store: str) -> None:
    """HTTP clients repeat requests whose answer was lost."""
    publish(2)
    server = server_at()
    log = journal.Journal(server, "it")
    request = journal.Request("promote", "production", 1, 0, "ada")
    assert log.append(request)[0].outcome == "applied"
    entry, replay = log.append(request)
    assert (entry.outcome, len(replay.entries)) == ("applied", 1)


def test_arguments_that_make_no_sense_are_refused(store: str) -> None:
    """The error names the argument and what is possible."""
    publish(1)
    registry.publish(qa(), "other")
    for alias in ("", "a b", "latest", "v3", "3"):
        with pytest.raises(ConfigError, match="use 'production'"):
            registry.promote("it", 1, alias=alias)
    with pytest.raises(ConfigError, match="by itself"):
        registry.promote("it", 1, alias="previous")
    with pytest.raises(ConfigError, match="not of 'it'"):
        registry.promote("it", registry.versions("other")[0])
    with pytest.raises(ConfigError, match="reason"):
        registry.promote("it", 1, force=True)
    with pytest.raises(registry.UnknownVersionError):
        registry.promote("it", 7)
    with pytest.raises(registry.UnknownVersionError):
        registry.history("nobody")
    with pytest.raises(registry.UnknownVersionError):
        registry.versions("nobody")
    assert registry.programs() == ["it", "other"]
    assert registry.history("it") == []


def test_a_promotion_is_an_event(store: str, events: list[dspy_prod.Event]) -> None:
    """Listeners hear of moves, and of nothing else."""
    publish(1)
    registry.promote("it", 1)
    registry.promote("it", 1)
    assert [(event.name, event.data["to_version"]) for event in events] == [("promotion", 1)]


def test_an_alias_being_moved_by_another_promoter_is_no_move_by_hand(
    store: str, client: MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A difference that goes away within moments is not noted as a move in MLflow."""
    publish(2)
    registry.promote("it", 1)
    client.set_prompt_alias("it", "production", 2)
    monkeypatch.setattr(projection.time, "sleep", lambda _: client.set_prompt_alias("it", "production", 1))
    assert registry.promote("it", 2).from_version == 1
    assert [action for action, *_ in moves()] == ["promote", "promote"]
    assert wait_until(lambda: aliases(client)["production"] == 2)

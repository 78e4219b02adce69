"""What stands in MLflow may be written by others: it is refused by name, and what was good goes on."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from mlflow import MlflowClient

import dspy_prod
from dspy_prod import Production, registry
from tests.registry.processes import forget, wait_until
from tests.registry.programs import nested, qa
from tests.registry.published.test_follow import following, publish, runs

__all__ = ["following"]

MANIFEST, STATE, ENTRY, METRICS = "dspy_prod_manifest", "dspy_prod_state_0", "dspy_prod_entry", "dspy_prod_metrics"
Change = Callable[[dict[str, Any]], Any]


def changed(client: MlflowClient, name: str, version: str, tag: str, change: Change) -> None:
    """Somebody edits the JSON of a tag."""
    found = json.loads(client.get_prompt_version(name, version).tags[tag])
    client.set_prompt_version_tag(name, version, tag, json.dumps(change(found) or found))


DAMAGES: dict[str, Change] = {
    **{f"no {key}": lambda found, key=key: found.pop(key) and None for key in ("format", "predictors", "digest")},
    "a list": lambda found: [1],
    "no object": lambda found: "text",
    "format of a wrong type": lambda found: found.update(format="1"),
    "newer": lambda found: found.update(format=2),
    "predictors of a wrong type": lambda found: found.update(predictors={"a": 1}),
    "settings of a wrong type": lambda found: found.update(settings=[1]),
    "a predictor without fields": lambda found: found["predictors"][0].pop("fields") and None,
    "a predictor of a wrong type": lambda found: found["predictors"].append("x"),
    "a field of a wrong type": lambda found: found["predictors"][0].update(fields=[[1, 2]]),
    "a digest of a wrong type": lambda found: found["predictors"][0].update(sha256=7),
    "another program's prompt": lambda found: found["predictors"][0].update(prompt="other.sort"),
    "no prompt's version": lambda found: found["predictors"][0].update(version=None),
    "a version that does not exist": lambda found: found["predictors"][0].update(version=99),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_manifest_that_was_tampered_with_is_refused_by_name(store: str, client: MlflowClient, damage: str) -> None:
    """`load` raised a bare KeyError or TypeError, which did not say of what."""
    registry.publish(nested(), "it")
    changed(client, "it", "1", MANIFEST, DAMAGES[damage])
    with pytest.raises(registry.RegistryError, match="it/1"):
        registry.load("it/1", nested())
    if damage != "a version that does not exist":  # which only `load` asks for
        with pytest.raises(registry.RegistryError, match="it/1"):
            registry.promote("it", 1)


@pytest.mark.parametrize("text", ["", "{", "null", "NaN", None], ids=repr)
def test_a_manifest_that_is_no_json_is_refused_by_name(store: str, client: MlflowClient, text: str | None) -> None:
    registry.publish(qa(), "it")
    if text is None:
        client.delete_prompt_version_tag("it", "1", MANIFEST)
    else:
        client.set_prompt_version_tag("it", "1", MANIFEST, text)
    with pytest.raises(registry.RegistryError, match="the manifest of it/1 was changed in MLflow"):
        registry.load("it/1", qa())


@pytest.mark.parametrize("state", ["{}", "[]", "no json", '{"typed_demos": false, "demos": [1], "lm": null}'])
def test_a_state_that_a_forger_vouched_for_is_refused_by_name(store: str, client: MlflowClient, state: str) -> None:
    """The digest was made to fit; the program stays as it was."""
    registry.publish(qa(), "it")
    digest = registry.published.manifest.sha256(state)
    client.set_prompt_version_tag("it", "1", STATE, state)
    changed(client, "it", "1", MANIFEST, lambda found: found["predictors"][0].update(sha256=digest))
    program = qa()
    before = program.dump_state()
    with pytest.raises(registry.RegistryError, match="predictor 'self' of it/1"):
        registry.load("it/1", program)
    assert program.dump_state() == before


@pytest.mark.parametrize("metrics", ["{", "[]", '{"accuracy": "high"}'])
def test_a_damaged_version_does_not_hide_the_others(
    store: str, client: MlflowClient, caplog: pytest.LogCaptureFixture, metrics: str
) -> None:
    """One version with metrics of its own kind made the list of all versions a traceback."""
    registry.publish(qa(), "it")
    registry.publish(qa(), "it", force=True)
    client.set_prompt_version_tag("it", "1", METRICS, metrics)
    assert [version.version for version in registry.versions("it")] == [2]
    assert "it/1" in caplog.text
    with pytest.raises(registry.RegistryError, match="it/1"):
        registry.promote("it", 1)


@pytest.mark.parametrize(
    "change",
    [
        lambda found: found.pop("alias") and None,
        lambda found: found.update(action="steal"),
        lambda found: found.update(version="2"),
        lambda found: found.update(evidence=[]),
        lambda found: [1],
    ],
)
def test_a_journal_that_was_tampered_with_is_refused_by_name(store: str, client: MlflowClient, change: Change) -> None:
    """A history that cannot be read decides nothing; the message names the entry."""
    registry.publish(qa(), "it")
    registry.promote("it", 1)
    changed(client, "it.audit-log", "1", ENTRY, change)
    for ask in (lambda: registry.history("it"), lambda: registry.promote("it", 1), lambda: registry.rollback("it")):
        with pytest.raises(registry.RegistryError, match=r"entry 1 of the journal it\.audit-log"):
            ask()
    client.delete_prompt_version_tag("it.audit-log", "1", ENTRY)
    assert registry.promote("it", 1).to_version == 1


def test_who_follows_goes_on_with_the_last_good_copy(
    following: Callable[..., Production], client: MlflowClient, events: list[dspy_prod.Event]
) -> None:
    """The follower's thread logged a traceback with each look."""
    publish(1)
    prod = following()
    assert runs(prod) == "11"
    publish(2, alias=False)
    changed(client, "pair", "2", MANIFEST, lambda found: found.pop("predictors") and None)
    client.set_prompt_alias("pair", "production", 2)

    def told() -> list[dspy_prod.Event]:
        return [event for event in events if event.name == "follow_failed"]

    wait_until(lambda: bool(told()))
    for _ in range(3):
        prod._follower.look()
    assert runs(prod) == "11"
    [event] = told()
    assert "pair/2" in event.data["error"]
    assert event.data["version"] == "pair/1"


def test_who_starts_while_it_is_damaged_begins_with_the_last_good_copy(
    following: Callable[..., Production], client: MlflowClient, events: list[dspy_prod.Event]
) -> None:
    """A restarted process ran the prompts from the code, though it had good ones on disk."""
    publish(1)
    following().close()
    forget()
    client.set_prompt_version_tag("pair", "1", MANIFEST, "{}")
    assert runs(following()) == "11"
    [event] = [event for event in events if event.name == "follow_failed"]
    assert "pair/1" in event.data["error"]
    assert event.data["version"] == "pair/1"

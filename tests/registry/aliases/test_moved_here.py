"""What this process moved it sees at once, however fresh its copies are."""

from __future__ import annotations

from typing import Any

import pytest
from mlflow import MlflowClient

from dspy_prod import registry
from dspy_prod.context.current import mark_of
from tests.registry.aliases.test_promotion import publish
from tests.registry.programs import qa


def loaded(alias: str = "production", **more: Any) -> str | None:
    """The version that an alias gives."""
    return mark_of(registry.load(f"it@{alias}", qa(), **more))


def test_a_rollback_holds_for_the_next_load(store: str) -> None:
    """The version that had been rolled back was loaded for up to a minute, and `previous` lagged as long."""
    publish(3)
    for version in (1, 2):
        registry.promote("it", version)
        assert loaded() == f"it/{version}"
    assert loaded("previous") == "it/1"
    registry.promote("it", 3)
    assert (loaded(), loaded("previous")) == ("it/3", "it/2")
    registry.rollback("it")
    assert (loaded(), loaded("previous")) == ("it/2", "it/1")
    registry.rollback("it", to=1)
    assert loaded() == "it/1"


def test_it_holds_for_every_way_to_write_the_reference_or_the_store(store: str) -> None:
    """`prompts:/` references and a store that is named in the call see the move too."""
    publish(2)
    registry.promote("it", 1)
    assert loaded() == loaded(tracking_uri=store) == "it/1"
    registry.promote("it", 2, tracking_uri=store.replace("sqlite:///", "sqlite:////"))
    assert loaded() == loaded(tracking_uri=store) == "it/2"
    assert mark_of(registry.load("prompts:/it@production", qa())) == "it/2"


def test_a_load_that_was_under_way_leaves_no_old_copy(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked before the move and answered after it, it is right once, and not for a minute more."""
    publish(2)
    registry.promote("it", 1)
    ask = MlflowClient.get_prompt_version_by_alias

    def slow(client: Any, name: str, alias: str) -> Any:
        found = ask(client, name, alias)
        monkeypatch.setattr(MlflowClient, "get_prompt_version_by_alias", ask)
        registry.promote("it", 2)
        return found

    monkeypatch.setattr(MlflowClient, "get_prompt_version_by_alias", slow)
    assert loaded() == "it/1"
    assert loaded() == "it/2"


def test_a_copy_of_another_alias_stays_fresh(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what was moved is asked for again."""
    publish(2)
    registry.promote("it", 1, alias="staging")
    assert loaded("staging") == "it/1"
    registry.promote("it", 2)
    monkeypatch.setattr(MlflowClient, "get_prompt_version_by_alias", None)
    assert loaded("staging") == "it/1"


def test_a_move_whose_end_is_unknown_is_looked_up(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """MLflow moved the alias and its answer was lost: the next load asks."""
    publish(2)
    registry.promote("it", 1)
    assert loaded() == "it/1"
    put = MlflowClient.set_prompt_alias

    def lost(client: Any, *given: Any) -> None:
        put(client, *given)
        raise OSError("no answer")

    monkeypatch.setattr(MlflowClient, "set_prompt_alias", lost)
    with pytest.raises(registry.RegistryUnavailableError):
        registry.promote("it", 2)
    assert loaded() == "it/2"

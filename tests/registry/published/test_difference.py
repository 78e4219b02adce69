"""`diff` tells what changed between two versions, for people and programs."""

from __future__ import annotations

import io

import dspy
import pytest
from mlflow import MlflowClient
from rich.console import Console

from dspy_prod import registry
from tests.registry.programs import Nested, nested


def test_each_predictor_shows_its_own_changes(store: str) -> None:
    """Instructions, field descriptions, demos and settings are compared apart, and printed as a unified diff."""
    program = nested()
    registry.publish(program, "it")
    step, sort, look = program.steps[0], program.sort, program.inner.look
    step.signature = step.signature.with_instructions("First {step}.\nThen rest.").with_updated_fields("b", desc="B")
    step.demos[0]["b"] = "{{3}}"
    sort.config = {"temperature": 0.7}
    look.demos = look.demos[:1]
    registry.publish(program, "it")
    registry.promote("it", 2)
    found = registry.diff("it", 1, "production")
    assert (found.name, found.old, found.new, found.changed, bool(found)) == ("it", 1, 2, True, True)
    by_name = {predictor.name: predictor for predictor in found.predictors}
    assert {name for name, predictor in by_name.items() if predictor.status != "equal"} == {
        "steps[0]", "sort", "inner.look",
    }  # fmt: skip
    assert "+Then rest.\n" in by_name["steps[0]"].instructions
    assert "+output b: str, described as 'B'" in by_name["steps[0]"].fields
    assert "-1. b: {{2}}\n+1. b: {{3}}\n" in by_name["steps[0]"].demos
    assert by_name["steps[0]"].settings == ""
    assert "+config.temperature = 0.7" in by_name["sort"].settings
    assert "-2. answer: Nothing." in by_name["inner.look"].demos
    assert str(found).startswith("--- it/1 sort settings\n+++ it/2 sort settings\n@@")


def test_versions_that_are_equal_have_no_difference(store: str) -> None:
    """Nothing is printed."""
    registry.publish(nested(), "it")
    found = registry.diff("it", 1, 1)
    assert not found
    assert str(found) == ""


def test_predictors_come_and_go(store: str) -> None:
    """A program that grew shows what is new; aliases and versions may be given."""
    first = registry.publish(dspy.Predict("a -> b"), "it")
    second = registry.publish(nested(), "it")
    statuses = {predictor.name: predictor.status for predictor in registry.diff("it", first, second).predictors}
    assert statuses.pop("self") == "removed"
    assert set(statuses.values()) == {"added"}
    assert list(statuses) == [name for name, _ in Nested().named_predictors()]
    with pytest.raises(registry.UnknownVersionError):
        registry.diff("it", 1, 3)


def test_it_is_rendered_in_colour(store: str) -> None:
    """Rich shows additions in green, and takes brackets in prompts for text."""
    registry.publish(
        dspy.Predict(
            "a -> b",
        ),
        "it",
    )
    registry.publish(dspy.Predict(dspy.Signature("a -> b", "[red]not markup[/red]")), "it")
    out = io.StringIO()
    Console(file=out, force_terminal=True, width=120, color_system="standard").print(registry.diff("it", 1, 2))
    assert "[red]not markup[/red]" in out.getvalue()
    assert "\x1b[32m" in out.getvalue()


def test_an_alias_is_not_compared_by_an_outdated_copy(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy of an earlier load is for calls that must go on, not for those who decide."""
    registry.publish(nested(), "it")
    registry.promote("it", 1)
    registry.load("it@production", Nested())

    def down(self: object, name: str, alias: str) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(MlflowClient, "get_prompt_version_by_alias", down)
    with pytest.raises(registry.RegistryUnavailableError, match="no route"):
        registry.diff("it", 1, "production")

"""The catalogue of events names what the package tells, no more and no less."""

from __future__ import annotations

import ast
import inspect
import logging
from collections import defaultdict
from functools import cache
from pathlib import Path

import pytest

import dspy_prod
from dspy_prod.context.current import CallContext
from dspy_prod.pipeline.call import Call
from dspy_prod.policies.breaker.transitions import EVENTS as OF_STATES
from dspy_prod.telemetry.events import EVENTS, Event
from dspy_prod.telemetry.logs import _DETAILS, LEVELS
from tests.parsing import parsed

CALL_FIELDS = {"call_id", *CallContext().told()}
"""What `Call.emit` adds to each event of a call."""

TELLS = {"emit": 0, "emit_content": 0, "_report": 0, "tell_later": 0, "_troubled": 0}
"""Methods that tell an event, with the position of its name."""

ADDED = {
    "tell_later": {"path"},
    "_troubled": {"program", "reference", "version", "error"},
}
"""What those add that only pass an event on."""

OWN = {"same"}
"""Arguments of theirs that are no details."""


def names_in(node: ast.expr) -> list[str]:
    """The event's name, or both names of a conditional expression; none when it is passed on."""
    if isinstance(node, ast.IfExp):
        return names_in(node.body) + names_in(node.orelse)
    return [node.value] if isinstance(node, ast.Constant) and isinstance(node.value, str) else []


@cache
def emitted() -> dict[str, set[str]]:
    """Every event told in the package's source, with the details it is told with."""
    found: dict[str, set[str]] = defaultdict(set)
    for file in Path(dspy_prod.__file__).parent.rglob("*.py"):
        text = file.read_text("utf-8")
        if not any(f".{how}(" in text for how in TELLS):
            continue
        tree = parsed(text)
        for function in ast.walk(tree):
            if not isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef)):
                continue
            dicts = {
                target.id: node.value
                for node in ast.walk(function)
                if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict)
                for target in node.targets
                if isinstance(target, ast.Name)
            }
            for node in ast.walk(function):
                if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute) or not node.args:
                    continue
                how = node.func.attr
                if how not in TELLS:
                    continue
                owner = ast.unparse(node.func.value)
                fields = {word.arg for word in node.keywords if word.arg} - OWN | ADDED.get(how, set())
                if how == "emit" and owner.rpartition(".")[2] in ("call", "self"):
                    fields |= CALL_FIELDS
                if any(word.arg is None and ast.unparse(word.value).endswith(".told()") for word in node.keywords):
                    fields |= set(CallContext().told())
                for details in node.args[1:]:
                    details = dicts.get(details.id, details) if isinstance(details, ast.Name) else details
                    if isinstance(details, ast.Dict):
                        fields |= {key.value for key in details.keys if isinstance(key, ast.Constant)}
                for name in names_in(node.args[TELLS[how]]):
                    found[name] |= fields
    for name in OF_STATES.values():
        found[name] = {"route", "cause", "retry_after", "generation"}
    return found


def test_every_event_that_is_told_is_in_the_catalogue_and_the_other_way_round() -> None:
    """A promotion was logged as a warning, because one of three lists of events had forgotten it."""
    assert sorted(emitted()) == sorted(EVENTS)


@pytest.mark.parametrize("name", sorted(EVENTS))
def test_the_catalogue_knows_each_detail_of_an_event(name: str) -> None:
    """Who builds an alarm on events can rely on it."""
    assert sorted(emitted()[name]) == sorted(EVENTS[name].fields)


def test_what_a_call_adds_to_its_events_is_as_this_test_assumes() -> None:
    """Else the scan of the source would not see all details."""
    source = inspect.getsource(Call.emit)
    assert "call_id=" in source
    assert "**self.context.told()" in source


def test_the_short_forms_use_known_events_and_details_alone() -> None:
    """A misspelt detail would be left out of every line, unnoticed."""
    for name, parts in _DETAILS.items():
        every = dict.fromkeys(EVENTS[name].fields, 0)
        for part in () if callable(parts) else parts:
            for text in (part,) if isinstance(part, str) else part:
                assert text.format_map(every)


def test_normal_events_are_no_warnings() -> None:
    """Who follows a promotion in the log saw two warnings for something that went well."""
    assert LEVELS["promotion"] == LEVELS["program_changed"] == logging.INFO


def test_an_event_says_where_its_kind_is_described() -> None:
    """The description of `Event` points to the catalogue instead of repeating it."""
    assert Event.__doc__ is not None
    assert "`dspy_prod.telemetry.events.EVENTS`" in Event.__doc__
    assert all(kind.meaning.endswith((".", "`.")) for kind in EVENTS.values())

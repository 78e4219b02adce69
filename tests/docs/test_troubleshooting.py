"""Whoever searches the guide for what they see finds it there."""

from __future__ import annotations

import ast
import re

import pytest

import dspy_prod.errors as errors
from dspy_prod.pipeline.failures import _FLAWS
from dspy_prod.production.reasons import REASONS
from dspy_prod.telemetry.events import EVENTS
from tests.docs.pages import GUIDE, ROOT

PAGE = (GUIDE / "troubleshooting.md").read_text("utf-8")
KINDS = {name for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, errors.LMError)}
FEWEST = 11
"""Characters of a text by which a message can be found."""


def told() -> list[tuple[str, list[str]]]:
    """Where a refusal is made, with the constant pieces of its message."""
    found = []
    for file in sorted((ROOT / "dspy_prod").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in KINDS and node.args:
                text = node.args[0]
                parts = text.values if isinstance(text, ast.JoinedStr) else [text]
                pieces = [str(part.value).strip(" ;().,:") for part in parts if isinstance(part, ast.Constant)]
                if any(len(piece) >= FEWEST for piece in pieces):
                    found.append((f"{file.relative_to(ROOT)}:{node.lineno}", pieces))
    return found


def row_of(word: str) -> str | None:
    """The row of a table that begins with a word, alone or beside others."""
    row = re.search(rf"^\| (?:`\w+`, )*`{word}`(?:, `\w+`)* \|.*$", PAGE, re.M)
    return row and row[0]


@pytest.mark.parametrize("event", sorted(EVENTS))
def test_every_event_has_its_row(event: str) -> None:
    """With when it happens, and what to do."""
    row = row_of(event)
    assert row is not None
    assert row.count("|") == 4


@pytest.mark.parametrize("reason", sorted(REASONS))
def test_every_reason_has_its_row(reason: str) -> None:
    """With what it means, and where to look."""
    section = PAGE.partition("## Reasons")[2].partition("\n## ")[0]
    assert f"| `{reason}` |" in section


def test_every_refusal_can_be_found_by_its_words() -> None:
    """A piece of each message of a refusal stands on the page as it is."""
    messages = told()
    assert len(messages) > 15
    lacking = {
        where: pieces
        for where, pieces in messages
        if not any(len(piece) >= FEWEST and piece[:40] in PAGE for piece in pieces)
    }
    assert lacking == {}


@pytest.mark.parametrize("flaw", sorted(_FLAWS.values()))
def test_every_flaw_of_an_answer_can_be_found(flaw: str) -> None:
    """As `UnusableAnswerError` puts it."""
    assert flaw in PAGE

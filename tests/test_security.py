"""`SECURITY.md` is true: its numbers are those in the code, and the tests that it names exist."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "SECURITY.md").read_text(encoding="utf-8")


def rows(title: str) -> list[list[str]]:
    """The cells of the table below a title."""
    section = TEXT.partition(f"## {title}\n")[2].partition("\n## ")[0]
    lines = [line.strip("|").split(" | ") for line in section.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line] for line in lines[1:]]


BELIEVED = rows("What is believed from outside, and how far")
PROTECTED = rows("What is protected")


def test_there_are_tables() -> None:
    """A test of no rows says nothing."""
    assert len(BELIEVED) >= 12
    assert len(PROTECTED) >= 10


@pytest.mark.parametrize("row", BELIEVED, ids=lambda row: row[2].strip("`").removeprefix("dspy_prod."))
def test_each_bound_is_the_one_in_the_code(row: list[str]) -> None:
    """A bound that was changed, and its page was not."""
    _, bound, constant, beyond = row
    module, _, name = constant.strip("`").rpartition(".")
    number = re.match(r"[\d,.]+", bound)
    assert number is not None, bound
    assert float(number[0].replace(",", "")) == getattr(import_module(module), name)
    assert beyond


@pytest.mark.parametrize("row", PROTECTED, ids=lambda row: row[0][:40])
def test_each_claim_names_tests_that_exist(row: list[str]) -> None:
    """A claim that nothing holds is a wish."""
    named = re.findall(r"`(tests/[\w/]+\.py)`", row[-1])
    assert named
    assert [path for path in named if not (ROOT / path).is_file()] == []


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_the_page_is_found(page: str) -> None:
    """Whoever has found a hole looks for the way to say so."""
    assert "(SECURITY.md)" in (ROOT / page).read_text(encoding="utf-8")

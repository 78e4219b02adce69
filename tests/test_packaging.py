"""What is packed: a source distribution can run its own tests, and no file is left out of it by oversight."""

from __future__ import annotations

import re
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
TOML: Any = import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
PROJECT: dict[str, Any] = TOML.loads((ROOT / "pyproject.toml").read_text("utf-8"))
PACKED = {each.lstrip("/") for each in PROJECT["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]}
ALWAYS = {"pyproject.toml", ".gitignore", "PKG-INFO"}
"""Packed by the builder itself."""


def read_by(path: Path) -> set[str]:
    """What of the project's folder a test speaks of: `ROOT / "README.md"`, `from benchmarks import ...`."""
    text = path.read_text("utf-8")
    named = set(re.findall(r'(?:ROOT|parents\[\d\])\s*/\s*"([^"/]+)', text))
    named |= set(re.findall(r"^\s*(?:from|import) (benchmarks|examples|notebooks)\b", text, re.M))
    return {name for name in named if (ROOT / name).exists()}


def test_a_source_distribution_has_what_its_tests_read() -> None:
    wanted = {name: path.name for path in sorted((ROOT / "tests").rglob("*.py")) for name in read_by(path)}
    assert {"notebooks", "benchmarks", "SECURITY.md", "docs"} <= wanted.keys()
    assert {name: path for name, path in wanted.items() if name not in PACKED | ALWAYS} == {}


def test_what_is_packed_is_there() -> None:
    assert [name for name in sorted(PACKED) if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md"])
def test_what_a_page_links_to_is_packed_with_it(page: str) -> None:
    links = re.findall(r"\]\((?!https?:|mailto:)(\w[^)#\s]*)", (ROOT / page).read_text("utf-8"))
    assert [link for link in links if link.partition("/")[0] not in PACKED | ALWAYS] == []

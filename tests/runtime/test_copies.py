"""A copy of a table that others change is made by one step of the interpreter."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import dspy_prod

FILES = sorted(Path(dspy_prod.__file__).parent.rglob("*.py"))


@pytest.mark.parametrize("package", sorted({each.relative_to(FILES[0].parent).parts[0] for each in FILES}))
def test_no_table_of_an_object_or_module_is_copied_pair_by_pair(package: str) -> None:
    """`list(table.items())` makes a tuple for each pair; up to Python 3.11 any of them may collect garbage, finalizers
    run, and what they or the threads that run meanwhile put into the table makes it a RuntimeError. A copy is one step.
    """
    root = FILES[0].parent
    found = [
        f"{path.relative_to(root)}:{node.lineno}"
        for path in FILES
        if path.relative_to(root).parts[0] == package
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and pairs_of_a_shared_table(node)
    ]
    assert found == []


def pairs_of_a_shared_table(node: ast.Call) -> bool:
    """Whether it is `list(a.b.items())` or `list(_TABLE.items())`, or a tuple of them."""
    if not (isinstance(node.func, ast.Name) and node.func.id in ("list", "tuple") and len(node.args) == 1):
        return False
    match node.args[0]:
        case ast.Call(func=ast.Attribute(value=ast.Attribute(attr=attribute), attr="items")):
            return attribute.startswith("_") or attribute == "modules"
        case ast.Call(func=ast.Attribute(value=ast.Name(id=name), attr="items")):
            return name.isupper() and name != "STEPS"  # which nobody changes
    return False


@pytest.mark.parametrize(
    ("source", "is_one"),
    [
        ("list(sys.modules.items())", True), ("tuple(_KEPT.items())", True), ("list(self._own.items())", True),
        ("list(mine.items())", False), ("list(self._own.copy().items())", False), ("list(self._own.values())", False),
    ],
)  # fmt: skip
def test_those_are_found(source: str, is_one: bool) -> None:
    (node,) = [
        each
        for each in ast.walk(ast.parse(source))
        if isinstance(each, ast.Call) and source.startswith(ast.unparse(each))
    ]
    assert pairs_of_a_shared_table(node) is is_one

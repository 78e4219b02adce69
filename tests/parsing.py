"""Python's source as a tree."""

from __future__ import annotations

import ast


def parsed(source: str) -> ast.Module:
    """The tree of a module.

    CPython 3.11 counts how deep it is in a tree in one place for all threads, and raises a SystemError when another one
    made a tree meanwhile: a traceback that the garbage collector logs does.
    """
    for _ in range(9):
        try:
            return ast.parse(source)
        except SystemError:
            continue
    return ast.parse(source)

"""How a name is taken from another package: it is bound once, and an error says which version would have it."""

from __future__ import annotations

import asyncio
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from operator import attrgetter
from typing import Any, Final

CLAIMED: Final = {"dspy": ">=3.4.1,<3.5", "litellm": ">=1.106", "mlflow": ">=3.17,<4"}
"""The versions this library is made for, as in `pyproject.toml`."""

running_loop: Final = asyncio._get_running_loop  # without an exception where there is none


def names(module: str, *wanted: str) -> list[Any]:
    """The objects that a module has under these names, which may be dotted: a method that is overridden must be there.

    No import statement: a type checker would follow it into the one typed package inside the untyped DSPy, and would
    then believe of `dspy` itself, in a user's own file too, that it has no attributes.

    Raises:
        ImportError: the module or a name is missing; the message tells the version found and those that have it.
    """
    try:
        found = import_module(module)
        return [attrgetter(name)(found) for name in wanted]
    except (ImportError, AttributeError) as error:
        raise ImportError(_unfit(module.partition(".")[0], error)) from error


def version_of(package: str) -> str:
    """The installed version of a package; `"(not installed)"` where there is none."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "(not installed)"


def _unfit(package: str, error: Exception) -> str:
    fitting = package + CLAIMED[package]
    return (
        f"dspy_prod needs something that {package} {version_of(package)} does not have: {error}. It is made for "
        f"{fitting}; install such a version: pip install '{fitting}'"
    )

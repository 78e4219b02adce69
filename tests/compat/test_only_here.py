"""No other room knows a private name of another package."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

import dspy_prod
from tests.compat.test_foreign import SIGNATURES, VALUES
from tests.parsing import parsed

PACKAGE: Final = Path(dspy_prod.__file__).parent
FOREIGN: Final = {"dspy", "lm15", "mlflow", "litellm", "asyncio"}
NAMES: Final = {part for _, name, *_ in [*SIGNATURES, *VALUES] for part in name.split(".")}
PRIVATE: Final = {name for name in NAMES if name.startswith("_") and name != "_lock"} | {
    "thread_local_overrides", "main_thread_config", "_engine_spec",
    "_async_engine_spec", "_cache_responses", "_provider_name", "_compiled",
    "_input_keys", "_connect_timeout", "_hidden_params", "_async_queue", "_mlflow_experiment_ids",
}  # fmt: skip
"""Names that only the one room may say: those of the tables, and attributes. `_lock` is everybody's own too."""
COMMON: Final = {"_arguments", "_capabilities", "_open", "_response", "_result"}
"""Those of them that our own classes use of themselves too."""


def offences(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, name) of each private name of another package that a module imports, reads, sets, overrides or spells."""
    for node in ast.walk(tree):
        modules: list[str] = []
        said: list[str] = []
        if isinstance(node, ast.ImportFrom) and not node.level and node.module:
            modules = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.Attribute):
            own = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls") and node.attr in COMMON
            said = [] if own else [node.attr]
        elif isinstance(node, (ast.Name, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            said = list({node.id if isinstance(node, ast.Name) else node.name} - COMMON)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            said = list({node.value} - COMMON)
        for module in modules:
            first, *rest = module.split(".")
            if first in FOREIGN and any(part.startswith("_") or part in PRIVATE for part in rest):
                yield node.lineno, module
        for name in said:
            if name in PRIVATE:
                yield node.lineno, name


@pytest.mark.parametrize(
    "path",
    [path for path in sorted(PACKAGE.rglob("*.py")) if path.parent.name != "compat"],
    ids=lambda path: str(path.relative_to(PACKAGE)),
)
def test_a_room_says_no_private_name_of_another_package(path: Path) -> None:
    """What a new release of theirs may break is met in `dspy_prod/compat`, by its name."""
    known = {"thread_local_overrides"} if "compat.dspy import" in path.read_text() else set()
    assert [found for found in offences(parsed(path.read_text())) if found[1] not in known] == []


@pytest.mark.parametrize(
    "line",
    [
        "from dspy._vendor.lm15 import serde", "import dspy._vendor", "from dspy.lm15 import _definitions",
        "from dspy.dsp.utils.settings import thread_local_overrides", "from asyncio import _get_running_loop",
        "lm._engine_spec = engine", "getattr(raw, '_hidden_params')", "class A:\n    def _start_trace(self): ...",
        "super()._open(parsed)",
    ],
)  # fmt: skip
def test_the_guard_sees(line: str) -> None:
    """Each way in which such a name can be said."""
    assert len(list(offences(parsed(line)))) == 1

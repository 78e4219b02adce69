"""Every public name says what it is, with an example that runs."""

from __future__ import annotations

import importlib
import inspect
import re
import textwrap
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import dspy_prod
from dspy_prod.testing import Provider
from tests.docs.pages import ROOT
from tests.docs.runner import run
from tests.docs.stage import BEFORE, STAGES

BESIDES = ("dspy_prod.testing", "dspy_prod.privacy", "dspy_prod.asgi", "dspy_prod.guardrails")
"""Public modules that `dspy_prod.__all__` does not name."""

ELSEWHERE = {
    "dspy_prod.BudgetedOptimizer": "the page on optimization runs a whole one",
    "dspy_prod.OptimizationReport": "the same page reads it",
    "dspy_prod.Experiment": "the page on experiments runs one",
    "dspy_prod.Scorecard": "the same page shows one",
    "dspy_prod.Embedder": "the page on embeddings embeds",
    "dspy_prod.testing.Spent": "the page on testing counts so",
    "dspy_prod.testing.costs": "the page on testing counts so",
    "dspy_prod.Controls": "stops a service, which the tests of controls do",
    "dspy_prod.controls": "stops a service, which the tests of controls do",
    "dspy_prod.StoppedError": "is raised once somebody has stopped it",
    "dspy_prod.evaluate": "the page on scale evaluates; a cluster of Ray takes seconds",
    "dspy_prod.asgi.EventStream": "the page on services streams an answer, in tests/asgi",
    "dspy_prod.Judge": "is asked by an experiment in the background",
}
"""Names whose example needs more than a stage, and where that is."""


def public() -> dict[str, Any]:
    """Every public class and function, by its full name."""
    modules = [f"dspy_prod.{name}" for name in dspy_prod.__all__ if isinstance(getattr(dspy_prod, name), ModuleType)]
    found = {}
    for package in sorted({"dspy_prod", *modules, *BESIDES}):
        module = importlib.import_module(package)
        for name in module.__all__:
            value = getattr(module, name)
            if inspect.isclass(value) or inspect.isroutine(value):
                found[f"{package}.{name}"] = value
    return found


PUBLIC = public()


def example(value: Any) -> str:
    """The code of a docstring's example: a fenced block, what is typed at a prompt, or indented among the text."""
    whole = inspect.cleandoc(value.__doc__ or "")
    text = whole.partition("Example:\n")[2]
    if not text:
        said = re.split(r"^\w[\w ]*:$", whole, maxsplit=1, flags=re.M)[0]
        indented = re.search(r"\n\n((?: {4}.*(?:\n|$)|\n)+)", said)
        return textwrap.dedent(indented[1]) if indented else ""
    text = re.split(r"^\w[\w ]*:$", text, maxsplit=1, flags=re.M)[0]
    fenced = re.search(r"```python\n(.*?)```", text, re.S)
    if fenced:
        return textwrap.dedent(text[: fenced.end(1)].partition("```python\n")[2])
    typed = re.findall(r"^\s*(?:>>>|\.\.\.) ?(.*)$", text, re.M)
    return "\n".join(typed)


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_every_public_name_has_an_example(name: str) -> None:
    """A docstring of its own that says what it is, and code that shows it."""
    value = PUBLIC[name]
    said = value.__doc__ or ""
    assert len(said.split("\n")[0]) > 10
    assert example(value).strip(), f"{name} needs an Example: section"
    compile(example(value), name, "exec")


WITH_MLFLOW = ("dspy_prod.registry", "dspy_prod.tracking")


@pytest.mark.parametrize(
    "packages",
    [
        pytest.param([package for package in STAGES if package not in WITH_MLFLOW], marks=pytest.mark.long, id="plain"),
        pytest.param(WITH_MLFLOW, marks=pytest.mark.slow, id="mlflow"),
    ],
)
def test_the_examples_run(packages: list[str], tmp_path: Path) -> None:
    """Each on the stage of its module, without what another one named."""
    stages: dict[str, list[str]] = {}
    for name in PUBLIC:
        package = name.rpartition(".")[0]
        if package in packages and name not in ELSEWHERE:
            code = f"print({name!r})\n{BEFORE.get(name, '')}{example(PUBLIC[name])}"
            stages.setdefault(STAGES[package], []).append(code)
    pieces = [
        {"name": f"stage {number}", "apart": True, "blocks": [(1, code) for code in [stage, *shown]]}
        for number, (stage, shown) in enumerate(stages.items())
    ]
    with Provider() as provider:
        ended = run(pieces, tmp_path, ROOT, OPENAI_API_BASE=provider.url, OPENAI_API_KEY="test")
    failed = {name: end["said"] for name, end in ended.items() if end["code"]}
    assert not failed, "\n\n".join(f"--- {name}\n{said}" for name, said in failed.items())


def test_every_stage_is_needed() -> None:
    """A public module without a stage would be one whose examples nobody runs."""
    assert {name.rpartition(".")[0] for name in PUBLIC} == set(STAGES)

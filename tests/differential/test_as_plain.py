"""The same call through `dspy.LM` and `dspy_prod.LM`: what arrives at the provider, and what comes back."""

from __future__ import annotations

import asyncio
import itertools
import warnings
from collections.abc import Iterable, Iterator
from typing import Any, Final

import dspy
import pytest
from pydantic import BaseModel

import dspy_prod
from dspy_prod.stores.memory import MemoryStore
from tests.differential.meant import MEANT, Seen
from tests.differential.mirror import Mirror
from tests.differential.programs import ADAPTERS, PROGRAMS
from tests.differential.shapes import FAMILIES, SHAPES, Family, Shape

SHORT: Final = 53
"""One case in so many is in the quick suite; `make dspy-suite` runs all."""


@pytest.fixture(scope="module")
def mirror() -> Iterator[Mirror]:
    mirror = Mirror()
    yield mirror
    mirror.stop()


_HISTORY: Final = ("prompt", "messages", "kwargs", "outputs", "usage", "model", "model_type", "response_model", "cost")


def plain(family: Family, shape: Shape, url: str) -> dspy.LM:
    return dspy.LM(
        family.model, family.model_type, **{"cache": False, "num_retries": 0, **family.connect(url), **shape.init}
    )


def ours(family: Family, shape: Shape, url: str) -> dspy.LM:
    policies: dict[str, Any] = {"retry": False} if "num_retries" not in shape.init else {}
    given = {"cache": False, "breaker": False, **policies, **family.connect(url), **shape.init}
    return dspy_prod.LM(family.model, family.model_type, store=STORE, namespace="as-plain", **given)


STORE: Final = MemoryStore()


def see(make: Any, family: Family, shape: Shape, mirror: Mirror, way: str) -> Seen:
    mirror.take()
    lm = None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            lm = make(family, shape, mirror.url)
            came_back = asyncio.run(lm.acall(**shape.call)) if way == "async" else lm(**shape.call)
    except Exception as error:
        came_back = innermost(error)
    return Seen(mirror.take(), came_back, remembered(lm))


def remembered(lm: Any) -> dict[str, Any] | None:
    """What DSPy's history tells of the last call."""
    if lm is None or not lm.history:
        return None
    entry = lm.history[-1]
    history = {name: entry.get(name) for name in _HISTORY}
    history["kwargs"] = {name: by_content(value) for name, value in entry["kwargs"].items()}
    history["cost"] = None if history["cost"] is None else round(history["cost"], 12)
    history["keys"] = sorted(set(entry) - {"cached", "route", "response"})
    return history


def see_streamed(make: Any, family: Family, shape: Shape, mirror: Mirror) -> Seen:
    """As `see`, of a program whose answer is streamed to its user."""
    mirror.take()
    said: list[str] = []
    lm: Any = None

    async def listen() -> Any:
        program = dspy.Predict("question -> answer")
        listener = dspy.streaming.StreamListener("answer")
        streamed = dspy.streamify(program, stream_listeners=[listener])
        came_back: Any = None
        config = {name: value for name, value in shape.call.items() if name != "prompt"}
        async for each in streamed(question="What is the colour?", config=config):
            if isinstance(each, dspy.Prediction):
                came_back = each.toDict()
            else:
                said.append(getattr(each, "chunk", repr(each)))
        return came_back

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            lm = make(family, shape, mirror.url)
            with dspy.context(lm=lm):
                came_back = asyncio.run(listen())
    except BaseException as error:
        came_back = innermost(error)
    return Seen(mirror.take(), ("".join(said), came_back), remembered(lm))


def see_program(make: Any, family: Family, program: str, adapter: str, mirror: Mirror) -> Seen:
    """As `see`, of a program under one of DSPy's adapters."""
    mirror.take()
    lm: Any = None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            lm = make(family, Shape(), mirror.url)
            with dspy.context(lm=lm), dspy.context(adapter=ADAPTERS[adapter]()):
                came_back: Any = repr(PROGRAMS[program]().toDict())
    except Exception as error:
        came_back = innermost(error)
    return Seen(mirror.take(), came_back, remembered(lm))


def by_content(value: Any) -> Any:
    """A schema's class as what it says: DSPy makes a new class for each call."""
    return value.model_json_schema() if isinstance(value, type) and issubclass(value, BaseModel) else value


def innermost(error: BaseException) -> tuple[Any, ...]:
    """What went wrong, out of the groups that tasks raise."""
    while getattr(error, "exceptions", None):
        error = error.exceptions[0]  # type: ignore[attr-defined]
    return (type(error).__name__, getattr(error, "status", None))


def spread(metafunc: pytest.Metafunc, *axes: Iterable[str]) -> list[Any]:
    """Every combination; but for a few, which meet each name and each family now and then, they are slow.

    The slow ones are not even made where they are not asked for: there are thousands, and each worker would make them.
    """
    expression = metafunc.config.option.markexpr
    whole = "slow" in expression.replace("not slow", "")
    return [
        pytest.param(*each, id=" | ".join(each), marks=() if number % SHORT == 0 else pytest.mark.slow)
        for number, each in enumerate(itertools.product(*axes))
        if whole or number % SHORT == 0
    ]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    spoken = [name for name, shape in SHAPES.items() if "prompt" in shape.call]
    axes: dict[str, tuple[Iterable[str], ...]] = {
        "test_a_call_is_as_plain": (FAMILIES, SHAPES, ["sync", "async"]),
        "test_a_stream_is_as_plain": (FAMILIES, spoken),
        "test_a_program_is_as_plain": (FAMILIES, PROGRAMS, ADAPTERS),
    }
    found = axes.get(metafunc.function.__name__)
    if found is not None:
        names = [name for name in metafunc.fixturenames if name in ("family", "shape", "way", "program", "adapter")]
        metafunc.parametrize(names, spread(metafunc, *found))


def same(seen: Seen, expected: Seen, *case: str) -> None:
    """Fail for any difference that no rule explains."""
    for rule in MEANT:
        if seen == expected:
            return
        expected, seen = rule.levelled(case, expected, seen)
    assert seen == expected, " | ".join(case)


def test_a_call_is_as_plain(mirror: Mirror, family: str, shape: str, way: str) -> None:
    expected = see(plain, FAMILIES[family], SHAPES[shape], mirror, way)
    same(see(ours, FAMILIES[family], SHAPES[shape], mirror, way), expected, family, shape, way)


def test_a_stream_is_as_plain(mirror: Mirror, family: str, shape: str) -> None:
    expected = see_streamed(plain, FAMILIES[family], SHAPES[shape], mirror)
    same(see_streamed(ours, FAMILIES[family], SHAPES[shape], mirror), expected, family, shape, "stream")


def test_a_program_is_as_plain(mirror: Mirror, family: str, program: str, adapter: str) -> None:
    expected = see_program(plain, FAMILIES[family], program, adapter, mirror)
    same(see_program(ours, FAMILIES[family], program, adapter, mirror), expected, family, program, adapter)

"""The pytest plugin: a provider, a store, a clock and an LM as fixtures, a guard against real providers, and caps.

pytest loads it wherever this library is installed, so nothing is imported or done before a test asks for it. Turn it
off with `-p no:dspy_prod`. The guide's page "Testing" shows each of its parts.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from importlib import import_module
from math import inf
from typing import TYPE_CHECKING, Any, Final

import pytest

if TYPE_CHECKING:
    from dspy_prod.testing.clock import FakeClock
    from dspy_prod.testing.guard import Guard
    from dspy_prod.testing.provider import Provider
    from dspy_prod.testing.spending import Spent

MODEL: Final = "openai/gpt-4o-mini"
"""The model of the fixture `lm`; the provider charges what its metadata says."""

_GUARD: Final = pytest.StashKey["Guard"]()
_numbers = itertools.count()


# -- settings --------------------------------------------------------------------------------------------------------
def pytest_addoption(parser: pytest.Parser) -> None:
    """Our settings in pytest's configuration file."""
    parser.addini(
        "dspy_prod_guard", "fail every test that would call a real LM provider (true or false)", type="bool",
        default=False,
    )  # fmt: skip
    parser.addini(
        "dspy_prod_allow_hosts", "hosts beside loopback that guarded tests may reach", type="args", default=[]
    )


def pytest_configure(config: pytest.Config) -> None:
    """Our markers."""
    for line in (
        "no_real_provider: fails if the test would call a real LM provider or connect to anything but loopback",
        "real_provider: may call a real LM provider, also with dspy_prod_guard = true",
        "max_cost(usd=None, calls=None): fails if the test's LM calls cost more USD, or are more, retries included",
    ):
        config.addinivalue_line("markers", line)


def pytest_itemcollected(item: pytest.Item) -> None:
    """Have the guard set up before every other fixture of a test that asks for it."""
    names: list[str] | None = getattr(item, "fixturenames", None)
    if names is None or "no_real_provider" in names or item.get_closest_marker("real_provider") is not None:
        return
    if item.config.getini("dspy_prod_guard") or item.get_closest_marker("no_real_provider") is not None:
        names.insert(0, "no_real_provider")


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Hold a test to its caps, and fail one that swallowed what the guard told it."""
    cap = item.get_closest_marker("max_cost")
    guard = item.stash.get(_GUARD, None)
    if cap is None and guard is None:
        yield
        return
    with ExitStack() as stack:
        spent = None if cap is None else stack.enter_context(_capped(cap))
        outcome: Any = yield
    if outcome.excinfo is not None:
        return
    reason = guard.tried[0] if guard is not None and guard.tried else None
    if reason is None and cap is not None and spent is not None:
        reason = _excess(cap, spent)
    if reason is not None:
        outcome.force_exception(pytest.fail.Exception(reason, pytrace=False))


def _capped(cap: pytest.Mark) -> AbstractContextManager[Spent]:
    usd, calls = cap.kwargs.get("usd"), cap.kwargs.get("calls")
    known = not cap.args and cap.kwargs.keys() <= {"usd", "calls"} and (usd, calls) != (None, None)
    numbers = all(
        value is None or (not isinstance(value, bool) and isinstance(value, (int, float)) and 0 <= value < inf)
        for value in (usd, calls)
    )
    if not known or not numbers:
        pytest.fail("max_cost takes usd=<USD>, calls=<number> or both, e.g. @pytest.mark.max_cost(usd=0.02)", False)
    found: AbstractContextManager[Spent] = import_module("dspy_prod.testing.spending").costs()
    return found


def _excess(cap: pytest.Mark, spent: Spent) -> str | None:
    usd, calls = cap.kwargs.get("usd"), cap.kwargs.get("calls")
    if calls is not None and spent.calls > calls:
        return f"max_cost: the test made {spent.calls} LM calls, and {calls} are allowed: {spent!r}"
    if usd is None:
        return None
    try:
        cost = spent.usd
    except AssertionError as unknown:
        return f"max_cost: {unknown}"
    return f"max_cost: the test cost {cost:.9f} USD, and {usd:g} are allowed: {spent!r}" if cost > usd else None


# -- fixtures --------------------------------------------------------------------------------------------------------
@pytest.fixture
def no_real_provider(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fails the test if it would call a real provider, or connect to anything but loopback."""
    guard: Guard = import_module("dspy_prod.testing.guard").Guard(
        lambda message: pytest.fail.Exception(message, pytrace=False),
        request.config.getini("dspy_prod_allow_hosts"),
    )
    request.node.stash[_GUARD] = guard
    with guard:
        yield
    del request.node.stash[_GUARD]


@pytest.fixture
def dspy_prod_store(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The URL of a fresh store in memory, which LMs without `store=` use while the test runs."""
    url = f"memory://pytest-{os.getpid()}-{next(_numbers)}"
    monkeypatch.setenv("DSPY_PROD_STORE", url)
    monkeypatch.delenv("DSPY_PROD__STORE", raising=False)  # it would win over that
    yield url
    import_module("dspy_prod.stores.opening").forget(url)


@pytest.fixture
def fake_clock() -> FakeClock:
    """A clock that stands still until `fake_clock.advance(seconds)`; give it to an LM as `clock=`."""
    clock: FakeClock = import_module("dspy_prod.testing.clock").FakeClock()
    return clock


@pytest.fixture
def provider() -> Iterator[Provider]:
    """A running `dspy_prod.testing.Provider`; what its callables raised fails the test."""
    made: Provider = import_module("dspy_prod.testing.provider").Provider()
    with made:
        yield made
    if made.errors:
        raise made.errors[0]


@pytest.fixture
def lm(provider: Provider, dspy_prod_store: str) -> Iterator[Any]:
    """A `dspy_prod.LM` in front of `provider`, with a store of its own; use it as `dspy.context(lm=lm)`."""
    made = import_module("dspy_prod").LM(MODEL, api_base=provider.url, api_key="test", store=dspy_prod_store)
    yield made
    made.close()


@pytest.fixture
def costs() -> Callable[[], AbstractContextManager[Spent]]:
    """`dspy_prod.testing.costs`, for `with costs() as spent:`."""
    found: Callable[[], AbstractContextManager[Spent]] = import_module("dspy_prod.testing.spending").costs
    return found

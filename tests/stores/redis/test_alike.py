"""Programs, runs and experiments in Redis: what every store promises of them."""

from __future__ import annotations

import inspect
import uuid
from collections.abc import Callable, Iterator
from typing import Any, Final

import pytest

from dspy_prod.runtime.clock import SYSTEM_CLOCK, Clock
from dspy_prod.stores.redis.connection import Connection
from tests.stores import test_contract, test_programs, test_trials
from tests.stores.redis.standin import Served

STORES: Final = {"store", "still", "make_store"}


@pytest.fixture
def make_store(valkey: str) -> Iterator[Callable[..., Served]]:
    """Make a store on the server; all are closed at the end."""
    made: list[Served] = []
    here = uuid.uuid4().hex

    def make(namespace: str = "test", clock: Clock = SYSTEM_CLOCK) -> Served:
        made.append(Served(Connection(valkey, f"{here}-{namespace}"), clock))
        return made[-1]

    yield make
    for store in made:
        store.close()


def promised(module: Any, of: str = "", but: str = "nothing") -> dict[str, Any]:
    """The tests of a module that run against every store, and speak of this."""
    tests = {name: test for name, test in vars(module).items() if name.startswith("test_")}
    return {
        name: test
        for name, test in tests.items()
        if STORES & set(inspect.signature(test).parameters)
        and of in inspect.getsource(test)
        and but not in inspect.getsource(test)
    }


globals().update(promised(test_trials))
globals().update(promised(test_programs))
globals().update(promised(test_contract, ".runs", "granted("))

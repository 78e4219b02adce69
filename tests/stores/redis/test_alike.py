"""Programs, runs and experiments in Redis: what every store promises of them."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator

import pytest

from dspy_prod.runtime.clock import SYSTEM_CLOCK, Clock
from dspy_prod.stores.redis.connection import Connection
from tests.stores import test_contract, test_programs, test_trials
from tests.stores.redis.standin import Served


@pytest.fixture
def make_store(valkey: str) -> Iterator[Callable[..., Served]]:
    made: list[Served] = []
    here = uuid.uuid4().hex

    def make(namespace: str = "test", clock: Clock = SYSTEM_CLOCK) -> Served:
        made.append(Served(Connection(valkey, f"{here}-{namespace}"), clock))
        return made[-1]

    yield make
    for store in made:
        store.close()


for _name, _test in vars(test_trials).items():
    if _name.startswith("test_"):
        globals()[_name] = _test
for _name in ("answers_of_a_run", "an_answer_that", "ordinals", "namespaces_keep_answers", "notes_of", "of_many_who_write"):
    for _full, _test in vars(test_contract).items():
        if _full.startswith(f"test_{_name}"):
            globals()[_full] = _test
for _full, _test in vars(test_programs).items():
    if _full.startswith("test_") and "store" in _test.__code__.co_varnames[: _test.__code__.co_argcount] and "path" not in _test.__code__.co_varnames[: _test.__code__.co_argcount]:
        globals()[_full] = _test
del _test

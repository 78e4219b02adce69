"""A disk that is full, or read-only, under an experiment: users have their answers, and the card says what it lacks."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dspy
import pytest

import dspy_prod
from dspy_prod import Experiment, Metric, call_context
from dspy_prod.errors import StoreUnavailableError
from dspy_prod.experiments.scorecard import Scorecard
from dspy_prod.stores.sqlite.store import SqliteStore
from dspy_prod.stores.sqlite.tables import Tables
from dspy_prod.testing import Provider
from tests.experiments.conftest import Triage
from tests.stores.support import until

LIMITS = {
    "full": ("PRAGMA max_page_count={pages}", "free some disk space"),
    "read-only": ("PRAGMA query_only=1", "writable"),
}


@pytest.mark.parametrize("how", LIMITS)
def test_calls_go_on_and_the_card_says_that_it_cannot_be_written(
    how: str, provider: Provider, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is lost by it: what was posted meanwhile is written once there is room."""
    lm = dspy_prod.LM("openai/gpt-4o-mini", api_base=provider.url, api_key="k", store=f"memory://{tmp_path.name}")
    exp = Experiment(
        "e", variants={"control": Triage(), "new": Triage("Think first.")}, metrics=[Metric("resolved")],
        store=f"sqlite:///{tmp_path}/disk.db",
    )  # fmt: skip

    def ask(unit: str) -> None:
        with dspy.context(lm=lm), call_context(user=unit):
            assert exp(message=unit).label
        exp.record(unit, resolved=1)

    for number in range(10):
        ask(f"u{number}")
    before = exp.step()
    assert (sum(before.users.values()), before.unwritten) == (10, None)
    store: Any = exp._works.store
    assert isinstance(store, SqliteStore)

    limit, why = LIMITS[how]

    def limited(connection: Any) -> Any:
        connection.execute(limit.format(pages=connection.execute("PRAGMA page_count").fetchone()[0]))
        return connection

    opened = Tables.open
    with monkeypatch.context() as patched:  # the writer tries with new connections
        patched.setattr(Tables, "open", lambda self: limited(opened(self)))
        with store._writer.io:
            limited(store._writer.tables.connection)
        _check_unwritable(exp, store, ask, before, why)
    with store._writer.io:
        for sql in ("PRAGMA max_page_count=1000000", "PRAGMA query_only=0"):
            if store._writer.tables.connection is not None:
                store._writer.tables.connection.execute(sql)
    until(lambda: bool(store.flush(1.0)))
    after = exp.step()
    assert sum(after.users.values()) == 110
    assert (after.unwritten, after.unkept, after.late, after.repeated) == (None, 0, 1, 1)  # u0, once more


def _check_unwritable(
    exp: Experiment, store: SqliteStore, ask: Callable[[str], None], before: Scorecard, why: str
) -> None:
    began = time.monotonic()
    for number in range(100):
        ask(f"a user of whom there is much to write, and who was never here before {number}" * 3)
    assert time.monotonic() - began < 60.0
    until(lambda: "failing" in store.problems)
    card = exp.scorecard()
    assert card.unwritten is not None
    assert why in card.unwritten
    assert card.users == before.users or sum(card.users.values()) > 10  # a part may have had room
    assert "the store cannot be written" in str(card)
    assert json.loads(json.dumps(card.to_dict()))["unwritten"] == card.unwritten
    with pytest.raises(StoreUnavailableError):
        exp.step()
    ask("u0")

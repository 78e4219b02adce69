"""A stop, or an order, of a name that no call has: it is kept, and said, with the names that are known."""

from __future__ import annotations

import datetime as dt
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dspy
import pytest

import dspy_prod
from dspy_prod import CircuitBreaker, ConfigError
from dspy_prod.errors import StoreUnavailableError
from dspy_prod.status.controls import Controls
from dspy_prod.status.names import MOST_NAMED, doubt
from dspy_prod.testing import ScriptedEngine
from tests.compose.support import MODEL, over
from tests.stores.redis.servers import started_valkey

NUMBERS = itertools.count()


@pytest.fixture(scope="module")
def valkey() -> Iterator[str]:
    server = started_valkey()
    yield f"redis://127.0.0.1:{server.port}/0"
    server.stop()


@pytest.fixture(params=["memory", "sqlite", "redis"])
def lm(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Any]:
    """Of a program, `triage`, and of a tenant, `acme`, a call each has been answered; and nobody else's."""
    if request.param == "redis":
        store = request.getfixturevalue("valkey")
    else:
        store = {"memory": f"memory://names-{next(NUMBERS)}", "sqlite": f"sqlite:///{tmp_path}/state.db"}[request.param]
    lm = over(
        ScriptedEngine("[[ ## answer ## ]]\nyes\n\n[[ ## completed ## ]]"), store=store, breaker=CircuitBreaker(),
        namespace=f"names-{next(NUMBERS)}",
    )  # fmt: skip
    program = dspy_prod.Production(dspy.Predict("question -> answer"), name="triage")
    with dspy.context(lm=lm), dspy_prod.call_context(tenant="acme"):
        assert program(question="?").answer == "yes"
    yield lm
    lm.close()
    lm.pipeline.store.close()


@pytest.mark.parametrize(
    ("named", "known"),
    [
        ({"model": "pair"}, repr(MODEL)), ({"route": "pair"}, repr(MODEL)),
        ({"route": "http://a.example|pair"}, repr(MODEL)),
        ({"program": "Triage"}, "'triage'"), ({"tenant": "ACME"}, "'acme'"),
    ],
)  # fmt: skip
def test_a_name_that_no_call_has_is_doubted(lm: Any, named: dict[str, str], known: str) -> None:
    scope, value = next(iter(named.items()))
    scope, value = scope.replace("route", "model"), value.rpartition("|")[2]
    told = Controls(lm.pipeline.store).doubt(**named)
    assert told == f"No call of {scope} {value!r} is in the ledger; known: {known}"


@pytest.mark.parametrize(
    "named",
    [{"model": MODEL}, {"route": MODEL},
     {"route": f"http://a.example|{MODEL}"}, {"program": "triage"}, {"tenant": "acme"}],
)  # fmt: skip
def test_one_that_has_been_called_is_not(lm: Any, named: dict[str, str]) -> None:
    assert Controls(lm.pipeline.store).doubt(**named) == ""


def test_one_that_was_only_ever_refused_is_known(lm: Any) -> None:
    """A refusal is in no sum, and a record all the same."""
    controls = Controls(lm.pipeline.store)
    controls.stop(tenant="new")
    with dspy_prod.call_context(tenant="new"), pytest.raises(dspy_prod.StoppedError):
        lm("question")
    assert controls.doubt(tenant="new") == ""


def test_the_likely_ones_are_named_first_and_not_all_of_them(lm: Any) -> None:
    for number in range(MOST_NAMED + 2):
        with dspy_prod.call_context(tenant=f"other-{number}"):
            lm(f"question {number}")
    with dspy_prod.call_context(tenant="the-one"):
        lm("question")
    told = Controls(lm.pipeline.store).doubt(tenant="one")
    assert told.startswith("No call of tenant 'one' is in the ledger; known: 'the-one', ")
    assert told.endswith(", ...")
    assert told.count("other-") + told.count("acme") == MOST_NAMED - 1


def test_nothing_is_said_where_the_ledger_cannot_tell(lm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stop itself does not depend on it."""
    store = lm.pipeline.store

    def failing(**_: Any) -> Any:
        raise StoreUnavailableError("away")

    monkeypatch.setattr(store, "records", failing)
    assert Controls(store).doubt(model="no/such") == ""


def test_a_name_may_be_among_those_that_are_summed_as_one() -> None:
    """A store that keeps no sum of each name cannot say that there is none."""

    class Full:
        def flush(self, timeout: float) -> bool:
            return True

        def records(self, **wanted: Any) -> list[Any]:
            return []

        def totals(self, *, dimension: str, since_day: str, value: str) -> list[Any]:
            return [(since_day, value, None)] if value == "(other)" else []

    now = dt.datetime.now(dt.timezone.utc).timestamp()
    assert doubt(Full(), "model", "no/such", now) == ""  # type: ignore[arg-type]


def test_one_name_at_a_time_is_asked_about(lm: Any) -> None:
    with pytest.raises(ConfigError, match="or route="):
        Controls(lm.pipeline.store).doubt(model="a", route="b")

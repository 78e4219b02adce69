"""The exporter process from inside: what it makes of batches that MLflow refuses in part, and its last word."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping
from typing import Any

import pytest
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE, RESOURCE_DOES_NOT_EXIST

from dspy_prod.tracking import exporting
from dspy_prod.tracking.exporter import Loop
from dspy_prod.tracking.exporting import told
from dspy_prod.tracking.sink import Sink
from dspy_prod.tracking.tally import ADMITTED, Tally

REFUSED = MlflowException("a tag is too long", INVALID_PARAMETER_VALUE)


class Store(Sink):
    """An MLflow that refuses the spans of some traces."""

    def __init__(self, refuses: set[str]) -> None:
        super().__init__("sqlite:///nowhere.db", "tracked")
        self.refuses = refuses
        self.written: set[str] = set()
        self.linked: dict[str, str] = {}

    def open(self) -> str:
        return "1"

    def answers(self) -> bool:
        return True

    def write(
        self,
        spans: list[dict[str, Any]],
        infos: list[dict[str, Any]],
        places: Mapping[str, str],
        lines: Mapping[str, str] | None = None,
    ) -> None:
        these = {span["trace_id"] for span in spans}
        if these & self.refuses:
            raise REFUSED
        self.written |= these

    def link(self, runs: Mapping[str, str]) -> None:
        self.linked.update(runs)


def exported(sink: Sink, *batches: Mapping[str, Any]) -> tuple[Loop, list[dict[str, Any]]]:
    """A loop that has written these batches, and what it said."""
    said = io.StringIO()
    loop = Loop(sink, said)
    loop.read(io.StringIO("".join(json.dumps(batch) + "\n" for batch in batches)))
    loop.run()
    return loop, [json.loads(line) for line in said.getvalue().splitlines()]


def batch(number: int, *traces: str) -> dict[str, Any]:
    """A batch of traces that were made on a run."""
    spans = [{"trace_id": trace} for trace in traces]
    runs = {f"tr-{trace}": "run" for trace in traces}
    rest: dict[str, Any] = {"infos": [], "places": {}, "lines": {}}
    return {"batch": number, "traces": len(traces), "spans": spans, "runs": runs, **rest}


def test_what_is_written_singly_is_on_its_run_too() -> None:
    """One trace that MLflow refused took those written beside it off their run."""
    store = Store(refuses={"b"})
    _, said = exported(store, batch(1, "a", "b", "c"))
    assert store.written == {"a", "c"}
    assert {"tr-a", "tr-c"} <= set(store.linked)
    assert said[-1] == {"batch": 1, "lost": 1, "links": [0, 0]}


def test_the_last_word_tells_what_was_refused_from_what_was_never_sent() -> None:
    """Traces that MLflow had refused "were not handed over before the program was ended"."""
    tally = Tally()
    tally.numbers[ADMITTED] = 3
    loop, _ = exported(Store(refuses={"b"}), batch(1, "a", "b", "c"))
    assert "1 traces did not reach MLflow at there (MLflow refused 1: MlflowException" in loop.last_word(
        tally.file, "there"
    )
    assert "ended before" not in loop.last_word(tally.file, "there")
    tally.numbers[ADMITTED] = 5
    assert "3 traces" in loop.last_word(tally.file, "there")
    assert "; the program was ended before they were handed over)" in loop.last_word(tally.file, "there")
    tally.close()


class Client:
    """MLflow's client; the run "gone" takes nothing."""

    error: Exception
    linked: list[str]

    def __init__(self, uri: str) -> None: ...

    def link_traces_to_run(self, traces: list[str], run: str) -> None:
        if run == "gone":
            raise self.error
        self.linked.append(run)


@pytest.fixture
def linked(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes links to runs when that one fails in this way; the runs that got theirs."""

    def links(error: Exception) -> list[str]:
        monkeypatch.setattr(Client, "error", error, raising=False)
        monkeypatch.setattr(Client, "linked", [], raising=False)
        monkeypatch.setattr("mlflow.MlflowClient", Client)
        Sink("sqlite:///nowhere.db", "tracked").link({"tr-a": "gone", "tr-b": "there"})
        return Client.linked

    return links


@pytest.mark.parametrize("code", [RESOURCE_DOES_NOT_EXIST, INVALID_PARAMETER_VALUE])
def test_a_run_that_takes_no_traces_holds_nothing_up(linked: Any, code: int) -> None:
    """Its traces are in their experiment; those of another run are on that."""
    assert linked(MlflowException("no such run", code)) == ["there"]


def test_a_server_that_is_away_is_tried_again_for_a_run_too(linked: Any) -> None:
    """Only what MLflow itself refuses is given up."""
    with pytest.raises(ConnectionError):
        linked(ConnectionError("away"))


def _codes() -> list[tuple[Callable[[], int] | int | None, bool]]:
    return [(None, False), (lambda: 400, True), (lambda: 404, False), (lambda: 429, False), (lambda: 500, False)]


@pytest.mark.parametrize(("status", "final"), _codes())
def test_what_is_final(status: Any, final: bool) -> None:
    """A refusal of the content is; being away, or a place that is not there yet, is not."""
    error = RuntimeError("whatever")
    if status is not None:
        error.get_http_status_code = status  # type: ignore[attr-defined]
    assert exporting.is_final(error) is final


def test_a_long_password_is_not_cut_in_two_before_it_is_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """`health().tracking` showed the first half of it: without the `@` behind it, nobody knew it for a password."""
    password = "longpass" * 40
    said = told(OSError(f"no connection to postgresql://me:{password}@there/db"))
    assert "longpass" not in said
    assert "there/db" in said
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "correct horse battery")
    assert "horse" not in told(OSError("refused correct horse battery"))
    assert len(told(OSError("x" * 900))) == 200

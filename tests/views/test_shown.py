"""What the library answers with shows itself: in a notebook, when printed, as a DataFrame; and stays what it was."""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Iterator
from io import StringIO
from typing import Any

import dspy
import pytest
from dspy.utils.exceptions import LMUnexpectedError
from rich.console import Console

import dspy_prod
from dspy_prod.records import CallRecord
from dspy_prod.registry.aliases.journal import AuditEntry
from dspy_prod.registry.aliases.listed import History
from dspy_prod.registry.published.difference import PredictorDiff, VersionDiff
from dspy_prod.status.listed import Records
from dspy_prod.status.spending import CostRows
from dspy_prod.testing import ScriptedEngine

MODEL = "openai/some-model"


@pytest.fixture
def lm(request: pytest.FixtureRequest) -> Iterator[dspy_prod.LM]:
    """An LM with a budget, a limit and a fallback, that has answered three of four calls of two users."""
    answers = ["one", "two", "three", ValueError("four")]
    made = dspy_prod.LM(
        MODEL, engine=ScriptedEngine(answers, output_tokens=1000), store=f"memory://{request.node.name}",
        max_tokens=2000,
        prices={MODEL: dspy_prod.Price(input=1, output=1)}, budget=dspy_prod.Budget(usd=1, per="day", name="purse"),
        limit=dspy_prod.RateLimit(rpm=60), retry=dspy_prod.Retry(attempts=1),
    )  # fmt: skip
    for number in range(3):
        with dspy_prod.call_context(user=f"<b>u{number % 2}", tags={"feature": "triage"} if number else None):
            made(f"question {number}")
    with pytest.raises(LMUnexpectedError, match="four"):
        made("question 3")
    yield made
    made.close()


def test_everything_is_a_table_in_a_notebook_and_text_when_printed(lm: Any) -> None:
    """Health, costs, sums, records and previews: escaped HTML, text without markup, and colours on a console."""
    shown = {
        "Health: healthy": lm.health(), "projected for the month": lm.costs(), "Costs by user": lm.costs(by="user"),
        "4 calls": lm.ledger.records(), "would be sent": lm.preview("a question"), "1 call": lm.ledger.records(limit=1),
    }  # fmt: skip
    for words, each in shown.items():
        html = each._repr_html_()
        assert words in html
        assert "<table" in html
        assert "<b>" not in html
        assert words in str(each)
        out = StringIO()
        Console(file=out, width=200, force_terminal=True).print(each)
        assert words in out.getvalue()
    assert "&lt;b&gt;u0" in shown["Costs by user"]._repr_html_()
    assert "purse" in shown["Health: healthy"]._repr_html_()
    assert "purse" in str(shown["would be sent"])


def test_what_is_shown_is_what_it_was(lm: Any) -> None:
    """Lists are lists and equal to lists, models have their fields, their JSON and their repr."""
    records, rows, health = lm.ledger.records(), lm.costs(by="user"), lm.health()
    assert isinstance(records, list)
    assert records == list(records)
    assert isinstance(records[:2], Records)
    assert isinstance(records[0], CallRecord)
    assert [*records[:2], *records[2:]] == records
    assert "Costs by user" in str(rows[:1]), "the first ones were a list of reprs"
    assert rows[:1] == [rows[0]]
    assert "Moves of it" in History([], "it")[:3]._repr_html_()
    assert isinstance(rows, CostRows)
    assert rows == sorted(rows, key=lambda row: -row.usd)
    assert repr(rows[0]).startswith("CostRow(value='<b>u0'")
    assert repr(health).startswith("Health(status='healthy'")
    assert json.loads(health.model_dump_json())["costs"]["budgets"][0]["name"] == "purse"


def test_money_and_records_as_frames(lm: Any) -> None:
    """Sums of a frame are those of the ledger; days and times are days and times, a tag is a column."""
    pandas = pytest.importorskip("pandas")
    days, users, by_day = lm.costs().to_frame(), lm.costs(by="user").to_frame(), lm.costs(by="day").to_frame()
    records = lm.ledger.records().to_frame()
    spent = lm.costs().today_usd
    assert spent > 0.003
    for frame, column in ((days, "usd"), (by_day, "usd"), (records, "cost_usd")):
        assert frame[column].sum() == pytest.approx(spent)
    assert list(users.user) == ["<b>u0", "<b>u1"]
    assert list(users.attempts) == [2, 1]
    today = dt.datetime.now(dt.timezone.utc)
    for frame in (days, by_day):
        assert abs(frame.day.iloc[-1] - pandas.Timestamp(today.replace(tzinfo=None))) < pandas.Timedelta(days=2)
    assert str(records.started_at.dt.tz) == "UTC"
    assert abs((records.started_at - pandas.Timestamp(today)).dt.total_seconds()).max() < 300
    assert list(records["tag:feature"].fillna("")) == ["", "triage", "triage", ""]
    assert list(records.outcome) == ["error", "ok", "ok", "ok"]


def test_frames_of_nothing_have_their_columns() -> None:
    """A cell that plots them works before the first call too."""
    pytest.importorskip("pandas")
    lm = dspy_prod.LM(MODEL, engine=ScriptedEngine(), store="memory://frames-of-nothing")
    assert list(lm.costs().to_frame().columns) == ["day", "usd"]
    assert list(lm.costs(by="model").to_frame().columns)[:2] == ["model", "usd"]
    assert {"cost_usd", "started_at", "model"} <= set(lm.ledger.records().to_frame().columns)
    assert str(lm.costs(by="model")).startswith("Costs by model")
    assert "0 calls" in lm.ledger.records()._repr_html_()


def test_a_cost_that_is_not_known_is_missing_and_not_zero() -> None:
    """In the table a word, in the frame nothing."""
    pytest.importorskip("pandas")
    made = {"route": "primary", "attempt": 1, "outcome": "ok", "started_at": 0.0, "model": MODEL, "call_id": "c"}
    records = Records([CallRecord(id="a", cost_nano=None, **made), CallRecord(id="b", cost_nano=5_000, **made)])  # type: ignore[arg-type]
    assert list(records.to_frame().cost_usd.isna()) == [True, False]
    assert "unknown" in str(records)


def test_an_open_circuit_stands_out(lm: Any) -> None:
    """What is wrong comes first, in words and in red."""
    lm.breaker("force_open")
    health = lm.health()
    assert "Health: degraded" in str(health)
    assert str(health).index("forced open") < str(health).index("breaker primary")
    assert '<span style="color:#d2453f">Health: degraded</span>' in health._repr_html_()
    assert "no: circuit_open" in str(lm.preview("q"))


def test_a_report_shows_what_a_call_did() -> None:
    """Who answered, what it cost, how long it took."""
    lm = dspy_prod.LM(
        MODEL, engine=ScriptedEngine('{"answer": "yes"}', output_tokens=1000), store="memory://a-report-shows",
        prices={MODEL: dspy_prod.Price(input=1, output=1)},
    )  # fmt: skip
    program = dspy_prod.Production(dspy.Predict("question -> answer"), name="asker")
    with dspy.context(lm=lm, adapter=dspy.JSONAdapter()):
        report = dspy_prod.call_report(program(question="q"))
    html = report._repr_html_()
    for words in ("A call of asker", "ok", MODEL, f"{report.cost_usd:.9f}"):
        assert words in html
        assert words in str(report)


def test_a_difference_and_a_history_show_themselves() -> None:
    """A diff in colours, still printed as one; moves as a table."""
    changed = PredictorDiff("a.b", "changed", instructions="--- x\n+++ y\n@@ -1 +1 @@\n-<old>\n+<new>\n")
    diff = VersionDiff("it", 1, 2, (changed, PredictorDiff("c", "equal")))
    html = diff._repr_html_()
    assert '<span style="color:#1f9254">+&lt;new&gt;</span>' in html
    assert '<span style="color:#d2453f">-&lt;old&gt;</span>' in html
    assert "it: version 1 -&gt; 2" in html
    assert str(diff) == str(changed)
    at = dt.datetime(2026, 1, 1, tzinfo=dt.timezone.utc)
    moves = History(
        [
            AuditEntry("promote", "applied", "production", None, 1, "me", at, "a <good> reason"),
            AuditEntry("promote", "refused", "production", 1, 2, "you", at, forced=True),
        ],
        "it",
    )
    assert "Moves of it&#x27;s aliases" in moves._repr_html_()
    assert "a &lt;good&gt; reason" in moves._repr_html_()
    assert "a <good> reason" in str(moves)
    assert "promote, forced" in str(moves)

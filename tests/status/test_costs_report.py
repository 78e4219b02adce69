"""The costs report: its figures are the ledger's, its pages load and run nothing, whatever names are called."""

from __future__ import annotations

import datetime as dt
import json
import re
from html.parser import HTMLParser
from math import fsum
from pathlib import Path
from typing import Any

import pytest

import dspy_prod
from dspy_prod.cli import main
from dspy_prod.errors import ConfigError
from dspy_prod.records import NANO, CallRecord
from dspy_prod.status import costs_report
from dspy_prod.status.costs_report import CostsReport, report
from dspy_prod.stores.memory import MemoryStore
from dspy_prod.testing import FakeClock, ScriptedEngine
from dspy_prod.views import Page
from dspy_prod.views.charts import Bars, Layer, _round_up

NOON = dt.datetime(2026, 11, 23, 12, tzinfo=dt.timezone.utc)
TODAY = NOON.date()
HOSTILE = "<script>alert(1)</script>\"'&\u202eevil"


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock(NOON.timestamp())


@pytest.fixture
def store(clock: FakeClock) -> MemoryStore:
    return MemoryStore("costs", clock=clock)


def ago(days: int) -> dt.date:
    return TODAY - dt.timedelta(days=days)


def record(store: MemoryStore, days: int, usd: float | None, **fields: Any) -> None:
    """A call, so many days ago."""
    record.count += 1  # type: ignore[attr-defined]
    known = {"outcome": "ok", "model": "openai/m", "route": "primary", "attempt": 1, **fields}
    cost = None if usd is None else round(usd * NANO)
    at = NOON.timestamp() - 86_400 * days
    store.append(CallRecord(id=f"r{record.count}", call_id="c", started_at=at, cost_nano=cost, **known))  # type: ignore[attr-defined]


record.count = 0  # type: ignore[attr-defined]


def bars(found: CostsReport) -> dict[str, Bars]:
    """The charts, by their titles."""
    view = found._view()
    assert isinstance(view, Page)
    return {part.title: part for part in view.parts if isinstance(part, Bars)}


def layers(chart: Bars) -> list[tuple[str, float, str]]:
    return [(layer.name, round(layer.total, 9), layer.note) for layer in chart.layers]


def test_each_bar_is_a_day_of_the_ledger(store: MemoryStore, clock: FakeClock) -> None:
    """Values are stacked the dearest first; calls without one make the bar whole."""
    record(store, 2, 1.0, user="ann", tenant="acme", prompt_version="triage/1")
    record(store, 0, 3.0, user="bob", tenant="acme", variant="cot")
    record(store, 0, 0.5, user="ann")
    record(store, 0, 0.25)
    record(store, 0, None)
    found = report(store, clock)
    assert (found.since, found.until) == (ago(2), TODAY)
    assert found.days == {ago(2): 1.0, ago(1): 0.0, TODAY: 3.75}
    assert (found.total.usd, found.total.unknown_cost, found.total.attempts) == (4.75, 1, 5)
    charts = bars(found)
    users = charts["Cost per day by user"]
    assert users.bars == [str(ago(2)), str(ago(1)), str(TODAY)]
    assert layers(users) == [("bob", 3.0, ""), ("ann", 1.5, ""), ("(none)", 0.25, "")]
    assert [list(layer.values) for layer in users.layers] == [[0, 0, 3.0], [1.0, 0, 0.5], [0, 0, 0.25]]
    for chart in charts.values():
        assert [fsum(each) for each in zip(*(layer.values for layer in chart.layers), strict=True)] == [1.0, 0.0, 3.75]
    assert set(charts) == {f"Cost per day by {name}" for name in ("model", "version", "user", "tenant", "variant")}
    assert "No call of these days has a program." in found.to_html()
    assert "0.250000 USD more are of calls without one." in found.to_html()
    assert found.to_dict()["by"]["user"][0]["usd"] == 3.0
    json.dumps(found.to_dict())


def test_what_is_no_single_value_is_told(store: MemoryStore, clock: FakeClock) -> None:
    """The cheaper ones, with how many there are; a value that is itself called so stands apart."""
    for number in range(12):
        record(store, 0, 12.0 - number, user=f"u{number}")
    record(store, 0, 50.0, user="(other)")
    record(store, 0, 40.0, user="(none)")
    found = report(store, clock, by=["user"])
    told = layers(bars(found)["Cost per day by user"])
    assert told[:3] == [("'(other)'", 50.0, ""), ("'(none)'", 40.0, ""), ("u0", 12.0, "")]
    assert len(told) == 9
    assert told[-1] == ("(other)", fsum(range(1, 7)), "6 more")


def test_values_beyond_those_that_the_ledger_keeps_apart(
    store: MemoryStore, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are one layer, and one row."""
    monkeypatch.setattr("dspy_prod.stores.memory_ledger.MAX_VALUES_PER_DAY", 5)
    for number in range(5):
        record(store, 0, 1.0, user=f"u{number}")
    found = report(store, clock, by=["user"])
    assert layers(bars(found)["Cost per day by user"])[-1] == (
        "(other)",
        2.0,
        "beyond those that the ledger keeps apart",
    )
    assert "(other) are values beyond those that the ledger keeps apart in a day." in found.to_html()


class Seen(HTMLParser):
    """What a browser would make of it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str | None]] = []
        self.said = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.said += data


def test_names_are_shown_and_never_run(store: MemoryStore, clock: FakeClock, tmp_path: Path) -> None:
    """Whatever somebody called himself: in tables, charts, tooltips, legends and the title."""
    names: dict[str, Any] = dict.fromkeys(("user", "tenant", "variant", "program", "prompt_version"), HOSTILE)
    record(store, 0, 1.0, **{**names, "model": HOSTILE})
    for number in range(10):
        record(store, 0, 2.0, user=f"{HOSTILE}{number}")
    path = tmp_path / "costs.html"
    text = report(store, clock).to_html(path)
    assert path.read_text(encoding="utf-8") == text
    page = Seen(text)
    assert page.tags <= {
        *("html", "head", "meta", "title", "style", "body", "h1", "section", "div", "span", "table", "thead", "tbody"),
        *("tr", "th", "td", "p", "br", "figure", "figcaption", "svg", "rect", "ul", "li", "b"),
    }
    assert not [name for name, _ in page.attributes if name.startswith("on") or name in ("src", "href", "srcset")]
    assert "url(" not in text
    assert not re.search(r"https?://", text)
    assert "<script>alert(1)</script>" in page.said
    assert "\u202e" not in text
    assert "default-src 'none'" in text


@pytest.mark.parametrize(("days", "label", "count"), [(92, "day", 92), (100, "week", 15), (800, "month", 27)])
def test_long_reports_have_bars_that_can_be_seen(
    days: int, label: str, count: int, store: MemoryStore, clock: FakeClock
) -> None:
    """Of days, then weeks, then months; each sums what is in it."""
    for number in range(days):
        record(store, number, 1.0)
    chart = bars(report(store, clock, since=ago(days), by=["model"]))[f"Cost per {label} by model"]
    assert abs(len(chart.bars) - count) <= 1
    assert fsum(chart.layers[0].values) == days


def test_an_empty_ledger_has_a_report_too(store: MemoryStore, clock: FakeClock) -> None:
    """Without charts."""
    found = report(store, clock)
    assert bars(found) == {}
    assert found.total.usd == 0.0
    assert "<svg" not in found.to_html()
    assert str(found)


def test_an_lm_reports_what_it_spent(store: MemoryStore, clock: FakeClock) -> None:
    """Its days and its dimensions, of its store."""
    record(store, 40, 1.0, user="ann", tags=(("team", "x"),))
    record(store, 1, 2.0, user="bob")
    lm = dspy_prod.LM("openai/m", engine=ScriptedEngine("hi"), store=store, clock=clock, max_tokens=10)
    assert lm.costs_report().total.usd == 2.0
    found = lm.costs_report(since=dt.timedelta(days=50), by=["tag:team"])
    assert found.total.usd == 3.0
    assert [row.value for row in found.by["tag:team"]] == ["x"]
    assert lm.costs_report(since=dt.datetime.combine(ago(40), dt.time(1), dt.timezone.utc)).total.usd == 3.0
    with pytest.raises(ConfigError, match="by"):
        lm.costs_report(by=["day"])
    with pytest.raises(ConfigError, match="by"):
        lm.costs_report(by=["users"])
    with pytest.raises(TypeError, match=r"datetime\.date"):
        lm.costs_report(since="7d")  # type: ignore[arg-type]


def test_the_command_writes_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Into a folder that is there; the figures are those of `costs --by`."""
    url = f"sqlite:///{tmp_path / 'state.db'}"
    lm = dspy_prod.LM("openai/m", engine=ScriptedEngine("hi"), store=url, max_tokens=10, prices={
        "openai/m": dspy_prod.Price(input=1000, output=1000)
    })  # fmt: skip
    with dspy_prod.call_context(user="ann"):
        lm("hello")
    lm.close()
    path = tmp_path / "costs.html"
    assert main(["costs", "--store", url, "--html", str(path)]) == 0
    assert str(path) in capsys.readouterr().out.replace("\n", "")
    assert "ann" in path.read_text(encoding="utf-8")
    assert main(["costs", "--store", url, "--html", str(path), "--by", "user", "--since", "7d", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found["by"]) == ["user"]
    assert main(["costs", "--store", url, "--html", str(tmp_path / "nowhere" / "x.html")]) != 0
    assert "there is no folder" in capsys.readouterr().err


def test_charts_have_an_axis_that_can_be_read() -> None:
    """Round numbers, and a text for those who see no picture."""
    assert [_round_up(value) for value in (0.0, 0.93, 1.0, 7.2, 0.00034)] == [0.0, 1.0, 1.0, 8.0, pytest.approx(0.0004)]
    chart = Bars("Cost", ("a", "b"), (Layer("x", (1.0, 0.0)), Layer("(none)", (0.0, 0.5), rest=True)))
    assert "x" in chart.text()
    assert "66.7 %" in chart.text()
    assert 'aria-label="Cost: x $1.00, (none) $0.5000"' in chart.html()
    assert Bars("Nothing", (), ()).html()
    assert costs_report.DIMENSIONS

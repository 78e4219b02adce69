"""The dashboard and the rules that are shipped speak of metrics and labels that a service really exposes."""

from __future__ import annotations

import asyncio
import json
import re
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import dspy_prod
from dspy_prod.cli import main
from dspy_prod.cli.grafana import DASHBOARD, RULES, shipped
from dspy_prod.metrics.catalogue import CATALOGUE
from dspy_prod.metrics.exposition import name_of
from dspy_prod.testing import Provider
from tests.metrics.support import busy, failing, lm_at, scraped

DOCS = Path(__file__).parents[2] / "docs"
NAME = "dashboard"
_METRIC = re.compile(r"\b(?:dspy_prod|gen_ai)_\w+")
_LABELS = re.compile(r"\b(dspy_prod_\w+|gen_ai_\w+|error_type)\s*(?:=|!)")
_OF_PROMETHEUS = {"le", "job", "instance"}


@pytest.fixture(scope="module")
def samples() -> dict[str, set[str]]:
    """The labels of each sample that a service with everything exposes."""
    with Provider(faults=failing(NAME), usage=(20, 50)) as provider, dspy_prod.metrics.prometheus(port=0) as endpoint:
        lms = busy(provider, NAME)
        found: dict[str, set[str]] = {}
        for family in scraped(endpoint.url).values():
            for sample in family.samples:
                found.setdefault(sample.name, set()).update(sample.labels)
        del lms
    return found


def dashboard() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(shipped(DASHBOARD))
    return loaded


def queries() -> dict[str, str]:
    """Every query of the dashboard, by panel, and every rule."""
    found = {
        f"{panel['title']} {target['refId']}": target["expr"]
        for panel in dashboard()["panels"]
        for target in panel.get("targets", ())
    }
    for rule in shipped(RULES).split("- alert: ")[1:]:
        expression = rule.partition("expr:")[2]
        found[rule.split()[0]] = re.split(r"\n {8}(?:for|labels):", expression)[0]
    return found


def used(query: str) -> tuple[set[str], set[str]]:
    """The samples and the labels that a query speaks of."""
    labels = {label for braces in re.findall(r"{(.*?)}", query) for label in _LABELS.findall(braces)}
    grouped = re.findall(r"\b(?:by|without)\s*\((.*?)\)", query)
    labels |= {label.strip() for group in grouped for label in group.split(",")} - _OF_PROMETHEUS
    rest = re.sub(r"\b(?:by|without)\s*\(.*?\)", "", re.sub(r"{.*?}", "", query))
    return set(_METRIC.findall(rest)), labels


def of_the_catalogue() -> Mapping[str, str]:
    """Names in Prometheus, with the shape of each."""
    return {name_of(name, metric.unit): metric.shape for name, metric in CATALOGUE.items()}


RARE = {
    "dspy_prod_fallback_responses_total": {"dspy_prod_reason"},
    "dspy_prod_throttled_total": {"dspy_prod_route", "gen_ai_request_model", "gen_ai_provider_name"},
}
"""What this service has not seen, and would expose."""


@pytest.mark.parametrize("panel", sorted(queries()))
def test_each_query_speaks_of_what_is_there(panel: str, samples: dict[str, set[str]]) -> None:
    """A panel without data looks like a service without trouble."""
    metrics, labels = used(queries()[panel])
    assert metrics
    known = {**RARE, **samples}
    assert metrics <= known.keys()
    told = set().union(*(known[metric] for metric in metrics))
    assert labels <= told


def test_every_metric_is_in_the_catalogue_and_the_other_way_round(samples: dict[str, set[str]]) -> None:
    """With the type that Prometheus gives it."""
    ends = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_count", "_sum")}
    expected = {f"{name}{end}" for name, shape in of_the_catalogue().items() for end in ends[shape]}
    assert {*samples, *RARE} == expected


def test_the_guide_lists_every_metric() -> None:
    """Whoever builds a panel of their own finds its name there."""
    guide = (DOCS / "guide" / "signals.md").read_text("utf-8")
    ends = {"counter": "_total", "gauge": "", "histogram": ""}
    assert all(f"`{name}{ends[shape]}`" in guide for name, shape in of_the_catalogue().items())
    assert all(f"`{name}`" in guide for name in CATALOGUE)


@pytest.mark.parametrize("query", ["LLMErrors", "Share of failed requests A"])
def test_who_leaves_is_no_failure_of_the_model(query: str) -> None:
    """Clients that close their browser must wake nobody; whatever else did not end well must."""
    compared, pattern = re.findall(r'dspy_prod_outcome(!~|!=|=~|=)"(.*?)"', queries()[query])[0]
    assert compared == "!~"
    ends = {"ok", "cancelled", "error", "timeout", "abandoned"}
    assert {each for each in ends if not re.fullmatch(pattern, each)} == {"error", "timeout", "abandoned"}


def test_who_leaves_is_counted_as_cancelled() -> None:
    """A call that is cancelled while it waits for its answer, as of a client that has left."""
    arrived = threading.Event()
    with (
        Provider(latency=5.0, faults=lambda _: arrived.set()) as provider,
        dspy_prod.metrics.prometheus(port=0) as endpoint,
    ):
        lm = lm_at(provider, "left")

        async def leave() -> None:
            call = asyncio.create_task(lm.acall("question"))
            assert await asyncio.to_thread(arrived.wait, 20)
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call

        asyncio.run(leave())
        lm.pipeline.store.flush(5)
        samples = scraped(endpoint.url)["dspy_prod_attempts"].samples
        of_it = [each.labels for each in samples if each.labels["gen_ai_request_model"] == "left"]
    assert [each["dspy_prod_outcome"] for each in of_it] == ["cancelled"]


def test_the_dashboard_has_its_rows_and_no_panel_above_another() -> None:
    """As it was drawn: Grafana would move them."""
    found = dashboard()
    rows = [panel["title"] for panel in found["panels"] if panel["type"] == "row"]
    assert rows == [
        "Money", "Calls and errors", "Latency", "Circuit breakers", "Limiter", "Cache", "Experiments",
        "Tracking and store",
    ]  # fmt: skip
    assert len({panel["id"] for panel in found["panels"]}) == len(found["panels"])
    places = [
        (x, y)
        for panel in found["panels"]
        for place in [panel["gridPos"]]
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(places) == len(set(places))
    assert {x for x, _ in places} <= set(range(24))
    sources = {json.dumps(target["datasource"]) for panel in found["panels"] for target in panel.get("targets", ())}
    assert sources == {json.dumps({"type": "prometheus", "uid": "${datasource}"})}


@pytest.mark.parametrize(("words", "name"), [((), DASHBOARD), (("--rules",), RULES)])
def test_a_shell_prints_both_as_they_are(words: tuple[str, ...], name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Into a file that Grafana imports, and one that Prometheus reads."""
    assert main(["grafana", *words]) == 0
    assert capsys.readouterr().out == shipped(name)
    assert main(["grafana", *words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"name": name, "text": shipped(name)}


def test_the_package_has_them() -> None:
    """Whoever has only installed it has no repository to look into."""
    package = Path(dspy_prod.__file__).parent
    assert (package / "metrics" / "grafana" / DASHBOARD).read_text("utf-8") == shipped(DASHBOARD)
    named = re.findall(r"`(docs/[\w./]+|examples/[\w./]+\.\w+)`", "".join(map(_text, (DOCS / "guide").glob("*.md"))))
    assert named == [], "pages must not send readers to files that are in no installed package"


def _text(path: Path) -> str:
    return path.read_text("utf-8")


def test_the_code_of_the_guide_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As it stands there, in one session."""
    from opentelemetry import metrics

    guide = (DOCS / "guide" / "signals.md").read_text("utf-8")
    blocks = re.findall(r"```python\n(.*?)```", guide, re.DOTALL)
    assert len(blocks) == 5
    scope: dict[str, Any] = {}
    try:
        for block in blocks:
            exec(compile(block, "signals.md", "exec"), scope)
    finally:
        if "endpoint" in scope:
            scope["endpoint"].close()
        dspy_prod.metrics.disable()
    told = capsys.readouterr().out
    assert "http://127.0.0.1:" in told
    assert "WebhookStatus(sent=0" in told
    assert metrics.get_meter_provider() is not scope["provider"]


def test_what_is_not_there_is_drawn_as_zero_only_where_nothing_could_be_missing() -> None:
    """Of one sample in a window a rate tells nothing: `or vector(0)` made a calm line of it."""
    rates = {name: query for name, query in queries().items() if "rate(" in query}
    assert len(rates) > 10
    assert not [name for name, query in rates.items() if "vector(0)" in query]


def test_the_sums_of_a_day_have_what_a_young_counter_began_with() -> None:
    """`increase` leaves out the first value that was scraped: the only one of a model that was asked once."""
    days = {name: query for name, query in queries().items() if "increase(" in query and "24 h" in name}
    assert len(days) == 4
    for name, query in days.items():
        increased = re.search(r"increase\((.*?)\[24h\]", query)
        assert increased is not None, name
        assert f"sum(min_over_time({increased[1]}[24h]) unless {increased[1]} offset 24h)" in query, name
        assert "$model" in query, name


def test_the_guide_scrapes_as_often_as_grafana_believes() -> None:
    assert "scrape_interval: 15s" in (DOCS / "guide" / "signals.md").read_text(encoding="utf-8")

"""What people read of an experiment: the decision and why first, and the same facts in every form."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import dspy
import pytest

from dspy_prod import Experiment, Rollout, call_context
from dspy_prod.experiments.document import document
from dspy_prod.experiments.history import MOST, History
from dspy_prod.experiments.wording import Wording, progress, way
from dspy_prod.options.metrics import Metric, cost, latency
from tests.experiments.cards import card, told
from tests.experiments.conftest import Triage

HOSTILE = "<script>alert('x')</script> $x_{ \x1b[31m & \"q\""


class Page(HTMLParser):
    """The tags of a page, and its words."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.words = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.words += data


@pytest.fixture(scope="module")
def better() -> Any:
    """The card of a candidate that is six points better."""
    return card(3_500, quality=0.07, state="decided")


# -- words -----------------------------------------------------------------------------------------------------------
def test_the_decision_and_its_reason_come_first(better: Any) -> None:
    """Whoever prints a card reads what to do before any number."""
    title, decision, reason, *_ = [line.strip() for line in str(better).splitlines() if line.strip()]
    assert title == "Experiment triage-cot"
    assert decision.split(maxsplit=1) == ["decision", "promote cot"]
    assert reason.startswith("cot is better on resolved")
    assert repr(better) == "<Scorecard of 'triage-cot': decided, promote, 3,500 users>"


def test_a_table_has_each_metric_with_its_evidence(better: Any) -> None:
    """Means in the metric's own unit, the difference with its interval, and e-values beside what they need."""
    text = str(better)
    assert "fallback_rate" in text  # no name is folded
    assert "USD per 1,000 calls" in text
    assert "margin 2 points" in text
    assert " of 50" in text
    assert "proven" in text
    assert all(len(line) <= 110 for line in text.splitlines())


def test_a_rollback_tells_who_was_hurt() -> None:
    """Users of a candidate that was rolled back are counted, and late outcomes are told."""
    bad = card(1_500, quality=-0.3, state="decided", late=3)
    assert (bad.decision, bad.serves, bad.hurt) == ("rollback", "control", bad.users["cot"])
    text = str(bad)
    assert "roll back: everybody gets control" in text
    assert f"users hurt  {bad.hurt}" in text
    assert "3 outcomes came after their window" in text


def test_evidence_is_told_as_a_way() -> None:
    """From 1 to what is needed, by its logarithm; proven is proven, however large the number."""
    assert (way(1.0, 100.0), way(10.0, 100.0), way(1e30, 100.0), way(0.2, 100.0)) == (0.0, 0.5, 1.0, 0.0)
    assert progress(617.4, 266.7) == "617 of 267: proven"
    assert progress(266.6, 266.7) == "267 of 267: 99 %"  # rounded is not proven
    assert progress(3.14, 266.7) == "3.1 of 267: 20 %"
    assert progress(1e100, 50.0) == "1e100 of 50: proven"


def test_numbers_are_written_in_the_metric_s_unit() -> None:
    """Shares in percent and points, money by the thousand calls, latency in seconds; margins on the same scale."""
    share, money, tail = Wording(Metric("resolved", margin=0.02)), Wording(cost()), Wording(latency())
    stars = Wording(Metric("stars", bounds=(1.0, 5.0), missing=1.0, margin=0.2))
    assert (share.value(0.8012), share.difference(-0.0004), share.margin) == ("80.1 %", "+0.0 points", -0.02)
    assert (money.value(0.000323), money.difference(0.1), money.margin) == ("0.323", "+10.0 %", 0.1)
    assert (tail.value(0.5), tail.difference(-0.02), tail.margin) == ("0.5 s", "-0.02 s", None)
    assert (stars.value(4.25), stars.range(-0.1, 0.25), stars.accepted()) == ("4.25", "-0.1 to +0.25", "0.2")
    assert share.value(None) == share.difference(float("nan")) == "–"


# -- data ------------------------------------------------------------------------------------------------------------
def test_a_card_is_plain_data(better: Any) -> None:
    """JSON has all of it, without infinities; frames have a row a metric, and a row a point of history."""
    said = json.loads(json.dumps(better.to_dict(), allow_nan=False))
    assert said["users"] == better.users
    assert said["candidates"]["cot"]["metrics"][0]["status"] == "better"
    assert said["audit"][-1]["what"] == "promote"
    assert {each["metric"] for each in said["history"]} == {each.metric for each in better.metrics}
    frame = better.to_frame()
    assert list(frame["metric"]) == [each.metric for each in better.metrics]
    first = frame.iloc[0]
    assert (first["candidate"], first["role"]) == ("cot", "success")
    assert first["low"] < first["difference"] < first["high"]
    assert frame["better"].isna().tolist() == [False, True, True, True, True]
    points = better.to_frame(history=True)
    assert len(points) == len(better.history)
    assert points.groupby("metric")["units"].max().tolist() == [3_500] * 5


def test_users_are_told_by_stage(better: Any) -> None:
    """Each user once, where it was seen first."""
    assert [each.stage for each in better.stages] == ["5 %", "50 %"]
    assert sum(sum(each.users.values()) for each in better.stages) == sum(better.users.values()) == 3_500


# -- history ---------------------------------------------------------------------------------------------------------
def test_a_history_stays_short_and_even() -> None:
    """However many units there were: at most so many points, evenly apart, the first and the last among them."""
    evidence, history, _ = told(1_700)
    looks = [each for each in history.looks(evidence) if each.metric == "cost"]
    units = [each.units for each in looks]
    assert MOST / 2 <= len(units) <= MOST + 1
    assert units[-1] == 1_700
    assert {after - before for before, after in pairwise(units[:-1])} == {16}
    assert looks[-1].at - looks[-2].at == 60.0 * (units[-1] - units[-2])


def test_a_history_goes_on_from_a_checkpoint_as_if_nothing_had_happened() -> None:
    """What is drawn depends on the units alone, not on who looked when."""
    evidence, history, _ = told(700)
    restored = History(5, 1, json.loads(history.state()))
    assert restored.looks(evidence) == history.looks(evidence)
    assert restored.state() == history.state() == json.dumps(json.loads(history.state()), allow_nan=False)
    assert len(history.state()) < 100_000


def test_many_series_share_the_room() -> None:
    """With more candidates each has fewer points, so that a checkpoint stays small."""
    evidence, history, _ = told(500, candidates=tuple("abcdefg"))
    counts = {
        each: sum(look[:2] == each for look in history.looks(evidence)) for each in [("a", "cost"), ("g", "cost")]
    }
    assert all(20 <= count <= 58 for count in counts.values()), counts


def live(store: str, **more: Any) -> Experiment:
    return Experiment(
        "live", variants={"control": Triage(), "new": Triage("Think first.")}, store=store,
        metrics=[Metric("resolved", margin=0.02)], rollout=Rollout(stages=(0.25, 0.5), min_users=10, min_time=0.0),
        **more,
    )  # fmt: skip


def test_a_live_experiment_has_a_history_whoever_reads_it(asked: Any, store: str, tmp_path: Path) -> None:
    """Read at once or look by look, or again after the checkpoint was lost, the points are the same."""
    asked()
    exp = live(store)
    exp.start()
    for number in range(150):
        with call_context(user=f"u{number}"):
            exp(message="hi")
        exp.record(f"u{number}", resolved=number % 3 > 0)
        if number % 40 == 39:
            exp.step()
    card = exp.scorecard()
    assert [each.stage for each in card.stages] == ["25 %", "50 %"]
    assert [each.what for each in card.audit] == ["start", "stage"]
    assert sum(card.users.values()) == 150
    for metric in ("resolved", "cost"):
        units = [each.units for each in card.history if each.metric == metric]
        assert units == sorted(set(units))
        assert len(units) > 100
        assert units[-1] == 150
    other = live(store).scorecard()
    assert other.history == card.history
    trials = exp._works.trials
    kept = trials.checkpoint("live")
    assert kept is not None
    broken = {**json.loads(kept.state), "evidence": {"version": 0}}
    assert trials.save("live", json.dumps(broken), kept.revision)
    assert live(store).scorecard().history == card.history
    assert "Experiment live" in card.to_html(tmp_path / "card.html").read_text("utf-8")


# -- pages -----------------------------------------------------------------------------------------------------------
def test_a_page_has_everything_and_needs_nothing(better: Any, tmp_path: Path) -> None:
    """Decision, reason, a chart of all differences and one a metric, users and audit; no script, no address."""
    path = better.to_html(tmp_path / "card.html")
    text = path.read_text("utf-8")
    page = Page(text)
    for words in ("promote cot", "cot is better on resolved", "users hurt", "Users by stage", "stage 2 of the rollout"):
        assert words in page.words
    assert page.tags.count("svg") == 1 + len(better.metrics)
    assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
    assert not [name for name, _ in page.attributes if name in ("src", "href", "srcset") or name.startswith("on")]
    assert "url(" not in text
    assert "http://" not in text.replace("http-equiv", "")


@pytest.mark.parametrize("form", ["page", "notebook", "text"])
def test_hostile_names_are_shown_for_what_they_are(form: str) -> None:
    """Names of experiment, variants and metrics are nobody's markup, and steer no screen."""
    odd = card(
        400, name=HOSTILE, control=f"{HOSTILE} c", candidates=(HOSTILE,), metrics=(Metric(HOSTILE, margin=0.02),)
    )
    if form == "text":
        assert "\x1b" not in str(odd)
        return
    text = document(odd) if form == "page" else odd._repr_html_()
    page = Page(text)
    assert "script" not in page.tags
    assert "<script>alert('x')</script>" in page.words
    assert "\x1b" not in text


def test_a_card_without_users_is_a_card() -> None:
    """Before the first user there is nothing to draw, and nothing fails."""
    empty = card(0)
    assert empty.history == ()
    assert "keep going" in str(empty)
    assert "no users yet" in document(empty)
    assert empty.to_frame()["difference"].isna().all()
    empty.plot()


def test_a_figure_has_a_chart_a_metric(better: Any) -> None:
    """The differences above, each metric's course below; in a notebook it is part of the card."""
    figure = better.plot()
    assert len([axes for axes in figure.get_axes() if axes.get_visible()]) == 1 + len(better.metrics)
    assert "data:image/png;base64," in better._repr_html_()


def test_a_name_in_a_figure_is_no_formula() -> None:
    """A dollar sign begins no mathematics, which would fail to draw."""
    odd = card(300, name=r"$\frac{$", candidates=("a$b_{",), metrics=(Metric("$x^{", margin=0.02),))
    assert odd._repr_html_()


def test_without_matplotlib_the_tables_say_it_all(better: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A notebook without it shows the tables; a page needs none."""
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    assert "img" not in Page(better._repr_html_()).tags
    assert "promote cot" in document(better)


class Free(dspy.Module):
    """Answers without any LM."""

    def forward(self, message: str) -> Any:
        return dspy.Prediction(label=message)


def test_variants_that_cost_nothing_are_promoted_and_the_card_says_how(tmp_path: Path) -> None:
    programs = {"control": Free(), "new": Free()}
    exp = Experiment("e", variants=programs, metrics=[Metric("ok", margin=0.05)], store=f"memory://{tmp_path.name}")
    for number in range(400):
        with call_context(user=f"u{number}"):
            exp(message="hi")
        exp.record(f"u{number}", ok=float(exp.assign(f"u{number}") == "new" or number % 2))
    shown = exp.scorecard()
    assert next(each for each in shown.metrics if each.metric == "cost").status == "no_worse"
    assert "all 0 so far" in str(shown)
    assert "all 0 so far" in Page(document(shown)).words
    assert "all 0 so far" not in str(card(2_000, cost=0.0)), "control's are not"

"""The ledger answers questions about calls and lets a person settle what the provider did not tell."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from dspy.lm15 import Request
from dspy.utils.exceptions import LMError, LMTimeoutError

import dspy_prod
from dspy_prod import Budget, Price, call_context
from dspy_prod.records import NANO, CallRecord
from dspy_prod.status.costs import costs_by
from dspy_prod.status.ledger import Ledger
from dspy_prod.stores.base import Store
from dspy_prod.stores.memory import MemoryStore
from dspy_prod.stores.sqlite.store import SqliteStore
from dspy_prod.testing import FakeClock, ScriptedEngine

UTC = dt.timezone.utc
NOON = dt.datetime(2026, 11, 23, 12, tzinfo=UTC)
HOUR = dt.timedelta(hours=1)


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock(NOON.timestamp())


@pytest.fixture(params=["memory", "sqlite"])
def store(request: pytest.FixtureRequest, clock: FakeClock, tmp_path: Path) -> Iterator[Store]:
    made: Store
    if request.param == "memory":
        made = MemoryStore("ledger", clock=clock)
    else:
        made = SqliteStore(str(tmp_path / "state.db"), "ledger", clock=clock)
    yield made
    made.close()


@pytest.fixture
def ledger(store: Store, clock: FakeClock) -> Ledger:
    return Ledger(store, clock)


def put(store: Store, id: str, at: dt.datetime = NOON, usd: float | None = 1.0, **fields: Any) -> None:
    """Append one record."""
    known = {"call_id": "c", "model": "openai/m", "route": "primary", "attempt": 1, "outcome": "ok", **fields}
    cost = None if usd is None else round(usd * NANO)
    store.append(CallRecord(id=id, started_at=at.timestamp(), cost_nano=cost, **known))


def ids(records: list[CallRecord]) -> list[str]:
    """The records' ids."""
    return [record.id for record in records]


def test_records_come_newest_first(store: Store, ledger: Ledger) -> None:
    """The order is by start, whatever the order in which calls ended."""
    for hours in (2, 0, 1):
        put(store, f"{hours}h ago", NOON - hours * HOUR)
    assert ids(ledger.records()) == ["0h ago", "1h ago", "2h ago"]


def test_a_limit_keeps_the_newest(store: Store, ledger: Ledger) -> None:
    """And zero keeps none."""
    for hours in (2, 1, 0):
        put(store, f"{hours}h ago", NOON - hours * HOUR)
    assert ids(ledger.records(limit=2)) == ["0h ago", "1h ago"]
    assert ledger.records(limit=0) == []


@pytest.mark.parametrize(
    "since",
    [
        (NOON - HOUR).timestamp(),
        NOON - HOUR,
        (NOON - HOUR).astimezone().replace(tzinfo=None),
        dt.timedelta(hours=1),
        (NOON - HOUR).astimezone(dt.timezone(dt.timedelta(hours=9))),
    ],
    ids=["epoch", "aware", "naive local", "ago", "another zone"],
)
def test_a_moment_can_be_said_in_every_usual_way(since: Any, store: Store, ledger: Ledger) -> None:
    """`since` is inclusive and `until` is not, in every form."""
    for hours in (0, 1, 2):
        put(store, f"{hours}h ago", NOON - hours * HOUR)
    assert ids(ledger.records(since=since)) == ["0h ago", "1h ago"]
    assert ids(ledger.records(until=since)) == ["2h ago"]


def test_a_date_begins_at_midnight_utc(store: Store, ledger: Ledger) -> None:
    """Days are those of the cost summary."""
    midnight = dt.datetime(2026, 11, 23, tzinfo=UTC)
    put(store, "before", midnight - dt.timedelta(seconds=1))
    put(store, "after", midnight)
    assert ids(ledger.records(since=midnight.date())) == ["after"]


@pytest.mark.parametrize("moment", ["yesterday", True, float("nan")])
def test_an_impossible_moment_is_refused(moment: Any, ledger: Ledger) -> None:
    """The message says what to pass."""
    with pytest.raises(TypeError, match="timedelta"):
        ledger.records(since=moment)


@pytest.mark.parametrize("limit", [-1, True, 1.5])
def test_an_impossible_limit_is_refused(limit: Any, ledger: Ledger) -> None:
    """Only a whole number of records makes sense."""
    with pytest.raises(ValueError, match="limit="):
        ledger.records(limit=limit)


@pytest.mark.parametrize(
    "field",
    [
        "user",
        "tenant",
        "session",
        "model",
        "program",
        "experiment",
        "variant",
        "prompt_version",
        "outcome",
        "call_id",
        "trace_id",
    ],
)
def test_records_are_found_by_every_field(field: str, store: Store, ledger: Ledger) -> None:
    """Each filter compares its own field, and several must all match."""
    mine: dict[str, Any] = {field: "x"}
    other: dict[str, Any] = {field: "y"}
    put(store, "mine", **mine)
    put(store, "other", **other)
    assert ids(ledger.records(**mine)) == ["mine"]
    assert ledger.records(**mine, since=NOON + HOUR) == []
    assert ledger.records(**{**mine, field: "z"}) == []


def test_a_call_that_returned_is_in_the_ledger(store: Store, clock: FakeClock) -> None:
    """Reading flushes first; the record carries the context of the call."""
    lm = dspy_prod.LM("openai/gpt-4o-mini", engine=ScriptedEngine("hi"), store=store, clock=clock, max_tokens=9)
    with call_context(user="u1", tenant="acme", session="s9", tags={"feature": "triage"}):
        lm("q")
        lm("q")
    cached, sent = lm.ledger.records(user="u1")
    assert (sent.outcome, cached.outcome) == ("ok", "cached")
    assert (sent.tenant, sent.session, sent.tags) == ("acme", "s9", (("feature", "triage"),))
    assert lm.ledger.records(since=dt.timedelta(minutes=1)) == [cached, sent]
    assert "ledger" in repr(lm.ledger)


# -- unconfirmed cost ------------------------------------------------------------------------------------------------


@pytest.fixture
def timed_out(store: Store, clock: FakeClock) -> dspy_prod.LM:
    """An LM whose only call ended with an unknown outcome, charged at its bound."""
    lm = dspy_prod.LM(
        "unit/model", engine=ScriptedEngine(LMTimeoutError("late")), store=store, clock=clock, retry=False,
        max_tokens=100, prices={"unit/model": Price(input=1000, output=1000)}, budget=Budget(usd=0.3, per="day"),
        breaker=False,
    )  # fmt: skip
    with pytest.raises(LMError):
        lm("q")
    return lm


def test_resolving_gives_money_back_to_budget_and_sums(timed_out: dspy_prod.LM) -> None:
    """The bound is replaced by the bill in the record, the rollups and the budget's account."""
    before = timed_out.costs()
    (open_record,) = timed_out.ledger.unconfirmed()
    assert open_record.cost_usd == before.today_usd == before.unconfirmed_usd
    resolved = timed_out.ledger.resolve(open_record.id, 0.05)
    assert (resolved.cost_usd, resolved.estimated) == (0.05, False)
    after = timed_out.costs()
    assert (after.today_usd, after.unconfirmed_usd) == (0.05, 0.0)
    assert after.remaining_usd == pytest.approx(0.25)
    assert [(b.spent_usd, b.unconfirmed_usd) for b in after.budgets] == [(0.05, 0.0)]
    assert timed_out.ledger.unconfirmed() == []


def test_resolving_lets_the_next_call_through(timed_out: dspy_prod.LM) -> None:
    """A budget that was blocked by an upper bound is usable again at once."""
    assert timed_out.preview("q").reason == "budget_exceeded"
    (open_record,) = timed_out.ledger.unconfirmed()
    timed_out.ledger.resolve(open_record.id, 0)
    assert timed_out.preview("q").affordable


def test_resolving_what_is_known_needs_a_second_word(timed_out: dspy_prod.LM) -> None:
    """A confirmed cost is only replaced on purpose."""
    (open_record,) = timed_out.ledger.unconfirmed()
    timed_out.ledger.resolve(open_record.id, 0.05)
    with pytest.raises(ValueError, match=r"0\.05.*overwrite=True"):
        timed_out.ledger.resolve(open_record.id, 0.5)
    assert timed_out.ledger.resolve(open_record.id, 0.02, overwrite=True).cost_usd == 0.02
    assert timed_out.costs().today_usd == 0.02


def test_resolving_an_unknown_cost_makes_it_known(store: Store, ledger: Ledger) -> None:
    """A call of a model without a price can be given its cost by hand."""
    put(store, "unpriced", usd=None)
    assert ledger.resolve("unpriced", 0.25).cost_usd == 0.25
    assert (ledger.total().usd, ledger.total().unknown_cost) == (0.25, 0)


def test_resolving_an_unknown_id_says_where_ids_are(ledger: Ledger) -> None:
    """It is a LookupError with the remedy."""
    with pytest.raises(LookupError, match=r"'nope'.*ledger\.unconfirmed\(\)"):
        ledger.resolve("nope", 1.0)


@pytest.mark.parametrize("usd", [-0.01, float("nan"), float("inf"), True, "1", 1e12])
def test_resolving_to_an_impossible_cost_is_refused(usd: Any, store: Store, ledger: Ledger) -> None:
    """And nothing changes."""
    put(store, "a", estimated=True)
    with pytest.raises(ValueError, match="usd="):
        ledger.resolve("a", usd)
    assert ids(ledger.unconfirmed()) == ["a"]


def test_unconfirmed_finds_records_of_every_day(store: Store, ledger: Ledger) -> None:
    """Newest first, from a moment on if wanted, and never a confirmed one."""
    for days in (0, 1, 40, 400):
        put(store, f"open-{days}", NOON - days * 24 * HOUR, estimated=True)
        put(store, f"done-{days}", NOON - days * 24 * HOUR)
    assert ids(ledger.unconfirmed()) == ["open-0", "open-1", "open-40", "open-400"]
    assert ids(ledger.unconfirmed(since=dt.timedelta(days=2))) == ["open-0", "open-1"]
    assert ids(ledger.unconfirmed(since=NOON)) == ["open-0"]


# -- sums ------------------------------------------------------------------------------------------------------------


def test_total_sums_days_and_values(store: Store, ledger: Ledger) -> None:
    """Both days are inclusive; a dimension's value picks its own records."""
    for days in range(5):
        put(store, f"{days}", NOON - days * 24 * HOUR, usd=1.0, user=f"u{days % 2}", input_tokens=10)
    today = NOON.date()
    assert (ledger.total().usd, ledger.total().attempts, ledger.total().input_tokens) == (5.0, 5, 50)
    assert ledger.total(since=today - dt.timedelta(days=1)).usd == 2.0
    assert ledger.total(since=today - dt.timedelta(days=3), until=today - dt.timedelta(days=2)).usd == 2.0
    assert ledger.total(by="user", value="u0").usd == 3.0
    assert ledger.total(by="user", value="nobody").usd == 0.0


def test_total_refuses_half_a_question(ledger: Ledger) -> None:
    """`by` and `value` belong together, dimensions are known, and sums are by whole days."""
    with pytest.raises(ValueError, match="together"):
        ledger.total(by="user")
    with pytest.raises(ValueError, match="together"):
        ledger.total(value="u1")
    with pytest.raises(ValueError, match="'model'"):
        ledger.total(by="color", value="red")
    with pytest.raises(TypeError, match="whole days"):
        ledger.total(since=NOON)


def test_a_late_answer_confirms_by_itself(store: Store, clock: FakeClock) -> None:
    """A provider that tells usage leaves nothing to resolve."""

    def answer(_: Request) -> str:
        return "hi"

    lm = dspy_prod.LM("openai/gpt-4o-mini", engine=ScriptedEngine(answer), store=store, clock=clock, max_tokens=9)
    lm("q")
    assert lm.ledger.unconfirmed() == []


HALF = "\ud800x"


def test_half_a_character_in_a_filter_finds_its_own_records_or_none(store: Store, ledger: Ledger) -> None:
    """SQLite answered a name that UTF-8 cannot carry with UnicodeEncodeError, and recorded it as a question mark."""
    put(store, "r", user=HALF, tags=(("who", HALF),))
    put(store, "q", user="?x")
    assert [record.id for record in ledger.records(user=HALF)] == ["r"]
    assert [record.id for record in ledger.records(user="?x")] == ["q"]
    assert ledger.total(by="user", value=HALF).attempts == ledger.total(by="tag:who", value=HALF).attempts == 1
    for name in ("user", "tenant", "session", "model", "program", "variant", "outcome", "call_id", "trace_id"):
        assert ledger.records(**{name: "\udfff"}) == []
    assert ledger.total(by="tag:\udfff", value="a").attempts == 0
    assert store.account("\udfff").spent == 0
    with pytest.raises(LookupError, match="no record"):
        ledger.resolve("\udfff", 1.0)


def test_a_user_called_other_is_not_all_the_others(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a store no longer told apart went onto the bill of whoever had chosen that name."""
    for module in ("memory_ledger", "sqlite.ledger"):
        monkeypatch.setattr(f"dspy_prod.stores.{module}.MAX_VALUES_PER_DAY", 6)
    ledger = Ledger(store)
    for number, user in enumerate(["(other)", "\\(other)", "a", "b", "c", "d"]):
        put(store, f"r{number}", model="m", user=user)
        store.flush(10)
    rows = costs_by(store, "user")
    assert {(row.value, row.rest): row.attempts for row in rows} == {
        ("(other)", False): 1, ("\\(other)", False): 1, ("a", False): 1, ("b", False): 1, ("(other)", True): 2,
    }  # fmt: skip
    for row in rows:
        if not row.rest:
            found = ledger.total(by="user", value=row.value)
            assert (found.attempts, found.value, found.rest) == (1, row.value, False)

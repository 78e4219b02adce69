"""The calls of programs in Redis: how many are kept and for how long, what it costs to find them, what is damaged."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dspy_prod.stores.programs import ProgramCall
from dspy_prod.stores.redis import programs
from dspy_prod.stores.redis.asking import KEPT_FOR
from dspy_prod.stores.redis.program_rows import moment, moment_from
from dspy_prod.stores.redis.program_steps import INDEXED, STARTED
from tests.stores.redis.looking import commands, keys_of
from tests.stores.redis.standin import Served
from tests.stores.support import DAY
from tests.stores.test_programs import FULL, call, counts


def ids(calls: list[ProgramCall]) -> list[str]:
    return [each.id for each in calls]


def indexed(store: Served) -> dict[str, int]:
    """How many calls each index has."""
    client, key = store.connection.client(), store.connection.key
    return {name: client.zcard(key("programs", "by", name)) for name in (STARTED, *INDEXED)}


# -- how long and how many ---------------------------------------------------------------------------------------------
def test_every_key_ends_400_days_after_it_was_last_written(served: Served) -> None:
    served.programs.append(FULL)
    served.flush()
    kept = keys_of(served.connection)
    assert {key for key in kept if not key.startswith("programs:sums:2025-11-23:")} == {
        *("programs", "programs:days", "programs:ends:2025-11-23"),
        *(f"programs:by:{name}" for name in (STARTED, *INDEXED)),
    }
    assert set(kept.values()) <= {KEPT_FOR, KEPT_FOR - 1}


def test_the_newest_are_kept_in_every_index_and_all_are_counted(open_served: Any) -> None:
    store = open_served(max_records=50)
    for number in range(130):
        fields = {name: f"{name} {number % 3}" for name in INDEXED}
        store.programs.append(call(f"c{number}", started_at=DAY + number, **fields))
    assert ids(store.programs.calls()) == [f"c{number}" for number in range(129, 79, -1)]
    assert ids(store.programs.calls(user="user 0")) == [f"c{number}" for number in range(129, 79, -3)]
    assert indexed(store) == dict.fromkeys((STARTED, *INDEXED), 50)
    assert store.connection.client().hlen(store.connection.key("programs")) == 50
    assert [each[-1] for each in counts(store)] == [130]


def test_a_call_that_comes_twice_is_found_once(served: Served) -> None:
    for at in (DAY, DAY + 5):
        served.programs.append(call("c", started_at=at, user="u"))
        served.flush()
    assert [each.started_at for each in served.programs.calls(user="u")] == [DAY]
    assert indexed(served)[STARTED] == 1


def test_a_day_whose_sums_are_gone_is_forgotten(served: Served) -> None:
    served.programs.append(call(started_at=DAY))
    served.flush()
    client, key = served.connection.client(), served.connection.key
    client.delete(key("programs", "ends", "2025-11-23"), key("programs", "sums", "2025-11-23", "all"))
    assert served.programs.sums() == []
    served.programs.append(call(started_at=DAY + 86_400))
    assert [each[0] for each in counts(served)] == ["2025-11-24"]
    assert client.smembers(key("programs", "days")) == {b"2025-11-24"}


# -- finding -----------------------------------------------------------------------------------------------------------
def test_the_calls_of_a_value_are_found_without_looking_at_others(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(300):
        served.programs.append(call(f"c{number}", started_at=DAY + number, user=f"u{number % 100}", tenant="t"))
    served.flush()
    looked: list[Any] = []
    read = served.connection.read
    monkeypatch.setattr(served.connection, "read", lambda asked: looked.extend(found := read(asked)) or found)
    assert ids(served.programs.calls(user="u7")) == ["c207", "c107", "c7"]
    assert ids(served.programs.calls(user="u7", since=DAY + 8, until=DAY + 207)) == ["c107"]
    assert ids(served.programs.calls(tenant="t", limit=2)) == ["c299", "c298"]
    assert [reply[0] for reply in looked] == [3, 1, 300], "calls looked at; of a field with few values more are"


def test_those_that_match_are_found_over_many_pages(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(programs, "_PAGE", 7)
    for number in range(60):
        status = "error" if number % 20 == 5 else "ok"
        served.programs.append(call(f"c{number}", started_at=DAY + number // 2, status=status, user="u\0x"))
        served.programs.append(call(f"d{number}", started_at=DAY + number // 2, user="u"))
    assert ids(served.programs.calls(status="error")) == ["c45", "c25", "c5"]
    assert ids(served.programs.calls(status="error", limit=2)) == ["c45", "c25"]
    assert ids(served.programs.calls(limit=9)) == ids(served.programs.calls())[:9]
    assert ids(served.programs.calls(user="u\0x")) == [f"c{number}" for number in reversed(range(60))]
    assert ids(served.programs.calls(user="u")) == [f"d{number}" for number in reversed(range(60))]
    assert ids(served.programs.calls(user="u", since=DAY + 28, until=DAY + 29)) == ["d57", "d56"]


def test_sums_of_one_value_are_read_alone(served: Served) -> None:
    for number in range(50):
        served.programs.append(call(tenant=f"t{number}", status="error" if number else "ok"))
    served.flush()
    found: list[Any] = []
    done = commands(served.connection, lambda: found.extend(counts(served, dimension="tenant", value="t0")))
    assert found == [("2025-11-23", "t0", "ok", "", 1)]
    assert "hgetall" not in done


@given(st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=2, max_size=5))
def test_moments_are_written_so_that_they_sort(moments: list[float]) -> None:
    in_order = sorted(moments)
    assert sorted(moments, key=moment_from) == in_order
    written = [moment(at, place) for place, at in enumerate(in_order)]
    assert sorted(written) == written


# -- what does not fit, and what is damaged ----------------------------------------------------------------------------
def test_what_json_cannot_carry_is_cleaned_and_the_others_are_untouched(served: Served) -> None:
    served.programs.append(call("a"))
    served.programs.append(call("b", user="\ud800", cost_nano=2**70, started_at=DAY + 1, tags=(("\ud800", "x"),)))
    served.programs.append(call("c", started_at=DAY + 2))
    assert ids(served.programs.calls()) == ["c", "b", "a"]
    assert ids(served.programs.calls(user="\ud800")) == ["b"]
    assert [each[-1] for each in counts(served)] == [3]
    [sums] = served.programs.sums()
    assert sums.totals.cost_nano == 2**53


@pytest.mark.parametrize("wrong", [{"started_at": float("nan")}, {"latency": float("inf")}, {"cost_nano": "much"}])
def test_a_call_that_cannot_be_written_is_told_and_harms_no_other(
    served: Served, wrong: Any, caplog: pytest.LogCaptureFixture
) -> None:
    served.programs.append(call("a"))
    served.programs.append(call("b", **wrong))
    assert ids(served.programs.calls()) == ["a"]
    assert "cannot be written" in caplog.text


def test_a_sum_ends_at_the_largest_number_there_is_and_stops_no_commit(served: Served) -> None:
    for _ in range(3):
        served.programs.append(call(cost_nano=2**62))
        served.flush()
    [sums] = served.programs.sums()
    assert (sums.totals.calls, sums.totals.cost_nano) == (3, 2**63 - 1)


def test_a_damaged_record_is_told_and_passed_over(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    for number in range(4):
        served.programs.append(call(f"c{number}", started_at=DAY + number, user="u"))
    served.flush()
    client, key = served.connection.client(), served.connection.key("programs")
    client.hset(key, mapping={"c1": b"\xff", "c2": b'{"id": "c2", "user": "u"}'})
    assert ids(served.programs.calls()) == ids(served.programs.calls(user="u")) == ["c3", "c0"]
    assert served.programs.calls(id="c1") == []
    assert "damaged" in caplog.text


def test_fields_of_a_later_release_are_passed_over(served: Served) -> None:
    served.programs.append(call("c"))
    served.flush()
    client, key = served.connection.client(), served.connection.key("programs")
    client.hset(key, "c", client.hget(key, "c").replace(b'{"id"', b'{"colour":"red","id"'))
    assert served.programs.calls() == [call("c")]


def test_of_a_closed_store_the_lost_call_is_told(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    served.close()
    served.programs.append(call())
    assert "the record of a call of 'triage' is lost" in caplog.text

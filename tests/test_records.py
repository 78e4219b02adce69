"""Records and their sums, which are built and stored by position: each number under its own name."""

from __future__ import annotations

import random
from functools import reduce

import pytest

from dspy_prod.records import CallRecord, Totals, rollup_keys, variant_key

FACTS = {
    "id": "i", "call_id": "c", "started_at": 1.5, "model": "m", "route": "r", "attempt": 2, "outcome": "error",
    "cost_nano": 3, "estimated": True, "error": "E", "status": 418, "input_tokens": 4, "output_tokens": 5,
    "cached_tokens": 6, "reasoning_tokens": 7, "cached": False, "latency": 8.5, "waited": 9.5, "user": "u",
    "tenant": "t", "session": "s", "priority": "high", "program": "p", "experiment": "x", "variant": "v",
    "prompt_version": "pv", "tags": (("a", "b"),), "trace_id": "tr", "accounts": ("acc",),
    "reason": "r", "run": "n", "saved_nano": 8,
}  # fmt: skip


def test_a_record_survives_its_dictionary() -> None:
    """Every field goes out and comes back under its name."""
    record = CallRecord(**FACTS)  # type: ignore[arg-type]
    row = record.to_dict()
    assert (row["tags"], row["accounts"], row["cost_usd"], row["list_cost_usd"]) == ({"a": "b"}, ["acc"], 3e-9, 3e-9)
    assert CallRecord.from_dict({**row, "unknown": 1}) == record
    assert set(FACTS) == set(CallRecord._fields)


@pytest.mark.parametrize(
    ("changed", "sums"),
    [
        (
            {},
            {"cost_nano": 3, "unconfirmed_nano": 3, "unknown_cost": 0, "attempts": 1, "cached": 0, "failed": 1},
        ),
        (
            {"outcome": "ok", "estimated": False},
            {"cost_nano": 3, "unconfirmed_nano": 0, "unknown_cost": 0, "attempts": 1, "cached": 0, "failed": 0},
        ),
        (
            {"outcome": "cached", "cached": True, "estimated": False, "cost_nano": None},
            {
                "cost_nano": 0,
                "unconfirmed_nano": 0,
                "unknown_cost": 1,
                "attempts": 0,
                "cached": 1,
                "failed": 0,
                "saved_nano": 8,
                "saved": 1,
            },
        ),
        (
            {"outcome": "cached", "cached": True, "estimated": False, "cost_nano": 0, "saved_nano": None},
            {"cost_nano": 0, "unconfirmed_nano": 0, "unknown_cost": 0, "attempts": 0, "cached": 1, "failed": 0},
        ),
    ],
)
def test_a_records_share_in_the_sums(changed: dict[str, object], sums: dict[str, int]) -> None:
    """An attempt that failed, one that was answered, one that the cache spared."""
    record = CallRecord(**{**FACTS, **changed})  # type: ignore[arg-type]
    nothing_saved = {"saved_nano": 0, "saved": 0}
    assert Totals.of(record)._asdict() == {**nothing_saved, **sums, "input_tokens": 4, "output_tokens": 5}


def test_the_list_cost_of_a_record_is_its_cost_or_what_the_cache_has_saved() -> None:
    """A cached answer whose cost nobody knows has none: it was not free."""
    asked = CallRecord(**FACTS)  # type: ignore[arg-type]
    assert (asked.list_nano, asked._replace(cost_nano=None).list_cost_usd) == (3, None)
    cached = asked._replace(cached=True, cost_nano=0)
    assert (cached.list_nano, cached.list_cost_usd) == (8, 8e-9)
    unknown = cached._replace(saved_nano=None)
    assert (unknown.list_nano, unknown.to_dict()["list_cost_usd"]) == (None, None)
    sums = Totals.of(asked, cached, unknown)
    assert (sums.list_nano, sums.unknown_list) == (3 + 8, 1)
    assert Totals.of_hits([8, None]) == Totals(cached=2, saved_nano=8, saved=1)


def test_sums_add_up_field_by_field() -> None:
    """Neighbours must not mix."""
    one = Totals(*range(1, 11))
    assert one.plus(Totals(*range(10, 110, 10))) == Totals(*(n + 10 * n for n in range(1, 11)))


def test_a_record_is_summed_under_each_of_its_values() -> None:
    """`("all", "")` comes first; what the context did not say is not summed."""
    keys = rollup_keys(CallRecord(**FACTS))  # type: ignore[arg-type]
    assert keys == [
        *(("all", ""), ("model", "m"), ("user", "u"), ("tenant", "t"), ("program", "p")),
        *(("experiment", "x"), ("variant", "x/v")),
        *(("prompt", "pv"), ("run", "n"), ("tag:a", "b")),
    ]
    assert rollup_keys(CallRecord("i", "c", 0.0, "m", "r", 1, "ok", 0)) == [("all", ""), ("model", "m")]


def test_no_two_variants_are_summed_as_one() -> None:
    """Every experiment has a `control`; and names may hold whatever stands between the two."""
    pairs = [(None, "a/b"), ("a", "b"), ("a/b", "c"), ("a", "b/c"), ("a%2Fb", "c"), (None, "control"), ("a", "control")]
    assert len({variant_key(*pair) for pair in pairs}) == len(pairs)
    assert variant_key(None, "control") == "control"
    assert variant_key("e1", "control") == "e1/control"


def test_the_sum_over_records_is_that_of_each() -> None:
    chance = random.Random(3)
    records = [
        CallRecord(
            str(number), "c", 0.0, "m", "primary", 1, chance.choice(["ok", "error", "cached"]),
            chance.choice([None, 0, 7]), chance.random() < 0.3, input_tokens=chance.choice([None, 5]),
            output_tokens=chance.choice([None, 2]), cached=chance.random() < 0.3,
            saved_nano=chance.choice([None, 0, 9]),
        )
        for number in range(50)
    ]  # fmt: skip
    for rows in (
        records,
        records[:1],
        [row for row in records if row.cached],
        [row for row in records if not row.cached],
    ):
        assert Totals.of(*rows) == reduce(Totals.plus, map(Totals.of, rows))

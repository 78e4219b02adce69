"""The ledger in Redis: rows, hits and sums, whatever is written over them."""

from __future__ import annotations

import random
import re
import uuid
from collections.abc import Sequence
from datetime import datetime, timezone
from typing import Any

import pytest

from dspy_prod.records import OTHER, CallRecord, Totals, rollup_keys
from dspy_prod.stores.durable.served import Served
from dspy_prod.stores.memory_ledger import MAX_VALUES_PER_DAY, day_of
from dspy_prod.stores.redis import ledger as module
from dspy_prod.stores.redis.batch import STEPS, Batch
from dspy_prod.stores.redis.bodies import SELECTIVE
from dspy_prod.stores.redis.connection import Connection
from dspy_prod.stores.redis.hits import LEAST, PAGE, SPREAD
from dspy_prod.stores.redis.ledger import STEP, RedisLedger
from tests.stores.redis.committing import commit
from tests.stores.support import CENT, DAY, record


class Written(RedisLedger):
    """A ledger that commits what it is given."""

    def __init__(self, connection: Connection, max_records: int | None = None, **options: Any) -> None:
        super().__init__(connection, max_records, **options)
        self.server = connection

    def put(
        self, *appended: CallRecord, replaced: Sequence[CallRecord] = (), served: Sequence[Served] = ()
    ) -> list[CallRecord]:
        batch = Batch()
        lost = self.write(batch, appended, replaced, served)
        if len(batch):
            commit(self.server, batch)
        return lost

    def found(
        self, *, since: float | None = None, until: float | None = None, limit: int | None = None, **equals: str
    ) -> list[CallRecord]:
        """`records`, as a store has it."""
        return self.records(since, until, limit, equals)

    def totalled(
        self, dimension: str = "all", since_day: str | None = None, value: str | None = None
    ) -> list[tuple[str, str, Totals]]:
        """`totals`, as a store has it."""
        return self.totals(dimension, since_day, None, value)

    def count(self, name: str) -> int:
        """How many there are in a hash."""
        return int(self.server.read([("HLEN", f"{self._keys.base}:{name}")])[0])


@pytest.fixture
def ledger(connection: Connection) -> Written:
    return Written(connection)


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages of four."""
    changed = STEPS[STEP].replace(f"LEAST, PAGE, SPREAD = {LEAST}, {PAGE}, ", "LEAST, PAGE, SPREAD = 4, 4, ")
    assert changed != STEPS[STEP]
    monkeypatch.setitem(STEPS, STEP, changed)
    monkeypatch.setattr(module, "LEAST", 4)
    monkeypatch.setattr("dspy_prod.stores.redis.hits.PAGE", 4)


def hit(number: int, **fields: Any) -> CallRecord:
    """A cached answer as the pipeline records it; ids grow."""
    facts = {"call_id": f"call-{number:08x}", "started_at": DAY + number, "cached": True, "outcome": "cached"}
    return record(f"id-{number:08x}", **{**facts, **fields})


def summed(records: Sequence[CallRecord], dimension: str) -> dict[tuple[str, str], Totals]:
    """What the sums of a dimension must be."""
    found: dict[tuple[str, str], Totals] = {}
    for each in records:
        for name, value in rollup_keys(each):
            if name == dimension:
                key = day_of(each.started_at), value
                found[key] = found.get(key, Totals()).plus(Totals.of(each))
    return found


def sums_of(ledger: Written, dimension: str) -> dict[tuple[str, str], Totals]:
    """What they are, without those of which nothing is left."""
    rows = ledger.totalled(dimension=dimension)
    return {(day, value): sums for day, value, sums in rows if sums != Totals()}


def varied(chance: random.Random, number: int) -> CallRecord:
    """A record of any kind."""
    names = (*SELECTIVE[1:9], "program")
    fields: dict[str, Any] = {name: chance.choice([None, "a", "b/c", "%", OTHER, f"{number}"]) for name in names}
    fields |= {"model": chance.choice(["x", "y"]), "started_at": DAY + chance.randrange(40) * 3_000}
    fields |= {"tags": chance.choice([(), (("team", "a"), ("zone", OTHER))]), "saved_nano": chance.choice([None, 7])}
    if chance.random() < 0.5:
        return hit(number, call_id=f"call-{number // 3:08x}", outcome=chance.choice(["cached", "stale"]), **fields)
    fields |= {"outcome": chance.choice(["ok", "ok", "error", "refused"]), "cost_nano": chance.choice([None, 0, 2**53])}
    fields |= {"estimated": chance.random() < 0.3, "input_tokens": chance.choice([None, 10]), "output_tokens": 3}
    return record(f"id-{number:08x}", **fields)


@pytest.mark.parametrize("seed", range(3))
def test_reads_cannot_tell_a_hit_from_a_row(ledger: Written, short: None, seed: int) -> None:
    """Every filter, two filters together, bounds and limits, whatever is on a page, loose, a row, or replaced."""
    chance = random.Random(seed)
    known: dict[str, CallRecord] = {}
    while len(known) < 150:
        new = [varied(chance, len(known) + more) for more in range(chance.choice([1, 2, 3, 9]))]
        again = [varied(chance, chance.randrange(len(known)))] if known and chance.random() < 0.4 else []
        was_hit = any(known[each.id].cached for each in again)
        known |= {each.id: each for each in (*new, *again)}
        if was_hit or chance.random() < 0.5:
            ledger.put(*new, replaced=again)
        else:
            ledger.put(*again, *new)
    newest_first = sorted(known.values(), key=lambda row: (row.started_at, row.id), reverse=True)
    assert ledger.found() == newest_first
    for _ in range(100):
        equals = {}
        for name in chance.sample(["id", *SELECTIVE, "route", "tag:team"], chance.choice([0, 1, 1, 2, 3])):
            equals[name] = "a" if name == "tag:team" else getattr(chance.choice(newest_first), name) or "a"
        since, until = (chance.choice([None, DAY + chance.randrange(40) * 3_000]) for _ in range(2))
        limit = chance.choice([None, 0, 1, 3, 20])
        expected = [
            row
            for row in newest_first
            if all({**row._asdict(), "tag:team": dict(row.tags).get("team")}[name] == v for name, v in equals.items())
            and (since is None or row.started_at >= since)
            and (until is None or row.started_at < until)
        ]
        assert ledger.found(since=since, until=until, limit=limit, **equals) == expected[:limit]
    for dimension in (
        "all",
        "model",
        "user",
        "tenant",
        "program",
        "experiment",
        "variant",
        "prompt",
        "run",
        "tag:zone",
    ):
        assert sums_of(ledger, dimension) == summed(newest_first, dimension)
    assert ledger.find(newest_first[7].id) == newest_first[7]
    assert ledger.find("nobody") is None


def test_hits_take_no_row_each(ledger: Written) -> None:
    """Those of small commits are loose until there are enough of them for a page."""
    written = [hit(number, user=f"u{number % 2}", latency=number / 8) for number in range(300)]
    for start in range(0, 300, 30):
        ledger.put(*written[start : start + 30])
        assert ledger.count("loose") < LEAST
    assert ledger.found() == written[::-1]
    assert ledger.count("rows") == 0
    assert ledger.count("page") == 3
    assert ledger.found(user="u1", limit=5) == written[::-1][:10:2]


def test_cached_answers_that_were_noted_together_are_pages(ledger: Written) -> None:
    """A page has no more than it may, and does not last longer than it may."""
    like = hit(0, user="u1")._replace(id="", call_id="", started_at=0.0)
    times = [DAY + number * (20.0 if number < 300 else 0.1) for number in range(600)]
    served = Served(like, [(at, number % 3 or None) for number, at in enumerate(times)])
    few = Served(like._replace(user="few"), [(DAY, 5)] * 3)
    ledger.put(served=[served, few])
    assert ledger.found(user="u1") == sorted(served.records(), key=lambda row: (row.started_at, row.id))[::-1]
    assert (ledger.count("loose"), ledger.count("rows")) == (3, 0)
    for value, sums in ledger.sums("user", None, None):
        assert sums == (Totals.of_hits(served.saved) if value == "u1" else Totals.of_hits([5] * 3))
    early = [row for row in served.records() if row.started_at < DAY + SPREAD / 2]
    assert sorted(ledger.found(until=DAY + SPREAD / 2, user="u1")) == sorted(early)


@pytest.mark.parametrize("cost", [2**53, 10**22, None])
def test_what_is_replaced_leaves_the_sums_exactly(ledger: Written, cost: int | None) -> None:
    """Also where a number is larger than a double can hold; and a correction that is too large stops nobody."""
    ledger.put(record("other", cost_nano=2**53 - 1, user="u"), record("r", cost_nano=cost, user="u"))
    kept = ledger.find("r")
    assert kept is not None
    assert kept.cost_nano == (cost if cost is None else 2**53)
    ledger.put(replaced=[record("r", cost_nano=1, user="v", estimated=True)])
    assert sums_of(ledger, "user") == {
        ("2025-11-23", "u"): Totals(cost_nano=2**53 - 1, attempts=1),
        ("2025-11-23", "v"): Totals(cost_nano=1, unconfirmed_nano=1, attempts=1),
    }
    assert ledger.found(user="v") == [record("r", cost_nano=1, user="v", estimated=True)]


def test_a_sum_stays_at_64_bits(ledger: Written) -> None:
    """It is no error: the commit would be half done."""
    for start in range(0, 1_100, 550):
        ledger.put(*(record(cost_nano=2**53) for _ in range(start, start + 550)))
    ((_, _, sums),) = ledger.totalled()
    assert sums.cost_nano == 2**63 - 1
    assert sums.attempts == 1_100


def test_what_a_record_can_hold_survives(ledger: Written) -> None:
    """Times to the last bit, and texts that no encoding carries as near as can be."""
    times = [DAY + 1 / 3, 1_763_900_000.123_456_7, 0.1, -1.5]
    rows = [
        record(f"r{at}", started_at=at, session="half \ud83d", user=5, reason="a\nb|c", saved_nano=0) for at in times
    ]
    hits = [hit(number, started_at=at, session="half \ud83d") for number, at in enumerate(times)]
    ledger.put(*rows, *hits)
    found = {row.id: row for row in ledger.found()}
    assert [found[row.id].started_at for row in (*rows, *hits)] == times + times
    assert {(row.session, row.user) for row in found.values()} == {("half \\ud83d", "5"), ("half \\ud83d", None)}
    assert found[rows[0].id].reason == "a\nb|c"
    assert len(ledger.found(session="half \ud83d")) == 8
    assert [type(row.cached) for row in found.values()] == [bool] * 8


@pytest.mark.parametrize("value", [1.5, float("nan"), "7", 2**70, object(), True])
@pytest.mark.parametrize("name", ["cost_nano", "saved_nano", "input_tokens", "reason", "user"])
def test_no_value_breaks_a_commit(ledger: Written, name: str, value: Any) -> None:
    """It would be half done."""
    bad = [record("bad", **{name: value}), hit(1, **{name: value})]
    assert ledger.put(*bad, record("good")) == []
    assert ledger.put(replaced=[each._replace(**{name: None}) for each in bad]) == []
    assert {row.id for row in ledger.found()} == {"bad", "id-00000001", "good"}
    assert {sums.input_tokens for _, _, sums in ledger.totalled()} == {0}


def test_a_record_without_a_day_or_with_impossible_tags_is_told_and_the_others_stay(ledger: Written) -> None:
    none: Any = None
    bad = [record(started_at=float("nan")), record(started_at=none), record(tags=none), record(tags=(("a",),))]
    assert ledger.put(*bad[:2], record("good"), replaced=bad[2:]) == bad
    assert [row.id for row in ledger.found()] == ["good"]


def test_fields_without_an_index_are_compared(ledger: Written) -> None:
    ledger.put(hit(1), record("row", attempt=1, started_at=DAY))
    assert [row.id for row in ledger.found(attempt="1")] == ["id-00000001", "row"]
    assert ledger.found(attempt="x") == []
    with pytest.raises(ValueError, match="colour"):
        ledger.found(colour="red")


def test_long_values_are_found_and_make_no_long_keys(ledger: Written) -> None:
    long = "é" * 5_000
    ledger.put(record("r", user=long), hit(1, user=long))
    assert {row.id for row in ledger.found(user=long)} == {"r", "id-00000001"}
    assert ledger.sums("user", None, None) == [(long, Totals(attempts=1, cached=1))]
    assert all(len(key) < 200 for key in ledger.server.client().scan_iter(f"*{ledger._keys.base[-12:]}:by*"))


def test_only_the_newest_are_kept_whether_they_are_hits_or_rows(connection: Connection, short: None) -> None:
    """Nothing of the others is left but their sums; no commit drops many at once."""
    ledger = Written(connection, 100)
    for number in range(600):
        fields = {"user": f"u{number}", "trace_id": f"t{number}", "started_at": DAY + number}
        ledger.put(hit(number, **fields) if number % 3 else record(f"id-{number:08x}", **fields))
    kept = ledger.found()
    assert 90 <= len(kept) <= 100
    assert [row.started_at for row in kept[:90]] == [DAY + 599 - number for number in range(90)]  # pages go as a whole
    assert ledger.totalled()[0][2].attempts == 200
    assert ledger.totalled()[0][2].cached == 400
    keys = connection.client().scan_iter(f"{connection.key('ledger')}:*:user:*")
    users = {key.rpartition(b":")[2] for key in keys}
    assert len(users) <= 100 + 4
    assert ledger.count("page") <= 30
    few = Written(connection, 1)
    few.put(record("last", started_at=DAY + 1_000))
    assert len(few.found()) > 50, "a bound that is lowered is reached step by step"
    for number in range(8):
        few.put(record(f"after{number}", started_at=DAY + 2_000 + number))
    assert [row.id for row in few.found()] == ["after7"]


def test_records_are_dropped_some_days_after_they_were_written(connection: Connection, ledger: Written) -> None:
    """However old the call was by then."""
    ledger.put(record("old", user="u"), *(hit(number) for number in range(70)))
    base = ledger._keys.base
    commands: list[tuple[Any, ...]] = []
    for name, member in (("rows", "old"), ("page", "000000000001")):
        (value,) = connection.read([("HGET", f"{base}:{name}", member)])
        came, rest = int(value[:5]), value[5:]
        assert datetime.now(timezone.utc).timestamp() // 86_400 - came <= 1
        commands.append(("HSET", f"{base}:{name}", member, b"%d%s" % (came - 91, rest)))
    connection.read(commands)
    ledger.put(record("new", started_at=DAY + 100))
    assert [row.id for row in ledger.found()] == ["new"]
    assert ledger.count("page") == 0


def test_every_key_ends_some_day_and_is_in_the_namespace(connection: Connection, ledger: Written, short: None) -> None:
    chance = random.Random(1)
    ledger.put(*(varied(chance, number) for number in range(60)))
    ledger.put(hit(100), replaced=[varied(chance, number) for number in range(0, 60, 7)])
    tag = connection.key("x").removesuffix(":x")
    keys = [key for key in connection.client().scan_iter("*") if key.startswith(tag.encode())]
    assert len(keys) > 50
    lives = connection.read([("TTL", key) for key in keys])
    assert [key for key, left in zip(keys, lives, strict=True) if left < 0] == []
    assert all(key.startswith(f"{tag}:ledger:".encode()) for key in keys)


def test_of_a_day_with_many_values_the_rest_is_summed_together(
    ledger: Written, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And comes out of the rest again, when a record is replaced."""
    bound = f"VALUES_OF_DAY = {MAX_VALUES_PER_DAY}\n"
    assert bound in STEPS[STEP]
    monkeypatch.setitem(STEPS, STEP, STEPS[STEP].replace(bound, "VALUES_OF_DAY = 6\n"))
    ledger.put(*(record(f"r{number}", user=f"u{number}", cost_nano=CENT) for number in range(10)))
    ledger.put(record("own", user=OTHER, started_at=DAY + 86_400))
    ledger.put(replaced=[record("r9", user="u9", cost_nano=3 * CENT)])
    sums = dict(ledger.sums("user", None, None))
    assert sums[OTHER] == Totals(cost_nano=7 * CENT, attempts=5)
    assert sums["\\" + OTHER].attempts == 1
    assert len(sums) == 7
    assert ledger.totalled(dimension="user", value="u1")[0][2].cost_nano == CENT


def test_days_are_those_of_the_calendar(ledger: Written) -> None:
    """What is replaced leaves the sums of its day, whichever that was."""
    chance = random.Random(3)
    times = [chance.uniform(-1e9, 4e9) for _ in range(60)] + [951_782_400.0, 951_868_799.9, 4_107_542_400.0, 0.0, -0.5]
    ledger.put(*(record(f"r{at}", started_at=at, cost_nano=5) for at in times))
    assert [sums.attempts for _, _, sums in ledger.totalled()] != []
    ledger.put(replaced=[record(f"r{at}", started_at=DAY, cost_nano=5) for at in times])
    assert {day: sums for day, _, sums in ledger.totalled() if sums != Totals()} == {
        "2025-11-23": Totals(cost_nano=5 * len(times), attempts=len(times))
    }


@pytest.mark.parametrize(
    ("name", "member", "left"), [("rows", "r3", 7), ("page", "000000000001", 4), ("loose", "id-00000004", 7)]
)
def test_what_is_damaged_does_not_stop_the_others(
    connection: Connection, ledger: Written, short: None, name: str, member: str, left: int
) -> None:
    rows = [record(f"r{number}", started_at=DAY - number) for number in (1, 2, 3)]
    ledger.put(*rows, *(hit(number) for number in range(4)))
    ledger.put(hit(4))
    for damage in (b"", b"nothing", b'20000|{"id":', b'20000|{"id":"x"}', b"[1]\n{}", b"20000|[[{},[[1]]]]", b"1|[5]"):
        key = f"{ledger._keys.base}:{name}"
        assert connection.read([("HSET", key, member, damage)]) == [0]
        assert len(ledger.found()) == left
        assert ledger.found(user="u") == []
    ledger.put(replaced=[record(id, user="u") for id in ("r3", "id-00000001", "id-00000004")])
    assert len(ledger.found(user="u")) == 3
    ledger.put(*(hit(number) for number in range(10, 20)))
    few = Written(connection, 1)
    for _ in range(4):
        few.put(record("last", started_at=DAY + 1e6))
    assert [row.id for row in few.found()] == ["last"]


def test_writing_what_is_there_again_changes_nothing(ledger: Written, short: None) -> None:
    """A commit whose reply was lost may be made again, if it is not known there any more."""
    rows = [record(f"r{number}", user="u", cost_nano=CENT) for number in range(5)]
    for _ in range(2):
        ledger.put(*rows)
        ledger.put(*(hit(number, user="u") for number in range(3)))
    assert len(ledger.found(user="u")) == 8
    assert ledger.totalled(dimension="user")[0][2] == Totals(cost_nano=5 * CENT, attempts=5, cached=3)


def test_reads_of_one_value_take_few_round_trips(
    connection: Connection, ledger: Written, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And fetch no record that nobody asked for."""
    ledger.put(*(record(f"r{number:03d}", user=f"u{number % 50}", started_at=DAY + number) for number in range(500)))
    asked: list[Sequence[tuple[Any, ...]]] = []
    read = connection.read

    def noted(commands: Sequence[tuple[Any, ...]]) -> list[Any]:
        asked.append(commands)
        return read(commands)

    monkeypatch.setattr(connection, "read", noted)
    assert len(ledger.found(user="u7", limit=5)) == 5
    assert len(asked) == 2
    assert sum(len(command) - 2 for command in asked[1] if command[:2] == ("HMGET", ledger._keys.rows)) == 5
    asked.clear()
    assert len(ledger.totalled(dimension="user", since_day="2025-11-23")) == 50
    assert len(asked) == 2


def test_lua_and_python_say_the_same() -> None:
    """Names that stand in both."""
    text = STEPS[STEP]
    (fields,) = re.findall(r"FIELDS = \{(.*?)\}", text, re.DOTALL)
    assert tuple(re.findall(r"'(\w+)'", fields)) == SELECTIVE
    assert f"LEAST, PAGE, SPREAD = {LEAST}, {PAGE}, {SPREAD:.0f}" in text
    assert f"OTHER = '{OTHER}'" in text


def test_no_write_takes_more_commands_because_there_are_many_records(connection: Connection) -> None:
    """Rows, pages, and what has to go for them."""
    ledger = Written(connection, 1_000)
    taken = []
    for start in range(0, 2_000, 200):
        kinds = [
            hit(n, trace_id=f"t{n}") if n % 2 else record(f"id-{n:08x}", trace_id=f"t{n}")
            for n in range(start, start + 200)
        ]
        connection.client().config_resetstat()
        ledger.put(*(each._replace(started_at=DAY + int(each.id[3:], 16) / 100) for each in kinds))
        stats = connection.client().info("commandstats").values()
        taken.append(sum(each["calls"] for each in stats))
    assert len(ledger.found()) <= 1_000
    assert max(taken[1:5]) <= 1.1 * taken[0], taken
    assert max(taken) <= 2.5 * taken[0], taken


def test_either_version_of_the_protocol_is_read(connection: Connection, valkey: str) -> None:
    """The one that the server speaks is not ours to choose."""
    other = Connection(f"{valkey}?protocol=2", f"test-{uuid.uuid4().hex}")
    both = [Written(connection), Written(other)]
    for each in both:
        each.put(*(record(f"r{n}", user=f"u{n % 3}", started_at=DAY + n, cost_nano=n) for n in range(20)))
        each.put(*(hit(n, user=f"u{n % 3}", started_at=DAY + n * 100) for n in range(150)))
    asked: list[dict[str, Any]] = [
        {},
        {"user": "u1", "limit": 5},
        {"since": DAY + 9, "until": DAY + 5_000, "limit": 40},
    ]
    for question in asked:
        one, two = (each.found(**question) for each in both)
        assert one == two
        assert one
    assert both[0].sums("user", None, 2) == both[1].sums("user", None, 2) != []
    assert both[0].totalled("user", value="u1") == both[1].totalled("user", value="u1") != []
    other.close()

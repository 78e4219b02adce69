"""Which account a call draws on: windows and where they end, scopes, the soft threshold, and rules that are shared."""

from __future__ import annotations

import datetime as dt
import gc
import sys
import threading
import time
from math import inf
from pathlib import Path
from typing import Any

import pytest

from dspy_prod.context.current import EMPTY, PROCESS_RUN, CallContext
from dspy_prod.errors import BudgetExceededError, ConfigError
from dspy_prod.options import Budget
from dspy_prod.policies import budget as module
from dspy_prod.policies.budget import BudgetRule
from dspy_prod.policies.sharing import quoted, shared_rule, steer
from dspy_prod.stores.base import Terms
from dspy_prod.stores.memory import MemoryStore
from dspy_prod.stores.sqlite.store import SqliteStore
from tests.logged import logged

HOUR, DAY = 3600.0, 86_400.0


def at(text: str) -> float:
    """Seconds since the epoch of a moment written with its offset."""
    return dt.datetime.fromisoformat(text).timestamp()


NOON = at("2026-11-28T12:00:00+00:00")


def rule(usd: float = 1.0, **options: Any) -> BudgetRule:
    return BudgetRule(Budget(usd=usd, **options))


def terms(revision: int, **options: Any) -> Terms:
    said = Budget(**{"usd": 1, "name": "b", **options})
    return Terms(said, said, revision)


# -- windows ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("per", "zone", "moment", "window", "end"),
    [
        ("total", "UTC", "2026-11-28T12:00:00+00:00", "total", None),
        ("run", "UTC", "2026-11-28T12:00:00+00:00", "run", None),
        ("hour", "UTC", "2026-11-28T12:00:00+00:00", "2026-11-28T12Z", "2026-11-28T13:00:00+00:00"),
        ("hour", "UTC", "2026-11-28T12:59:59.9+00:00", "2026-11-28T12Z", "2026-11-28T13:00:00+00:00"),
        ("hour", "Asia/Kolkata", "2026-11-28T12:10:00+00:00", "2026-11-28T12Z", "2026-11-28T13:00:00+00:00"),
        ("day", "UTC", "2026-11-28T00:00:00+00:00", "2026-11-28", "2026-11-29T00:00:00+00:00"),
        ("day", "UTC", "2026-11-28T23:59:59.9+00:00", "2026-11-28", "2026-11-29T00:00:00+00:00"),
        ("day", "Europe/Berlin", "2026-11-28T23:30:00+00:00", "2026-11-29", "2026-11-30T00:00:00+01:00"),
        ("day", "Europe/Berlin", "2026-03-29T12:00:00+02:00", "2026-03-29", "2026-03-30T00:00:00+02:00"),  # 23 hours
        ("day", "Europe/Berlin", "2026-10-25T00:30:00+02:00", "2026-10-25", "2026-10-26T00:00:00+01:00"),  # 25 hours
        ("day", "Europe/Berlin", "2026-10-25T02:30:00+01:00", "2026-10-25", "2026-10-26T00:00:00+01:00"),
        ("day", "America/Havana", "2026-11-01T00:30:00-05:00", "2026-11-01", "2026-11-02T00:00:00-05:00"),  # 0:30 twice
        ("day", "America/Havana", "2026-10-31T12:00:00-04:00", "2026-10-31", "2026-11-01T00:00:00-04:00"),  # the first
        ("month", "UTC", "2026-11-28T12:00:00+00:00", "2026-11", "2026-12-01T00:00:00+00:00"),
        ("month", "UTC", "2026-12-31T23:59:59+00:00", "2026-12", "2027-01-01T00:00:00+00:00"),
        ("month", "UTC", "2027-01-31T00:00:00+00:00", "2027-01", "2027-02-01T00:00:00+00:00"),
        ("month", "UTC", "2028-02-01T00:00:00+00:00", "2028-02", "2028-03-01T00:00:00+00:00"),
        ("month", "Europe/Berlin", "2026-10-01T00:00:00+02:00", "2026-10", "2026-11-01T00:00:00+01:00"),
    ],
)
def test_the_window_of_a_moment(per: str, zone: str, moment: str, window: str, end: str | None) -> None:
    """It is named by where it begins, in the budget's own zone, and ends where the next one begins."""
    found = rule(per=per, timezone=zone).window(at(moment))
    assert found == (window, inf if end is None else at(end))


@pytest.mark.skipif(not hasattr(time, "tzset"), reason="needs time.tzset")
def test_hours_are_utc_s_wherever_the_program_runs() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TZ", "Asia/Kolkata")
        time.tzset()
        try:
            assert rule(per="hour").window(NOON) == ("2026-11-28T12Z", NOON + HOUR)
        finally:
            patch.undo()
            time.tzset()


def test_an_account_is_one_window_s() -> None:
    """Within the window it is the same object; from its end on another one."""
    days = rule(per="day")
    first = days.account(EMPTY, "m", NOON)
    assert first == ("day|-|2026-11-28", 1_000_000_000, "day", DAY, "day")
    assert days.ends_at == NOON + DAY / 2
    assert days.account(EMPTY, "m", NOON + DAY / 2 - 1) is first
    assert days.account(EMPTY, "m", NOON + DAY / 2).key == "day|-|2026-11-29"
    assert days.ends_at == NOON + DAY * 1.5


@pytest.mark.parametrize("per", ["hour", "day", "month"])
def test_a_clock_that_went_ahead_and_is_set_back_gives_the_window_of_before(per: str) -> None:
    """A process stayed in a window ten years ahead, with a budget of its own, until it was started anew."""
    rules = rule(per=per, timezone="Europe/Berlin")
    before = rules.account(CallContext(), "m", NOON)
    assert rules.account(CallContext(), "m", NOON + 3_650 * DAY).key != before.key
    after = rules.account(CallContext(), "m", NOON)
    assert (after.key, after.ends_in) == (before.key, before.ends_in)
    assert rules.ends_at == rule(per=per, timezone="Europe/Berlin").window(NOON)[1]


@pytest.mark.parametrize("per", ["hour", "day", "month"])
@pytest.mark.parametrize("zone", ["UTC", "Europe/Berlin", "America/Havana", "Asia/Beirut", "Australia/Lord_Howe"])
def test_each_moment_lies_in_its_window(zone: str, per: str) -> None:
    """Else each call would look for another one: also where a clock change skips midnight, or repeats it."""
    rules = rule(per=per, timezone=zone)
    for hours in range(366 * 24):
        wall = NOON + hours * HOUR + 1_799
        _, begins_at, ends_at = rules._bounds(wall)
        assert begins_at <= wall < ends_at


def test_of_two_callers_at_the_end_of_a_window_the_second_finds_the_new_one() -> None:
    """Both saw that it had ended: what the first one noted in the new window is kept."""
    days = rule(per="day", soft=0.5)
    days.account(EMPTY, "m", NOON)
    account = days.account(EMPTY, "m", NOON + DAY)
    assert days.soft_passed(account.key, 500_000_000)
    assert days._turn(NOON + DAY)[2] == {"-": account}
    assert days._turn(NOON + DAY * 1.5 - 1)[0] == "2026-11-29"
    assert not days.soft_passed(account.key, 500_000_000)
    assert days._turn(NOON + DAY * 1.5)[0] == "2026-11-30"


# -- scopes ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("options", [{"scope": "user"}, {"scope": "tag:a"}, {"per": "run", "scope": "user"}])
def test_somebody_called_anonymous_is_shown_apart_from_all_who_say_nothing(options: dict[str, Any]) -> None:
    """`costs().budgets` and `dspy-prod budgets` listed two accounts of one name, and nobody knew whose was whose."""
    budget = rule(**options)
    names = (None, "anonymous", "'anonymous'", "a|b", "a")
    contexts = [CallContext(user=name, tags=(("a", name),) if name else (), run="r|a") for name in names]
    accounts = [budget.account(context, "m", NOON) for context in contexts]
    window = budget.window(NOON)[0]
    assert len({account.title for account in accounts}) == len(names)
    assert len({budget.who(account.key, window) for account in accounts}) == len(names)
    assert budget.who(accounts[-1].key, window) in ("a", "'r|a'|a")


SOMEBODY = CallContext(user="ann", tenant="acme", tags=(("team", "blue"), ("stage", "dev")))


@pytest.mark.parametrize(
    ("scope", "context", "value"),
    [
        ("global", SOMEBODY, "-"),
        ("model", SOMEBODY, "the-model"),
        ("tenant", SOMEBODY, "acme"),
        ("user", SOMEBODY, "ann"),
        ("tag:team", SOMEBODY, "blue"),
        ("tag:stage", SOMEBODY, "dev"),
        ("tag:other", SOMEBODY, "anonymous"),
        ("tenant", EMPTY, "anonymous"),
        ("user", EMPTY, "anonymous"),
        ("user", CallContext(user=""), ""),
    ],
)
def test_each_value_of_a_scope_has_an_account_of_its_own(scope: str, context: CallContext, value: str) -> None:
    account = rule(scope=scope).account(context, "the-model", NOON)
    title = "total" if scope == "global" else f"total/{scope}={value}"
    assert (account.key, account.title) == (f"{title.partition('=')[0]}|{value}|total", title)
    assert account.ends_in == inf


def test_a_name_stands_for_window_and_scope() -> None:
    account = rule(scope="user", per="hour", name="trial").account(SOMEBODY, "m", NOON)
    assert (account.key, account.title, account.ends_in) == ("trial|ann|2026-11-28T12Z", "trial=ann", HOUR)


@pytest.mark.parametrize(
    ("scope", "field"), [("tenant", "tenant=..."), ("user", "user=..."), ("tag:team", 'tags={"team": ...}')]
)
def test_a_call_that_does_not_say_its_scope_may_be_refused(scope: str, field: str) -> None:
    """The refusal names the budget, what is missing, and how to say it."""
    strict = rule(2.5, scope=scope, require=True, name="strict")
    with pytest.raises(BudgetExceededError) as refusal:
        strict.account(EMPTY, "m", NOON)
    assert str(refusal.value).startswith(
        f"The budget 'strict' requires every call to say its {scope}; wrap the call in dspy_prod.call_context({field})"
    )
    assert (refusal.value.budget, refusal.value.limit_usd) == ("strict", 2.5)
    assert strict.account(SOMEBODY, "m", NOON).limit == 2_500_000_000


def test_a_run_is_the_call_s_or_this_process() -> None:
    runs = rule(per="run", scope="user")
    assert runs.account(SOMEBODY._replace(run="r1"), "m", NOON).key == "run/user|r1|ann|run"
    assert runs.account(SOMEBODY._replace(run="r2"), "m", NOON).key == "run/user|r2|ann|run"
    assert runs.account(SOMEBODY, "m", NOON).key == f"run/user|{PROCESS_RUN}|ann|run"


# -- the soft threshold ----------------------------------------------------------------------------------------------
def test_the_soft_threshold_is_passed_once_by_each_account_in_each_window() -> None:
    days = rule(per="day", scope="user", soft=0.8, degrade_to="cheap")
    ann, bob = (days.account(CallContext(user=user), "m", NOON).key for user in ("ann", "bob"))
    assert not days.soft_passed(ann, 799_999_999)
    assert days.degraded(ann) is None
    assert days.soft_passed(ann, 800_000_000)
    assert not days.soft_passed(ann, 900_000_000)
    assert (days.degraded(ann), days.degraded(bob)) == ("cheap", None)
    assert days.soft_passed(bob, 900_000_000)
    tomorrow = days.account(CallContext(user="ann"), "m", NOON + DAY).key
    assert days.degraded(tomorrow) is None
    assert days.degraded(ann) is None, "nothing is kept of a window that has ended"
    assert days.soft_passed(tomorrow, 800_000_000)


def test_without_a_soft_threshold_nothing_passes_it() -> None:
    plain = rule()
    assert not plain.soft_passed("total|-|total", 10**12)
    assert plain.degraded("total|-|total") is None


# -- bounds ----------------------------------------------------------------------------------------------------------
def test_what_is_remembered_of_many_scopes_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A crowd of users costs no memory without end; a forgotten account is made again as it was."""
    monkeypatch.setattr(module, "_MAX_CACHED_ACCOUNTS", 3)
    users = rule(scope="user", soft=0.5)
    first = users.account(CallContext(user="0"), "m", NOON)
    for number in range(1, 10):
        account = users.account(CallContext(user=str(number)), "m", NOON)
        assert users.soft_passed(account.key, 600_000_000)
        assert account.key in users._softened
        assert len(users._current[2]) <= 3
        assert len(users._softened) <= 3
        assert users._current[2][str(number)] is account
    assert len(users._softened) == 3
    assert users.account(CallContext(user="0"), "m", NOON) == first


def test_a_forked_child_has_a_lock_that_nobody_holds() -> None:
    days = rule(per="day", soft=0.5)
    with days._lock:
        days._after_fork()
        account = days.account(EMPTY, "m", NOON)
        assert days.soft_passed(account.key, 600_000_000)


# -- shared rules ----------------------------------------------------------------------------------------------------
def test_a_budget_is_one_rule_for_all_who_name_it() -> None:
    """So that the soft threshold is passed once, whichever LM passes it."""
    store, other = MemoryStore("one"), MemoryStore("one")
    shared = shared_rule(store, Budget(usd=1, per="day"))
    assert shared_rule(store, Budget(usd=1, per="day")) is shared
    assert shared_rule(store, Budget(usd=2, per="hour")) is not shared
    assert shared_rule(store, Budget(usd=1, per="day", name="mine")) is not shared
    assert shared_rule(other, Budget(usd=1, per="day")) is not shared, "another store holds other money"


def test_a_durable_budget_is_shared_by_all_objects_for_one_file_and_namespace(tmp_path: Path) -> None:
    stores = [
        SqliteStore(str(tmp_path / name), space) for name, space in (("a", "x"), ("a", "x"), ("a", "y"), ("b", "x"))
    ]
    try:
        first, same, elsewhere, another = (shared_rule(store, Budget(usd=1)) for store in stores)
        assert same is first
        assert len({id(each) for each in (first, elsewhere, another)}) == 3
    finally:
        for store in stores:
            store.close()


def test_other_settings_of_a_budget_in_use_hold_for_all_who_share_it() -> None:
    """A notebook cell that was run again with another budget said "already in use", and its remedies forgot the sum."""
    store = MemoryStore("one")
    kept = shared_rule(store, Budget(usd=1, per="day", soft=0.5))
    kept.soft_passed("day|-|w", 500_000_000)
    assert shared_rule(store, Budget(usd=2, per="day", soft=0.9)) is kept
    assert (kept.limit, kept.options.soft) == (2_000_000_000, 0.9)
    assert kept.account(EMPTY, "m", NOON).limit == 2_000_000_000
    assert not kept.soft_passed("day|-|w", 500_000_000), "what was 50 % is 25 % now"


def test_settings_that_were_said_live_outlast_lms_built_with_those_of_before() -> None:
    """An LM is built for each request, and workers are replaced: neither takes back what an operator said."""
    store = MemoryStore("one")
    rule = shared_rule(store, Budget(usd=1))
    steer(store, [rule], [Budget(usd=3)])
    assert shared_rule(store, Budget(usd=1)).options.usd == 3
    with quoted():
        assert shared_rule(store, Budget(usd=7)).options.usd == 3, "a copy's settings are no news"
    assert shared_rule(store, Budget(usd=2)).options.usd == 2, "another configuration is"


def test_steering_a_budget_that_is_not_there_names_those_that_are() -> None:
    """And changes none of the others that were given with it."""
    store = MemoryStore("one")
    rules = [shared_rule(store, Budget(usd=1, per=per)) for per in ("day", "hour")]
    with pytest.raises(ConfigError, match=r"no budget called 'month'; it has 'day', 'hour'"):
        steer(store, rules, [Budget(usd=5, per="day"), Budget(usd=5, per="month")])
    assert rules[0].options.usd == 1


def test_a_budget_that_nobody_uses_any_more_may_come_back_with_other_settings() -> None:
    store = MemoryStore("one")
    assert shared_rule(store, Budget(usd=1, per="day")).limit == 1_000_000_000
    gc.collect()
    assert shared_rule(store, Budget(usd=2, per="day")).limit == 2_000_000_000


# -- settings that change ----------------------------------------------------------------------------------------------
def test_a_call_sees_the_settings_of_one_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    """They changed while it looked for its account: half of the key was of before, half of now, and nobody's."""
    days = rule(name="b", per="day", scope="tenant")
    turn = days._turn

    def turn_and_hear(wall: float) -> Any:
        seen = turn(wall)
        days.hear(terms(2, per="run", scope="user"))
        return seen

    monkeypatch.setattr(days, "_turn", turn_and_hear)
    assert days.account(SOMEBODY, "m", NOON).key == "b|acme|2026-11-28"
    monkeypatch.undo()
    assert days.account(SOMEBODY, "m", NOON).key == f"b|{PROCESS_RUN}|ann|run"


def test_accounts_that_begin_anew_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    """A budget by the day became one in all, and what the day had spent counted no more: nobody was told."""
    days = rule(name="b", per="day")
    days.hear(terms(1, per="day", usd=5))
    assert not logged(caplog)
    days.hear(terms(2, per="total"))
    assert "per total and global" in caplog.text
    assert "per day and global" in caplog.text


def test_what_is_heard_late_of_earlier_settings_changes_nothing() -> None:
    """Raised and lowered again: the word of the first came after that of the second, and was believed."""
    total = rule(name="b")
    total.hear(terms(3))
    total.hear(terms(2, usd=5))
    assert total.options.usd == 1


class Pipe:
    """Counts how often it was told."""

    def __init__(self) -> None:
        self.told = 0

    def budgets_changed(self) -> None:
        self.told += 1


def test_who_follows_is_told_and_who_is_gone_is_not() -> None:
    total, pipe = rule(name="b"), Pipe()
    total.follow(pipe)
    total.follow(Pipe())
    total.hear(terms(1, usd=2))
    assert pipe.told == 1


def test_pipelines_may_be_made_while_settings_change() -> None:
    """An LM is built for every request: now and then none of them heard of a change that came meanwhile."""
    total, first, ended = rule(name="b"), Pipe(), threading.Event()
    total.follow(first)

    def build() -> None:
        kept: list[Pipe] = []
        while not ended.is_set():
            kept.append(Pipe())
            total.follow(kept[-1])
            if len(kept) > 2_000:
                kept.clear()

    usual = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    thread = threading.Thread(target=build)
    try:
        thread.start()
        for revision in range(1, 1_001):
            total.hear(terms(revision, usd=1 + revision))
    finally:
        ended.set()
        thread.join()
        sys.setswitchinterval(usual)
    assert first.told == 1_000

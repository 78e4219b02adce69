"""A benchmark that misses its bar says so and fails, and one that does not ends well."""

from __future__ import annotations

import copy
import json
import math
import sys
from typing import Any

import pytest

import benchmarks.__main__ as every
import benchmarks.ledger as ledger
import benchmarks.peers.__main__ as peers
from benchmarks import bars
from benchmarks.bars import MEMORY, REDIS, SQLITE, TOLERANCE

GOOD: dict[str, Any] = {
    "overhead": {
        "bare_us": 150.0,
        "memory_off_us": 8.0,
        "memory_miss_us": 12.0,
        "sqlite_off_us": 40.0,
        "sqlite_miss_us": 50.0,
    },
    "slowest": {"bare_us": 500.0, "memory_us": 500.0, "sqlite_us": 900.0},
    "cache_hit": {"dspy_us": 120.0, "memory": 0.2, "sqlite": 0.2},
    "cache_hit_predict": {"dspy_us": 700.0, "memory": 0.7, "sqlite": 0.7},
    "throughput": {
        f"{kind}_{name}": value
        for kind in ("threads", "tasks")
        for name, value in (("bare_per_s", 2_000.0), ("memory", 1.0), ("sqlite", 0.9))
    },
    "http": {"memory": 0.9, "sqlite": 0.9, "bare_p50_ms": 100.0, "bare_p99_ms": 300.0},
    "processes": {"1 x 1": 6_000.0, "4 x 1": 7_000.0, "1 x 16": 5_000.0, "4 x 16": 9_000.0},
    "ledger": {
        "one process, 256 in flight": 21_000.0,
        "one process, 16 threads": 15_000.0,
        "one process, one thread, one by one": 10_500.0,
        "four processes, 256 in flight each": 24_000.0,
    },
    "units": {
        "units": 1_000,
        "unit_us": 80.0,
        "unit_small_us": 60.0,
        "look_us": 350.0,
        "look_small_us": 340.0,
        "one_us": 900.0,
        "one_small_us": 900.0,
    },
    "tracking": {"off_us": 500.0, "lean_us": 40.0, "autolog_us": 2_000.0},
    "tracking_tails": {f"{name}_{on}_ms": 5.0 for name in ("gone", "mute", "there") for on in ("on", "off")},
    "tracking_experiments": {"gone_median_ratio": 1.0, "mute_median_ratio": 1.0},
    "tracking_exit": {"calls": 1_000, "found": 1_000, "seconds": 3.0},
}
"""Figures of our own that reach every bar."""

BUDGET = {"what": "$1.00 budget, 64 threads", "cap": 1.0, "bound": 0.01, "figure": "", "came": {"answered": 100}}
PEERS: dict[str, Any] = {
    "machine": {"cpu": "a", "cores": 2, "python": "3"},
    "cpu": {"added": {kind: {MEMORY: 10.0, SQLITE: 40.0, REDIS: 90.0} for kind in ("thread", "task")}},
    "hits": {
        kind: {"dspy.LM, its cache": 200.0, MEMORY: 40.0, SQLITE: 50.0, REDIS: 190.0} for kind in ("thread", "task")
    },
    "crowds": [
        {"kind": "threads", "callers": 64, "subject": name, "per_s": rate}
        for name, rate in (
            ("dspy.LM", 1_000.0),
            (MEMORY, 950.0),
            (SQLITE, 800.0),
            (REDIS, 100.0),
            ("litellm.Router", 3.0),
        )
    ],
    "behaviour": [
        {**BUDGET, "subject": MEMORY, "usd": 1.0},
        {**BUDGET, "subject": f"{MEMORY}; ten", "bound": 0.1, "usd": 0.91},
        {**BUDGET, "subject": "litellm.Router", "usd": 3.0},
        {"what": "rpm=60, 300 calls", "subject": REDIS, "limit": 60, "most": 60, "came": {"answered": 300}},
        {"what": "64 identical", "subject": SQLITE, "seen": 1},
        {"what": "64 identical", "subject": "litellm.Router", "seen": 64},
        {"what": "dead upstream", "subject": SQLITE, "dead": 36, "allowed": 40},
        {"what": "stream left", "subject": MEMORY, "recorded": 0.002, "billed": 0.001},
    ],
}
"""The same beside the peers, who may miss all of them."""


def changed(figures: dict[str, Any], where: tuple[Any, ...], value: Any) -> dict[str, Any]:
    found = copy.deepcopy(figures)
    place: Any = found
    for key in where[:-1]:
        place = place[key]
    assert place[where[-1]] != value
    place[where[-1]] = value
    return found


def test_good_figures_miss_nothing() -> None:
    assert bars.missed({**GOOD, "peers": PEERS}) == []
    assert bars.missed({}) == []


@pytest.mark.parametrize(
    ("where", "value", "told"),
    [
        (
            ("overhead", "memory_off_us"),
            13.3,
            "CPU added per call, cache off, memory: 13.3 µs; it must be at most 12 µs",
        ),
        (("overhead", "sqlite_miss_us"), 67.0, "a miss, sqlite: 67 µs"),
        (("slowest", "memory_us"), 830.0, "CPU of the slowest call in a thousand by bare DSPy's, memory: 1.66 ×"),
        (("http", "sqlite"), 1.35, "p99 over HTTP by bare DSPy's, sqlite: 1.35 ×; it must be at most 1.2 ×"),
        (("processes", "4 x 1"), 5_300.0, "calls/s of four processes by one, one caller in each: 0.8833 ×"),
        (("processes", "4 x 16"), 7_100.0, "calls/s of four processes, 16 callers in each: 7,100/s"),
        (("cache_hit", "sqlite"), 0.45, "cache hit by DSPy's, sqlite: 0.45 ×"),
        (("cache_hit_predict", "memory"), 0.83, "at most 0.75 × (0.825 with the tolerance of 10%)"),
        (("throughput", "tasks_sqlite"), 0.67, "calls/s of 64 tasks by bare DSPy's, sqlite"),
        (
            ("ledger", "one process, 256 in flight"),
            17_999.0,
            "17,999 pairs/s; it must be at least 20,000 pairs/s (18,000",
        ),
        (("ledger", "four processes, 256 in flight each"), 18_000.0, "four processes by one: 0.8571 ×"),
        (("tracking", "lean_us"), 221.0, "tracking adds"),
        (("tracking_tails", "mute_on_ms"), 10.6, "while MLflow hangs"),
        (("tracking_exit", "found"), 999, "traces found after the program's end: 999; it must be at least 1,000"),
        (("overhead", "memory_off_us"), math.nan, "cache off, memory: nan"),
    ],
)
def test_each_bar_of_ours_is_judged(where: tuple[Any, ...], value: float, told: str) -> None:
    (line,) = bars.missed(changed(GOOD, where, value))
    assert told in line


@pytest.mark.parametrize(
    ("where", "value", "told"),
    [
        (("cpu", "added", "task", SQLITE), 70.0, "CPU added per call from a task, ours, SQLite: 70 µs"),
        (("hits", "thread", MEMORY), 90.0, "cache hit by DSPy's from a thread, ours, memory: 0.45 ×"),
        (("crowds", 1, "per_s"), 800.0, "calls/s of 64 threads by bare DSPy's, ours, memory: 0.8 ×"),
        (("behaviour", 0, "usd"), 1.01, "billed: 1.01 USD; it must be at most 1 USD"),
        (("behaviour", 0, "usd"), 0.98, "billed: 0.98 USD; it must be at least 0.99 USD"),
        (("behaviour", 1, "usd"), 0.89, "ten: billed: 0.89 USD; it must be at least 0.9 USD"),
        (("behaviour", 3, "most"), 61, "in the busiest 60 s: 61; it must be at most 60"),
        (("behaviour", 3, "came"), {"answered": 298, "RateLimitedError": 2}, "answered: 298; it must be at least 300"),
        (("behaviour", 4, "seen"), 2, "upstream: 2; it must be at most 1"),
        (("behaviour", 6, "dead"), 41, "dead calls: 41; it must be at most 40"),
        (("behaviour", 7, "recorded"), 0.0009, "recorded: 0.0009 USD"),
    ],
)
def test_each_bar_beside_the_peers_is_judged(where: tuple[Any, ...], value: Any, told: str) -> None:
    (line,) = bars.missed_beside_peers(changed(PEERS, where, value))
    assert told in line


def test_only_what_is_measured_has_a_tolerance() -> None:
    at = changed(GOOD, ("overhead", "memory_off_us"), 12.0 * (1 + TOLERANCE) - 0.01)
    assert bars.missed(at) == []
    assert len(bars.missed(changed(at, ("overhead", "memory_off_us"), 12.0 * (1 + TOLERANCE) + 0.01))) == 1
    assert len(bars.missed_beside_peers(changed(PEERS, ("behaviour", 0, "usd"), 1.0001))) == 1


def test_the_short_form_judges_what_is_counted_alone() -> None:
    """Few rounds say nothing of a time; a budget that is overrun is overrun."""
    assert bars.missed(changed(GOOD, ("overhead", "memory_off_us"), 500.0), quick=True) == []
    assert len(bars.missed(changed(GOOD, ("tracking_exit", "found"), 1), quick=True)) == 1
    assert len(bars.missed_beside_peers(changed(PEERS, ("behaviour", 0, "usd"), 2.0), quick=True)) == 1


def test_python_m_benchmarks_ends_with_1_where_a_bar_is_missed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a line for each; with 0 where none is."""
    for figures, code in ((GOOD, 0), (changed(GOOD, ("cache_hit", "memory"), 0.9), 1)):
        for module, name, key in (
            (every.calls, "overhead", "overhead"),
            (every.calls, "slowest", "slowest"),
            (every.calls, "hits", "cache_hit"),
            (every.calls, "predict_hits", "cache_hit_predict"),
            (every.calls, "throughput", "throughput"),
            (every.http, "tails", "http"),
            (every.processes, "measure", "processes"),
            (every.ledger, "measure", "ledger"),
            (every.units, "measure", "units"),
            (every.tracking, "request_path", "tracking"),
            (every.tracking, "tails", "tracking_tails"),
            (every.tracking, "experiments", "tracking_experiments"),
            (every.tracking, "at_exit", "tracking_exit"),
        ):
            monkeypatch.setattr(module, name, lambda found=figures[key], **_: found)
        monkeypatch.setattr(every, "measure_peers", lambda **_: {"machine": PEERS["machine"]})
        monkeypatch.setattr(sys, "argv", ["benchmarks"])
        assert every.main() == code
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("VIOLATION: ")]
        assert len(lines) == code


def test_python_m_benchmarks_peers_ends_with_1_where_a_bar_is_missed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The figures in JSON name it as well."""
    for figures, code in ((PEERS, 0), (changed(PEERS, ("behaviour", 4, "seen"), 3), 1)):
        monkeypatch.setattr(peers, "measure", lambda *_, found=figures: copy.deepcopy(found))
        monkeypatch.setattr(sys, "argv", ["peers", "--json", "-"])
        assert peers.main() == code
        said = capsys.readouterr()
        assert len(json.loads(said.out)["violations"]) == said.err.count("VIOLATION: ") == code


def test_the_ledger_s_own_command_ends_with_1_likewise(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for rates, code in ((GOOD["ledger"], 0), ({**GOOD["ledger"], "one process, one thread, one by one": 8_000.0}, 1)):
        figures = {
            "pairs": 1,
            "cpus": 2,
            "load": 0.0,
            "pairs_per_second": rates,
            "four_processes_slowest_by_fastest": 1.0,
            "appends": {},
            "hits": {},
            "reads": {"1,000 rows": {}},
        }
        monkeypatch.setattr(ledger, "run", lambda *_, found=figures: found)
        monkeypatch.setattr(sys, "argv", ["ledger"])
        assert ledger.main() == code
        assert capsys.readouterr().err.count("VIOLATION: ") == code

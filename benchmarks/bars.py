"""What the figures must reach, and which of them do not: one line for each that misses its bar.

Money, calls and traces are counted, and have to be right to the last one. Times, rates and ratios are measured on
machines that do other things as well: each may miss its bar by `TOLERANCE`. In the short form (`--quick`) they are of
so few rounds that they say nothing, and only what is counted is judged. Bars in microseconds and in pairs a second are
for a machine that does nothing else: a slow one misses them, and is told so.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterable, Iterator
from typing import Any, Final, NamedTuple

from benchmarks.peers.subjects import OURS

TOLERANCE: Final = 0.10
"""The share by which a measured time, rate or ratio may miss its bar."""
EXACT: Final = 1e-9
"""USD by which sums of floats may differ."""

MEMORY, SQLITE, REDIS = OURS

ADDED_US: Final = {"off": {MEMORY: 12.0, SQLITE: 60.0}, "miss": {MEMORY: 18.0, SQLITE: 60.0}}
"""CPU that a call with every policy adds to a bare one at most, in µs, with the cache off and with a miss."""
HIT: Final = 0.40
"""A cache hit by DSPy's own at most."""
PREDICT_HIT: Final = 0.75
"""The same through a `Predict`."""
THROUGHPUT: Final = {MEMORY: 0.90, SQLITE: 0.75}
"""Calls a second of 64 callers by those of bare DSPy at least."""
SLOWEST: Final = {MEMORY: 1.5}
"""CPU of the slowest call in a thousand by bare DSPy's at most."""
HTTP_TAIL: Final = 1.2
"""p99 of calls over HTTP, 128 at once, by bare DSPy's at most."""
CROWDED: Final = 8_000.0
"""Calls a second of four processes on one file with 16 callers in each at least."""
PAIRS: Final = {"one process, 256 in flight": 20_000.0, "one process, one thread, one by one": 10_000.0}
"""Durable admissions and settlements a second at least, on SQLite."""
READ_US: Final = 5_000.0
"""Any read of a ledger on SQLite at most, be it of a thousand rows or of a million."""
TRACKED_US: Final = 200.0
"""CPU that tracking adds to a `Predict` on its caller's thread at most."""
AWAY_MS: Final = 5.0
"""By how much p99.9 of a `Predict` may be longer with tracking on than off while MLflow is away, in ms."""
OF_IDEAL: Final = 1.1
"""Of the time that the upstream's own pace takes, an evaluation takes so many at most."""
USED: Final = 0.99
"""Share of a budget that is spent at least where a call is a hundredth of it."""

_STORES: Final = {"memory": MEMORY, "sqlite": SQLITE}
Figures = dict[str, Any]


class Bar(NamedTuple):
    """A figure and its bar.

    Attributes:
        what: is measured. figure, bar: in the same unit. unit: for people.
        least: whether the bar is the least, and not the most.
        measured: whether it is a time, a rate or a ratio, which has a tolerance; else it is counted.
    """

    what: str
    figure: float
    bar: float
    unit: str = ""
    least: bool = False
    measured: bool = True

    @property
    def granted(self) -> float:
        """The bar with the tolerance."""
        slack = TOLERANCE * abs(self.bar) if self.measured else 0.0
        return self.bar - slack if self.least else self.bar + slack

    def missed(self) -> bool:
        """Also where the figure is no number: nothing was measured then."""
        return not (self.figure >= self.granted if self.least else self.figure <= self.granted)

    def told(self) -> str:
        """In one line."""
        word = "at least" if self.least else "at most"
        with_it = f" ({_number(self.granted)} with the tolerance of {TOLERANCE:.0%})" if self.measured else ""
        figure, bar = (f"{_number(each)}{self.unit}" for each in (self.figure, self.bar))
        return f"{self.what}: {figure}; it must be {word} {bar}{with_it}"


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1_000 else f"{value:.4g}"


def missed(figures: Figures, quick: bool = False) -> list[str]:
    """Those bars that figures of `python -m benchmarks` miss; of parts that were not measured none.

    Args:
        figures: by part; `peers` are those of `python -m benchmarks.peers`.
        quick: whether they are of the short form.
    """
    return _told([*_own(figures), *_beside_peers(figures.get("peers", {}))], quick)


def missed_beside_peers(figures: Figures, quick: bool = False) -> list[str]:
    """The same of figures of `python -m benchmarks.peers`."""
    return _told(_beside_peers(figures), quick)


def missed_by_the_ledger(rates: dict[str, float], reads: dict[str, dict[str, float]]) -> list[str]:
    """The same of `python -m benchmarks.ledger`: its rates, and what reads take by how large a ledger is."""
    return _told([*_ledger(rates), *_reads(reads)], quick=False)


def exit_code(violations: Collection[str]) -> int:
    """Of a benchmark: 1 where a bar is missed or a bound broken, each of which is said on stderr."""
    for each in violations:
        print(f"VIOLATION: {each}", file=sys.stderr)
    return 1 if violations else 0


def _told(bars: Iterable[Bar], quick: bool) -> list[str]:
    return [each.told() for each in bars if not (quick and each.measured) and each.missed()]


# -- ours alone --------------------------------------------------------------------------------------------------------
def _own(figures: Figures) -> Iterator[Bar]:
    for name, store in _STORES.items():
        if overhead := figures.get("overhead"):
            for kind, words in (("off", "cache off"), ("miss", "a miss")):
                what = f"CPU added per call, {words}, {name}"
                yield Bar(what, overhead[f"{name}_{kind}_us"], ADDED_US[kind][store], " µs")
        if (slowest := figures.get("slowest")) and store in SLOWEST:
            by = slowest[f"{name}_us"] / slowest["bare_us"]
            yield Bar(f"CPU of the slowest call in a thousand by bare DSPy's, {name}", by, SLOWEST[store], " ×")
        for part, words, bar in (
            ("cache_hit", "cache hit by DSPy's", HIT), ("cache_hit_predict", "cache hit through Predict", PREDICT_HIT),
        ):  # fmt: skip
            if found := figures.get(part):
                yield Bar(f"{words}, {name}", found[name], bar, " ×")
        if rate := figures.get("throughput"):
            for kind in ("threads", "tasks"):
                what = f"calls/s of 64 {kind} by bare DSPy's, {name}"
                yield Bar(what, rate[f"{kind}_{name}"], THROUGHPUT[store], " ×", least=True)
        if tail := figures.get("http"):
            yield Bar(f"p99 over HTTP by bare DSPy's, {name}", tail[name], HTTP_TAIL, " ×")
    if rates := figures.get("processes"):
        by = rates["4 x 1"] / rates["1 x 1"]
        yield Bar("calls/s of four processes by one, one caller in each", by, 1.0, " ×", least=True)
        yield Bar("calls/s of four processes, 16 callers in each", rates["4 x 16"], CROWDED, "/s", least=True)
    yield from _ledger(figures.get("ledger", {}))
    if traced := figures.get("tracking"):
        yield Bar("CPU that tracking adds to a Predict", traced["lean_us"], TRACKED_US, " µs")
    if tails := figures.get("tracking_tails"):
        for name, words in (("gone", "is gone"), ("mute", "hangs")):
            more = tails[f"{name}_on_ms"] - tails[f"{name}_off_ms"]
            yield Bar(f"p99.9 of a Predict while MLflow {words}, beyond that without tracking", more, AWAY_MS, " ms")
    if ended := figures.get("tracking_exit"):
        what = "traces found after the program's end"
        yield Bar(what, ended["found"], ended["calls"], least=True, measured=False)


def _ledger(rates: dict[str, float]) -> Iterator[Bar]:
    for name, bar in PAIRS.items():
        if name in rates:
            yield Bar(f"reserve + settle, {name}", rates[name], bar, " pairs/s", least=True)
    alone, together = (
        rates.get(f"{many}, 256 in flight{each}") for many, each in (("one process", ""), ("four processes", " each"))
    )
    if alone and together:
        yield Bar("reserve + settle, four processes by one", together / alone, 1.0, " ×", least=True)


def _reads(reads: dict[str, dict[str, float]]) -> Iterator[Bar]:
    for size, times in reads.items():
        for name, us in times.items():
            yield Bar(f"reading {name.removesuffix('_us')}, {size}", us, READ_US, " µs")


# -- beside the peers --------------------------------------------------------------------------------------------------
def _beside_peers(figures: Figures) -> Iterator[Bar]:
    for kind in ("thread", "task"):
        if cpu := figures.get("cpu"):
            for store, bar in ADDED_US["off"].items():
                yield Bar(f"CPU added per call from a {kind}, {store}", cpu["added"][kind][store], bar, " µs")
        if hits := figures.get("hits"):
            for store in (MEMORY, SQLITE):
                by = hits[kind][store] / hits[kind]["dspy.LM, its cache"]
                yield Bar(f"cache hit by DSPy's from a {kind}, {store}", by, HIT, " ×")
    rows = {(row["kind"], row["callers"], row["subject"]): row["per_s"] for row in figures.get("crowds", ())}
    for (kind, callers, store), rate in rows.items():
        if callers == 64 and store in THROUGHPUT:
            by = rate / rows[kind, callers, "dspy.LM"]
            yield Bar(f"calls/s of 64 {kind} by bare DSPy's, {store}", by, THROUGHPUT[store], " ×", least=True)
    for row in figures.get("behaviour", ()):
        if row["subject"].partition(";")[0] in OURS:
            yield from _behaviour(row)


def _behaviour(row: Figures) -> Iterator[Bar]:
    """What is counted by the provider's own bill."""
    what = f"{row['what']}, {row['subject']}"
    if "usd" in row:
        yield Bar(f"{what}: billed", row["usd"], row["cap"] + EXACT, " USD", measured=False)
        least = max(0.0, min(USED * row["cap"], row["cap"] - row["bound"])) - EXACT
        yield Bar(f"{what}: billed", row["usd"], least, " USD", least=True, measured=False)
    if "most" in row:
        yield Bar(f"{what}: in the busiest 60 s", row["most"], row["limit"], measured=False)
        came = row["came"]
        yield Bar(f"{what}: answered", came.get("answered", 0), sum(came.values()), least=True, measured=False)
    if "sent" in row:
        for name, bar in (("sent", row["examples"]), ("refused", 0), ("lost", 0)):
            yield Bar(f"{what}: {name}", row[name], bar, measured=False)
        yield Bar(f"{what}: time by the ideal", row["of_ideal"], OF_IDEAL, " ×")
    if "seen" in row:
        yield Bar(f"{what}: upstream", row["seen"], 1, measured=False)
    if "dead" in row:
        yield Bar(f"{what}: dead calls", row["dead"], row["allowed"], measured=False)
    if "recorded" in row:
        yield Bar(f"{what}: recorded", row["recorded"], row["billed"] - EXACT, " USD", least=True, measured=False)

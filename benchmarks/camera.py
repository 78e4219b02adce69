"""What a run's camera and gate add to a call of a program: `python -m benchmarks.camera`.

One interleaved run: the same program answers from the cache, within a run's callbacks and without them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any

import dspy
from dspy.utils.callback import BaseCallback

import dspy_prod
from benchmarks.world import World
from dspy_prod.optimize.camera import Camera
from dspy_prod.optimize.gate import Gate
from dspy_prod.optimize.judging import Judge
from dspy_prod.optimize.lineage import Lineage
from dspy_prod.optimize.scored import Scored
from dspy_prod.optimize.supported import Traits

BOUND_MS = 0.1


class Nothing(BaseCallback):  # type: ignore[misc]
    """DSPy's own price of having two callbacks is not the camera's."""


def main() -> None:
    """Print the milliseconds of CPU, and exit with 1 above the bound."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.camera", description=__doc__)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--calls", type=int, default=50)
    parser.add_argument("--json", default="", help="file for the figures")
    given = parser.parse_args()
    with World(given.seed, latency=0.0) as world, dspy.context(lm=world.lm()):
        program, example = world.program(), world.valset[0]
        program.classify.demos = list(world.trainset[:8])
        run = dspy_prod.Run("camera", calls=10_000, store="memory://camera")
        gate = Gate(lambda detail: None)
        judge = Judge(lambda: gate, run, lambda: False)
        camera = Camera(
            program, world.valset, world.trainset, judge, {world.lm().model}, None, lambda seen: None,
            lambda: None, Lineage(Traits(), {}),
        )  # fmt: skip
        metric = Scored(camera).watched(world.metric, rich=False)

        def once(score: Any) -> float:
            began = time.process_time()
            for _ in range(given.calls):
                score(example, program(**example.inputs()))
            return (time.process_time() - began) * 1000 / given.calls

        plain: list[float] = []
        seen: list[float] = []
        for _ in range(given.rounds):
            with dspy.context(callbacks=[Nothing(), Nothing()]):
                plain.append(once(world.metric))
            with gate.in_force(camera):
                seen.append(once(metric))
    added = statistics.median(b - a for a, b in zip(plain, seen, strict=True))
    figures = {"plain_ms": statistics.median(plain), "seen_ms": statistics.median(seen), "added_ms": added}
    print(", ".join(f"{name} {value:.3f}" for name, value in figures.items()), f"(bound {BOUND_MS})")
    if given.json:
        with open(given.json, "w", encoding="utf-8") as file:
            json.dump(figures, file)
    raise SystemExit(added > BOUND_MS)


if __name__ == "__main__":
    main()

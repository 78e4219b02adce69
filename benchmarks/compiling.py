"""Programs of their own that optimize in a `World` of their parent: `python -m benchmarks.compiling` is one that
imports everything once, and forks for each order that it reads, so that each run begins and ends as a program does.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Order:
    """One run.

    Attributes:
        optimizer: its name in `subjects`. url: the world's provider. out: where the result goes, as JSON.
        seed, world: make the same world. options: of `BudgetedOptimizer`; None runs the optimizer by itself.
        arguments: further ones of its `compile`. lm: arguments of both LMs.
    """

    optimizer: str
    url: str
    out: str
    seed: int = 1
    world: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] | None = None
    arguments: dict[str, Any] = field(default_factory=dict)
    lm: dict[str, Any] = field(default_factory=dict)


class Compiler:
    """A process that runs orders, one at a time; a context manager."""

    def __init__(self) -> None:
        environment = {**os.environ, "LITELLM_LOCAL_MODEL_COST_MAP": "True", "PYTHONPATH": str(ROOT)}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.compiling"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            cwd=ROOT, env=environment,
        )  # fmt: skip

    def __enter__(self) -> Compiler:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)

    def begin(self, order: Order) -> int:
        """Run it; its process id comes back."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(asdict(order)) + "\n")
        self._process.stdin.flush()
        return int(self._read()["pid"])

    def wait(self) -> int:
        """Until the program has ended; its status (minus the signal that ended it)."""
        return int(self._read()["status"])

    def run(self, order: Order) -> dict[str, Any]:
        """Run it to its end; its result comes back."""
        self.begin(order)
        self.wait()
        return result(order)

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("the process that runs optimizers has died")
        told: dict[str, Any] = json.loads(line)
        return told


def result(order: Order) -> dict[str, Any]:
    """What a run wrote when its optimizer returned; empty when it never did."""
    path = Path(order.out)
    if not path.exists():
        return {}
    told: dict[str, Any] = json.loads(path.read_text())
    ended = Path(f"{order.out}.ended")
    if ended.exists():
        told["ended_at"] = float(ended.read_text())
    return told


def compile_ordered(order: Order) -> None:
    """What the child does."""
    import dspy

    from benchmarks.subjects import optimizers
    from benchmarks.world import World

    with World(order.seed, url=order.url, **order.world) as world:
        dspy.configure_cache(enable_disk_cache=False, enable_memory_cache=True)
        lm, proposer = world.lm(**order.lm), world.prompt_lm(**order.lm)
        dspy.configure(lm=lm)
        subject = optimizers(world, lm=lm, prompt_lm=proposer, only=order.optimizer)[order.optimizer]
        told: dict[str, Any] = {"began_at": time.monotonic()}
        arguments = {**subject.arguments, **order.arguments}
        if order.options is None:
            best = subject.optimizer.compile(subject.student, **subject.arguments)
        else:
            from dspy_prod.optimize.optimizer import BudgetedOptimizer

            optimizer = BudgetedOptimizer(subject.optimizer, metric=world.metric, **order.options)
            try:
                best = optimizer.compile(subject.student, **arguments)
            except BaseException as error:
                told["error"] = f"{type(error).__name__}: {error}"
                best = subject.student
            told["returned_at"] = time.monotonic()
            if optimizer.report is not None:
                told["report"] = optimizer.report.to_dict()
        told.setdefault("returned_at", time.monotonic())
        told["state"] = best.dump_state()
        Path(order.out + ".part").write_text(json.dumps(told, default=str))
        os.replace(order.out + ".part", order.out)


def serve() -> Order | None:
    """Fork for each line. In a child the order comes back, so that it ends as any program does."""
    import dspy_prod.optimize.optimizer  # noqa: F401 (imported before the fork)

    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            null = os.open(os.devnull, os.O_RDWR)
            os.dup2(null, 0)
            os.dup2(2, 1)  # what optimizers print is not for the parent
            signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background processes ignore it
            order = Order(**json.loads(line))
            atexit.register(_ended, order.out)
            return order
        print(json.dumps({"pid": pid}), flush=True)
        _, status = os.waitpid(pid, 0)
        print(json.dumps({"status": os.waitstatus_to_exitcode(status)}), flush=True)
    return None


def _ended(out: str) -> None:
    """Called last: every thread that Python waits for has ended, and all that is done at exit is done.

    What is left is the interpreter's own end, which takes seconds on a busy machine whatever the program did.
    """
    Path(f"{out}.ended").write_text(str(time.monotonic()))


if __name__ == "__main__":
    ordered = serve()
    if ordered is not None:
        compile_ordered(ordered)

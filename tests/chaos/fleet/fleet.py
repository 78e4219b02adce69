"""Worker processes that are started, heard, killed, stopped and replaced."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from multiprocessing.connection import wait
from typing import Any, Final

from tests.chaos.fleet.worker import Task, work

SERVER: Final = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["tests.chaos.fleet.worker", "tests.chaos.fleet.warm"])


class Worker:
    """One process, as its fleet knows it."""

    def __init__(self, task: Task) -> None:
        self.line, far = SERVER.Pipe()
        self.process = SERVER.Process(target=work, args=(task, far), daemon=True)
        self.process.start()
        far.close()
        self.told: dict[str, Any] = {}
        self.gone = self.killed = False

    def order_end(self) -> None:
        with suppress(OSError):
            self.line.send_bytes(b"stop")


class Fleet:
    """As many processes as there should be, and what they told.

    Attributes:
        ends: how calls ended, by kind.
        late: the most seconds that a call was late against its deadline, while its process could run.
        took: the most seconds in which what had ended was written when all was over.
        violations: which invariant, and what workers told that should not be.
    """

    def __init__(self, task: Task, processes: int) -> None:
        self.ends: Counter[str] = Counter()
        self.late = self.took = 0.0
        self.violations: list[tuple[str, str]] = []
        self._task = task
        self._begun = 0
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._workers = [self._started() for _ in range(processes)]
        self._listening = threading.Thread(target=self._listen, daemon=True)
        self._listening.start()

    @property
    def calls(self) -> int:
        return self.ends.total()

    def pids(self) -> list[int]:
        """Of the workers that live."""
        with self._lock:
            return [pid for each in self._workers if not each.gone and (pid := each.process.pid) is not None]

    def heard(self, what: str) -> int:
        """How many workers have told this, and live or have ended by themselves."""
        with self._lock:
            return sum(1 for worker in self._workers if worker.told.get(what) and not worker.killed)

    def kill(self, dice: random.Random, substitute: bool = True) -> None:
        """Kill one that has begun to call, and put another one in its place."""
        with self._lock:
            living = [each for each in self._workers if each.told.get("ready") and not each.told.get("ended")]
            living = [each for each in living if not each.gone]
            if not living:
                return
            victim = dice.choice(living)
            victim.killed = True
            victim.process.kill()
        victim.process.join(20)
        if substitute:
            with self._lock:
                self._workers.append(self._started())

    def pause(self, dice: random.Random, seconds: float, over: threading.Event) -> None:
        """Stop one for a while."""
        pids = self.pids()
        if not pids:
            return
        pid = dice.choice(pids)
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGSTOP)
            over.wait(seconds)
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)

    def until(self, condition: Callable[[], object], timeout: float, what: str) -> bool:
        """Wait for a condition; a violation if it does not come true."""
        deadline = time.monotonic() + timeout
        while not condition():
            if time.monotonic() > deadline:
                self.violations.append(("nothing hangs", f"{what} took more than {timeout:g} s; {dict(self.ends)}"))
                return False
            time.sleep(0.02)
        return True

    def end(self, timeout: float) -> None:
        """Tell all to stop, and see to it that they do; whoever does not has a call that hangs."""
        with self._lock:
            workers = list(self._workers)
        for worker in workers:
            worker.order_end()
        self.until(lambda: all(worker.gone for worker in workers), timeout, "ending all workers")
        self._over.set()
        self._listening.join(10)
        for worker in workers:
            told = worker.told
            if not worker.gone:
                self.violations.append(("nothing hangs", f"a worker hangs; it told {told}"))
                worker.process.kill()
            elif not worker.killed and not told.get("done"):
                self.violations.append(("nothing hangs", f"a worker ended with {worker.process.exitcode}, told {told}"))
            elif not worker.killed and not told.get("flushed"):
                self.violations.append(("nothing told is lost", f"what had ended was not written: {told}"))
            worker.process.join(10)
            self.took = max(self.took, told.get("took", 0.0))

    def _started(self) -> Worker:
        self._begun += 1
        return Worker(replace(self._task, seed=self._task.seed * 1_000 + self._begun))

    def _listen(self) -> None:
        while not self._over.is_set():
            with self._lock:
                lines: dict[Any, Worker] = {each.line: each for each in self._workers if not each.gone}
            if not lines:
                time.sleep(0.02)
            for line in wait(list(lines), 0.1):
                worker = lines[line]
                try:
                    told = json.loads(worker.line.recv_bytes())
                except (EOFError, OSError):
                    worker.process.join(20)
                    worker.gone = True
                    continue
                self.ends.update(told.pop("ends"))
                self.violations += [("every end is typed", each) for each in told.pop("strange")]
                self.late = max(self.late, told.pop("late"))
                worker.told.update(told)

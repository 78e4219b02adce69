"""A process that calls while things befall it: `python -m tests.chaos.worker '{...}'`. Its last line is read."""

from __future__ import annotations

import json
import logging
import os
import random
import sys
import threading
import traceback
from collections import Counter
from typing import Any

CALLERS = 8


def main(told: str) -> int:
    """Make the calls of one worker, and tell how they ended.

    Args:
        told: JSON of `url`, `store`, `afflictions`, `calls`, `seed`, `budget` (USD), `rpm` (or null).
    """
    os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"
    logging.disable(logging.CRITICAL)
    from dspy.utils.exceptions import LMError

    from dspy_prod import Budget, Cache, CircuitBreaker, ConfigError, RateLimit, Retry, call_context
    from tests.chaos.afflictions import CLOCK, afflicted
    from tests.e2e.support import make_lm

    task = json.loads(told)
    # What is imported and read once a process: that this cannot be is no matter of an LM's.
    make_lm(task["url"], store="memory://first", budget=Budget(usd=1)).close()
    dice = random.Random(task["seed"])
    ends: Counter[str] = Counter()
    strange: list[str] = []

    def note(error: BaseException) -> None:
        ends[type(error).__name__] += 1
        if not isinstance(error, (LMError, ConfigError)):
            strange.append("".join(traceback.format_exception(error)[-8:]))

    with afflicted(task["afflictions"], dice):
        lm: Any = None
        while lm is None and sum(ends.values()) < 50:
            try:
                lm = make_lm(
                    task["url"],
                    store=task["store"],
                    timeout=2,
                    budget=Budget(usd=task["budget"], max_wait=0.5),
                    limit=RateLimit(concurrency=32, rpm=task["rpm"], max_wait=0.2),
                    retry=Retry(attempts=2, backoff=0.01, max_backoff=0.05),
                    breaker=CircuitBreaker(failure_threshold=10, recovery_timeout=0.1),
                    cache=Cache(max_entries=100),
                    clock=CLOCK,
                )
            except Exception as error:  # the file may be of no use just now
                note(error)
        stop = threading.Event()

        def call(number: int) -> None:
            own = random.Random(f"{task['seed']}:{number}")
            while not stop.is_set():
                with lock:
                    task["calls"] -= 1
                    if task["calls"] < 0:
                        return
                try:
                    with call_context(deadline=own.choice((0.05, 2.0, 2.0, 5.0))):
                        lm(f"question {own.randrange(10_000)} of {task['seed']}")
                    with lock:
                        ends["answer"] += 1
                except Exception as error:
                    with lock:
                        note(error)

        lock = threading.Lock()
        callers = [threading.Thread(target=call, args=(number,), daemon=True) for number in range(CALLERS)]
        try:
            for caller in callers if lm is not None else ():
                caller.start()
            for caller in callers if lm is not None else ():
                caller.join()
        except KeyboardInterrupt:
            stop.set()
            ends["interrupted"] += 1
            for caller in callers:
                caller.join(10)
    if lm is not None:
        lm.pipeline.store.flush(5)
        lm.close()
        lm.pipeline.store.close()
    print(json.dumps({"ends": ends, "strange": strange[:5]}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))

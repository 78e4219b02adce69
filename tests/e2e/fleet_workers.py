"""Worker processes that share a store, and call without end."""

from __future__ import annotations

import threading
import time
from collections import Counter
from typing import Any

from dspy_prod import CircuitBreaker, RejectedError, add_listener, call_context
from tests.e2e.support import make_lm


def work(
    url: str, store: str, name: str, callers: int, breaker: dict[str, Any], ready: Any, end: Any, told: Any
) -> None:
    """Call until the end; tell how the calls ended, and what listeners heard."""
    heard: list[str] = []
    add_listener(lambda event: heard.append(event.name))
    lm = make_lm(url, store=store, breaker=CircuitBreaker(**breaker))
    ended: Counter[str] = Counter()

    def caller(number: int) -> None:
        calls = 0
        with call_context(program="triage", tenant=name):
            while not end.is_set():
                calls += 1
                ended[ask(lm, f"{name} {number}.{calls}")] += 1

    threads = [threading.Thread(target=caller, args=(number,), daemon=True) for number in range(callers)]
    for thread in threads:
        thread.start()
    while not ended:
        time.sleep(0.01)
    ready.put(name)
    for thread in threads:
        thread.join()
    lm.close()
    lm.pipeline.store.close()
    told.put((name, dict(ended), heard))


def ask(lm: Any, prompt: str) -> str:
    """One call; how it ended, in a word."""
    try:
        lm(prompt)
    except RejectedError as error:
        time.sleep(0.005)
        return error.reason
    except Exception as error:
        return type(error).__name__
    return "answer"

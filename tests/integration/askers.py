"""Bodies of child processes that ask what others ask at the same time."""

from __future__ import annotations

from typing import Any

from dspy_prod import call_context
from tests.e2e.support import make_lm, outcome, until
from tests.integration.support import Caller, following

QUESTION = "the same question"


def ask_the_same(url: str, store: str, callers: int, options: dict[str, Any], ready: Any, results: Any) -> None:
    """Ask with a crowd of threads; tell once all wait, and then what each got, and the outcomes of the records."""
    lm = make_lm(url, cache=True, store=store)

    def ask() -> Any:
        with call_context(**options):
            return lm(QUESTION)

    crowd = [Caller(lambda: outcome(ask)) for _ in range(callers)]
    until(lambda: following(lm) == callers - 1, 60)
    ready.put(callers)
    got = [each.outcome(60) for each in crowd]
    lm.close()
    lm.pipeline.store.close()
    results.put([type(each).__name__ if isinstance(each, BaseException) else each for each in got])

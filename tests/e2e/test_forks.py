"""A process forks while its threads are in the middle of calls, as servers and `multiprocessing` do."""

from __future__ import annotations

import os
import signal
import sys
import threading
import traceback
from typing import Any

import pytest

from dspy_prod import Budget, RateLimit
from tests.e2e.conftest import MakeLM, MakeProvider
from tests.e2e.support import records

FORKS, BUSY, PATIENCE = 4, 4, 60


def forked(lm: Any) -> int:
    """The exit code of a child that makes one call: 0, if it was answered."""
    pid = os.fork()
    if pid == 0:
        code = 3
        try:
            signal.alarm(PATIENCE)
            code = 0 if lm("a child's question") == ["ok"] else 4
            lm.pipeline.store.flush(10)
        except BaseException:
            traceback.print_exc(file=sys.__stderr__)
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="nothing forks here")
@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
@pytest.mark.parametrize(
    ("engine", "store_url"),
    [
        ("lm15", "sqlite"),
        ("litellm", "memory"),
        pytest.param("lm15", "memory", marks=pytest.mark.slow),
        pytest.param("litellm", "sqlite", marks=pytest.mark.slow),
        pytest.param("lm15", "redis", marks=pytest.mark.chaos),
        pytest.param("litellm", "redis", marks=pytest.mark.chaos),
    ],
    indirect=["store_url"],
)
def test_every_child_is_answered_and_no_call_of_the_parent_is_harmed(
    serve: MakeProvider, connect: MakeLM, store_url: str, engine: str
) -> None:
    """Now and then a child hung, on a lock that a thread of its parent had held, or ended with an error."""
    provider = serve(latency=0.005)  # calls are in all their parts when it forks, and leave the child some processor
    lm = connect(
        provider, engine=engine, store=store_url, budget=Budget(usd=100), limit=RateLimit(rpm=1_000_000, concurrency=50)
    )
    assert lm("the first question") == ["ok"]
    stop, wrong = threading.Event(), []

    def work() -> None:
        while not stop.is_set():
            try:
                assert lm("a question") == ["ok"]
            except BaseException as error:
                wrong.append(error)

    threads = [threading.Thread(target=work, daemon=True) for _ in range(BUSY)]
    for thread in threads:
        thread.start()
    codes = []
    for _ in range(FORKS):
        seen = len(provider.calls)
        provider.wait_until(lambda provider: len(provider.calls) >= seen + BUSY)  # noqa: B023  (called at once)
        codes.append(forked(lm))
    stop.set()
    for thread in threads:
        thread.join(PATIENCE)
        assert not thread.is_alive()
    assert wrong == []
    assert codes == [0] * FORKS
    assert {record.outcome for record in records(lm)} == {"ok"}

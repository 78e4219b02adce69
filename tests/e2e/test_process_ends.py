"""A process that ends while a call that nobody waits for goes on in it leaves nothing taken behind."""

from __future__ import annotations

import multiprocessing
import subprocess
import sys
from pathlib import Path

import pytest

from dspy_prod import call_context
from dspy_prod.testing import ScriptedEngine
from tests.e2e.silent import SHARED, leave
from tests.e2e.support import account, assert_nothing_held, make_lm, upstream

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("kind", "way", "outcome"),
    [
        ("script", "stream", "cancelled"),
        ("script", "Ctrl-C", "cancelled"),
        ("script", "deadline", "timeout"),
        ("spawn", "stream", "cancelled"),
        ("fork", "deadline", "timeout"),
    ],
)
def test_the_next_process_finds_the_seat_free(sqlite_url: str, kind: str, way: str, outcome: str) -> None:
    """It was taken for half a minute, until the lease ended, and the call was told as that of a process that died."""
    if kind == "script":
        ended = subprocess.run(
            [sys.executable, "-m", "tests.e2e.silent", way, sqlite_url],
            cwd=ROOT, timeout=60, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert (ended.returncode, ended.stderr.count("Traceback")) == (0, 0), ended.stderr
    else:
        child = multiprocessing.get_context(kind).Process(target=leave, args=(way, sqlite_url))
        child.start()
        child.join(60)
        assert child.exitcode == 0
    lm = make_lm("", api_key=None, api_base=None, engine=ScriptedEngine("ok"), store=sqlite_url, **SHARED)
    with call_context(deadline=10):
        assert lm("hello") == ["ok"]
    [record] = [each for each in upstream(lm) if each.outcome != "ok"]
    assert (record.outcome, record.estimated) == (outcome, True)
    assert account(lm).held == 0
    assert_nothing_held(lm.pipeline.store)
    lm.close()
    lm.pipeline.store.close()

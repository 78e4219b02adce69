"""Closing every LM of a process at once, in bounded time."""

from __future__ import annotations

import asyncio
import sqlite3
import time
from pathlib import Path

import pytest

from dspy_prod.lm import close_all, closing
from dspy_prod.testing import Provider
from tests.e2e.support import make_lm, upstream


def test_everything_is_written_and_every_lm_stays_usable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of several LMs, with the variants that calls have made of them, in several stores."""
    with Provider() as provider:
        lms = [make_lm(provider.url, store=f"sqlite:///{tmp_path}/{number}.db") for number in range(2)]
        monkeypatch.setattr(closing, "living", lambda: lms)  # other tests have LMs of their own

        async def main() -> int:
            for lm in lms:
                await lm.acall("q")
                await lm.acall("q", timeout=7)
            unwritten = await close_all(10.0)
            await lms[0].acall("again")
            return unwritten

        assert asyncio.run(main()) == 0
        assert [len(upstream(lm)) for lm in lms] == [3, 2]
        for lm in lms:
            lm.close()
            lm.pipeline.store.close()


def test_what_cannot_be_written_in_time_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that somebody else has locked holds up the end of a service no longer than it is allowed to."""
    with Provider() as provider:
        lm = make_lm(provider.url, store=f"sqlite:///{tmp_path}/state.db")
        monkeypatch.setattr(closing, "living", lambda: [lm])
        lm("q")
        assert lm.pipeline.store.flush(10)
        other = sqlite3.connect(tmp_path / "state.db", isolation_level=None, check_same_thread=False)
        other.execute("BEGIN IMMEDIATE")
        lm("another question")
        began = time.monotonic()
        assert asyncio.run(close_all(0.3)) >= 1
        assert time.monotonic() - began < 5
        other.execute("ROLLBACK")
        other.close()
        assert asyncio.run(close_all(10.0)) == 0
        assert len(upstream(lm)) == 2
        lm.close()
        lm.pipeline.store.close()

"""Closing every LM of this process, for a service that ends."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Final, cast

from dspy_prod.lm.beneath import Beneath
from dspy_prod.lm.operating import pipelines_of
from dspy_prod.runtime.living import living
from dspy_prod.runtime.reaper import REAPER
from dspy_prod.stores.base import Store

LEAST: Final = 0.1
"""Seconds for a store, also when those before it took all."""


async def close_all(timeout: float = 10.0) -> int:
    """Close every LM alive in this process: its connections, those of this event loop too; and write out its ledger.

    LMs stay usable. Traces are not waited for: see `dspy_prod.tracking.flush`.

    Args:
        timeout: seconds.

    Returns:
        About how many operations on the ledger could not be written in time; 0 when all is written.
    """
    until = time.monotonic() + timeout
    pipelines = list(dict.fromkeys([one for lm in living() for one in pipelines_of(cast("Beneath", lm))]))
    for pipeline in pipelines:
        try:
            await asyncio.wait_for(pipeline.aclose(), max(LEAST, until - time.monotonic()))
        except asyncio.TimeoutError:
            break  # a connection that cannot be closed ends with the process; the ledger comes first
    stores = list({id(pipeline.store): pipeline.store for pipeline in pipelines}.values())
    return await asyncio.to_thread(_flush, stores, until)


def _flush(stores: Sequence[Store], until: float) -> int:
    REAPER.flush(max(LEAST, until - time.monotonic()))
    unwritten = 0
    for store in stores:
        if not store.flush(max(LEAST, until - time.monotonic())):
            unwritten += max(1, store.unwritten())
    return unwritten

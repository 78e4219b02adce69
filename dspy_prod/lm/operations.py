"""What an operator does with an LM: look at costs, health and ledger, preview a call, clear and close."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from dspy.clients.execution import prepare

from dspy_prod.lm.calling import calls_of, per_call
from dspy_prod.lm.copying import Variants
from dspy_prod.pipeline.pipeline import Pipeline, clear_answers
from dspy_prod.runtime.reaper import REAPER

if TYPE_CHECKING:
    from dspy_prod.status.health import Health, Preview
    from dspy_prod.status.ledger import Ledger


class Operations:
    """The operating half of `dspy_prod.LM`."""

    pipeline: Pipeline
    _variants: Variants

    @property
    def ledger(self) -> Ledger:
        """The records of every attempt, in this LM's store and namespace."""
        from dspy_prod.status.ledger import Ledger

        return Ledger(self.pipeline.store, self.pipeline.clock)

    def costs(self, by: str | None = None) -> Any:
        """What was spent: a `CostSummary`, or sums by `"day"`, `"model"`, `"user"`, `"tenant"`, `"tag:<key>"`, ..."""
        from dspy_prod.status.health import costs, costs_by

        return costs(self.pipeline) if by is None else costs_by(self.pipeline.store, by)

    def health(self) -> Health:
        """State of breaker, limiter, cache and costs, and one overall status."""
        from dspy_prod.status.health import health

        return health([self.pipeline])

    def preview(self, prompt: Any = None, *, messages: Any = None, **kwargs: Any) -> Preview:
        """What a call would cost at most, whether it is affordable, and how long it would wait; sends nothing."""
        from dspy_prod.status.costs import FLUSH_TIMEOUT
        from dspy_prod.status.health import preview

        REAPER.flush(FLUSH_TIMEOUT)
        lm, kwargs, extras = per_call(self, kwargs)  # type: ignore[arg-type]  # mixed into LM
        return preview(lm.pipeline, calls_of(lm, prepare(lm, prompt, messages, kwargs), extras))

    def cache_clear(self) -> None:
        """Forget every cached answer of this store and namespace."""
        clear_answers(self.pipeline.store)

    def close(self) -> None:
        """Flush the ledger and close pooled connections. The LM stays usable."""
        REAPER.flush()
        self.pipeline.store.flush(5.0)
        self.pipeline.close()
        for variant in self._variants.all():
            variant.pipeline.close()

    async def aclose(self) -> None:
        """Asynchronous `close`, for this event loop's connections too."""
        await self.pipeline.aclose()
        for variant in self._variants.all():
            await variant.pipeline.aclose()
        await asyncio.to_thread(self.close)

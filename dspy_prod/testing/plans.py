"""Which call meets which fault: scripts, mixtures, outages."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dspy_prod.testing.faults import Fault

if TYPE_CHECKING:
    from dspy_prod.testing.calls import CallView

Chooser = Callable[["CallView"], "Fault | None"]


@dataclass(frozen=True)
class FaultPlan:
    """Says which call meets which fault.

    A plan counts calls from 0, beginning when it is given to the provider (or at `Provider.reset`). It keeps no
    state of its own, so one plan can serve several providers.

    Attributes:
        pick: gives the fault of call number `position` (from 0) since the plan began, or None for a healthy one.

    Example:
        ```python
        outage = testing.FaultPlan.window(testing.Status(503), start_index=10, count=50)
        provider = testing.Provider(faults=outage)
        ```
    """

    pick: Callable[[int, CallView], Fault | None]

    @classmethod
    def script(cls, faults: Sequence[Fault | None]) -> FaultPlan:
        """One entry per call in order of arrival (None is a healthy call), then healthy."""
        entries = tuple(faults)
        return cls(lambda position, call: entries[position] if position < len(entries) else None)

    @classmethod
    def mix(cls, probabilities: Mapping[Fault, float], seed: int = 0) -> FaultPlan:
        """Each call meets a fault with its probability, else none; decided by seed and position alone."""
        parts = tuple(probabilities.items())
        if any(p < 0 for _, p in parts) or sum(p for _, p in parts) > 1 + 1e-9:
            raise ValueError("probabilities must not be negative nor add up to more than 1")

        def pick(position: int, call: CallView) -> Fault | None:
            draw = random.Random(f"{seed}:{position}").random()
            for fault, probability in parts:
                draw -= probability
                if draw < 0:
                    return fault
            return None

        return cls(pick)

    @classmethod
    def window(cls, fault: Fault, start_index: int, count: int) -> FaultPlan:
        """`count` calls from `start_index` on (from 0) meet the fault: an outage."""
        return cls(lambda position, call: fault if start_index <= position < start_index + count else None)

    @classmethod
    def always(cls, fault: Fault) -> FaultPlan:
        """Every call meets the fault."""
        return cls(lambda position, call: fault)

    @classmethod
    def of(cls, faults: FaultPlan | Fault | Iterable[Fault | None] | Chooser | None) -> FaultPlan:
        """From what `Provider(faults=...)` takes: a plan, a fault (always), a list (script), a callable or None."""
        if isinstance(faults, FaultPlan):
            return faults
        if isinstance(faults, Fault):
            return cls.always(faults)
        if callable(faults):
            chooser = faults
            return cls(lambda position, call: chooser(call))
        return cls.script(list(faults or ()))

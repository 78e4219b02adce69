"""What tests of LM programs need: a provider on loopback that keeps a bill.

Public, and used by this library's own tests. It imports nothing else of the library: what it says of a call is seen
on the wire. A new endpoint belongs in `dialects`, a new way to fail in `faults`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dspy_prod.testing.bill import Bill, BillRow, Usage
from dspy_prod.testing.calls import Call, CallView
from dspy_prod.testing.clock import FakeClock
from dspy_prod.testing.faults import (
    EmptyChoices,
    ErrorInStream,
    Fault,
    FaultPlan,
    Hang,
    MalformedJson,
    MissingUsage,
    Reset,
    Status,
    Trickle,
    TruncatedStream,
    Verbatim,
    WrongUsage,
)
from dspy_prod.testing.provider import Provider
from dspy_prod.testing.relay import Relay

if TYPE_CHECKING:
    from dspy_prod.testing.engine import ScriptedEngine

__all__ = [
    "Bill",
    "BillRow",
    "Call",
    "CallView",
    "EmptyChoices",
    "ErrorInStream",
    "FakeClock",
    "Fault",
    "FaultPlan",
    "Hang",
    "MalformedJson",
    "MissingUsage",
    "Provider",
    "Relay",
    "Reset",
    "ScriptedEngine",
    "Status",
    "Trickle",
    "TruncatedStream",
    "Usage",
    "Verbatim",
    "WrongUsage",
]


def __getattr__(name: str) -> Any:
    if name == "ScriptedEngine":  # imports DSPy, which the provider on its own does not need
        from dspy_prod.testing.engine import ScriptedEngine

        return ScriptedEngine
    raise AttributeError(f"module 'dspy_prod.testing' has no attribute {name!r}")

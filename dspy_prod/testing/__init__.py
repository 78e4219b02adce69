"""What tests of LM programs need: a provider on loopback that keeps a bill, and a plugin for pytest.

Public, and used by this library's own tests. It imports nothing else of the library: what it says of a call is seen
on the wire. A new endpoint belongs in `dialects`, a new way to fail in `faults`, and when calls fail in `plans`. Names
are imported when they are asked for: pytest loads the plugin in every project of an environment.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dspy_prod.testing.bill import Bill, BillRow, Usage
    from dspy_prod.testing.calls import Call, CallView
    from dspy_prod.testing.clock import FakeClock
    from dspy_prod.testing.engine import ScriptedEngine
    from dspy_prod.testing.faults import (
        EmptyChoices,
        ErrorInStream,
        Fault,
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
    from dspy_prod.testing.plans import FaultPlan
    from dspy_prod.testing.provider import Provider
    from dspy_prod.testing.relay import Relay
    from dspy_prod.testing.spending import Spent, costs

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
    "Spent",
    "Status",
    "Trickle",
    "TruncatedStream",
    "Usage",
    "Verbatim",
    "WrongUsage",
    "costs",
]

_HOMES = {
    **dict.fromkeys(("Bill", "BillRow", "Usage"), "bill"),
    **dict.fromkeys(("Call", "CallView"), "calls"),
    "FakeClock": "clock",
    "FaultPlan": "plans",
    "Provider": "provider",
    "Relay": "relay",
    "ScriptedEngine": "engine",  # imports DSPy, which the provider on its own does not need
    **dict.fromkeys(("Spent", "costs"), "spending"),
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'dspy_prod.testing' has no attribute {name!r}")
    value = getattr(import_module(f"dspy_prod.testing.{_HOMES.get(name, 'faults')}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

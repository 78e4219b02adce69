"""Production safety for DSPy programs: change `dspy.LM(...)` to `dspy_prod.LM(...)`.

Importing this package writes nothing, opens nothing, and imports neither MLflow nor LiteLLM nor Redis.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dspy_prod import registry, tracking
    from dspy_prod.context.current import call_context
    from dspy_prod.errors import (
        BudgetExceededError,
        CircuitOpenError,
        ConfigError,
        DeadlineExceededError,
        RateLimitedError,
        RejectedError,
        StoreUnavailableError,
        UnpricedModelError,
    )
    from dspy_prod.lm.lm import LM
    from dspy_prod.lm.wrapping import wrap
    from dspy_prod.options import Budget, Cache, CircuitBreaker, Price, RateLimit, Retry
    from dspy_prod.privacy.redactor import Redactor
    from dspy_prod.production.module import CallReport, Production, call_report
    from dspy_prod.records import CallRecord
    from dspy_prod.status.health import CostSummary, Health, Preview, health
    from dspy_prod.telemetry.events import Event, add_listener
    from dspy_prod.telemetry.logs import enable_logging

_HOME = {
    "LM": "lm",
    "wrap": "lm",
    "call_context": "context.current",
    "Retry": "options",
    "CircuitBreaker": "options",
    "RateLimit": "options",
    "Cache": "options",
    "Budget": "options",
    "Price": "options",
    "Production": "production.module",
    "CallReport": "production.report",
    "call_report": "production.report",
    "CallRecord": "records",
    "Event": "telemetry.events",
    "add_listener": "telemetry.events",
    "enable_logging": "telemetry.logs",
    "Redactor": "privacy",
    "health": "status.health",
    "Health": "status.health",
    "CostSummary": "status.health",
    "Preview": "status.health",
    "ConfigError": "errors",
    "RejectedError": "errors",
    "CircuitOpenError": "errors",
    "RateLimitedError": "errors",
    "BudgetExceededError": "errors",
    "DeadlineExceededError": "errors",
    "UnpricedModelError": "errors",
    "StoreUnavailableError": "errors",
}

_SUBMODULES = frozenset({"registry", "tracking"})

__version__ = "0.1.0"
__all__ = [
    "LM",
    "Budget",
    "BudgetExceededError",
    "Cache",
    "CallRecord",
    "CallReport",
    "CircuitBreaker",
    "CircuitOpenError",
    "ConfigError",
    "CostSummary",
    "DeadlineExceededError",
    "Event",
    "Health",
    "Preview",
    "Price",
    "Production",
    "RateLimit",
    "RateLimitedError",
    "Redactor",
    "RejectedError",
    "Retry",
    "StoreUnavailableError",
    "UnpricedModelError",
    "add_listener",
    "call_context",
    "call_report",
    "enable_logging",
    "health",
    "registry",
    "tracking",
    "wrap",
]


def __getattr__(name: str) -> Any:
    if name in _SUBMODULES:
        return import_module(f"dspy_prod.{name}")
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module 'dspy_prod' has no attribute {name!r}")
    value = getattr(import_module(f"dspy_prod.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])

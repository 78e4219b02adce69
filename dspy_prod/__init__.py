"""Production safety for DSPy programs: change `dspy.LM(...)` to `dspy_prod.LM(...)`.

Importing this package writes nothing, opens nothing, and imports neither MLflow nor LiteLLM nor Redis.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from dspy_prod.runtime.doors import door

if TYPE_CHECKING:
    from dspy_prod import alerts, metrics, registry, tracking
    from dspy_prod.config.reading import Configured, from_config
    from dspy_prod.context.current import call_context
    from dspy_prod.errors import (
        BudgetExceededError,
        CircuitOpenError,
        ConfigError,
        DeadlineExceededError,
        OutageError,
        RateLimitedError,
        RejectedError,
        RunStoppedError,
        StoppedError,
        StoreUnavailableError,
        UnpricedModelError,
        UnusableAnswerError,
    )
    from dspy_prod.experiments.experiment import Experiment
    from dspy_prod.experiments.judging import Judge
    from dspy_prod.experiments.scorecard import Scorecard
    from dspy_prod.lm.embedder import Embedder
    from dspy_prod.lm.lm import LM
    from dspy_prod.lm.wrapping import wrap
    from dspy_prod.optimize.optimizer import BudgetedOptimizer
    from dspy_prod.optimize.report import OptimizationReport
    from dspy_prod.options import Budget, Cache, CircuitBreaker, Price, RateLimit, Retry
    from dspy_prod.options.experiments import Rollout
    from dspy_prod.options.metrics import Metric
    from dspy_prod.policies.run import Run
    from dspy_prod.privacy.redactor import Redactor
    from dspy_prod.production.module import CallReport, Production, call_report
    from dspy_prod.records import CallRecord
    from dspy_prod.scaling.evaluate import evaluate
    from dspy_prod.status.controls import Controls, controls
    from dspy_prod.status.health import CostSummary, Health, Preview, health
    from dspy_prod.stores.programs import ProgramCall
    from dspy_prod.telemetry.events import Event, add_listener
    from dspy_prod.telemetry.logs import enable_logging

__getattr__, __dir__ = door(
    __name__,
    {
        "alerts": "alerts",
        "asgi": "asgi",
        "config.reading": "Configured from_config",
        "context.current": "call_context",
        "errors": "BudgetExceededError CircuitOpenError ConfigError DeadlineExceededError OutageError "
        "RateLimitedError RejectedError RunStoppedError StoppedError StoreUnavailableError UnpricedModelError "
        "UnusableAnswerError",
        "experiments.experiment": "Experiment",
        "experiments.judging": "Judge",
        "experiments.scorecard": "Scorecard",
        "guardrails": "guardrails",
        "lm": "LM wrap",
        "lm.embedder": "Embedder",
        "metrics": "metrics",
        "optimize.optimizer": "BudgetedOptimizer",
        "optimize.report": "OptimizationReport",
        "options": "Budget Cache CircuitBreaker Price RateLimit Retry",
        "options.experiments": "Rollout",
        "options.metrics": "Metric",
        "policies.run": "Run",
        "privacy": "Redactor",
        "production.module": "CallReport Production call_report",
        "records": "CallRecord",
        "registry": "registry",
        "scaling.evaluate": "evaluate",
        "status.controls": "Controls controls",
        "status.health": "CostSummary Health Preview health",
        "stores.programs": "ProgramCall",
        "telemetry.events": "Event add_listener",
        "telemetry.logs": "enable_logging",
        "tracking": "tracking",
    },
)


def _passed(record: logging.LogRecord) -> bool:
    """What our logger says leaves the process by the same door as every other text."""
    try:
        from dspy_prod.privacy.outward import passed

        return passed(record)
    except Exception:  # a text that cannot be looked at is not told
        record.msg, record.args, record.exc_info, record.exc_text = "<redaction failed>", None, None, None
        return True


logging.getLogger("dspy_prod").addFilter(_passed)

__version__ = "0.1.0"
__all__ = [
    "LM",
    "Budget",
    "BudgetExceededError",
    "BudgetedOptimizer",
    "Cache",
    "CallRecord",
    "CallReport",
    "CircuitBreaker",
    "CircuitOpenError",
    "ConfigError",
    "Configured",
    "Controls",
    "CostSummary",
    "DeadlineExceededError",
    "Embedder",
    "Event",
    "Experiment",
    "Health",
    "Judge",
    "Metric",
    "OptimizationReport",
    "OutageError",
    "Preview",
    "Price",
    "Production",
    "ProgramCall",
    "RateLimit",
    "RateLimitedError",
    "Redactor",
    "RejectedError",
    "Retry",
    "Rollout",
    "Run",
    "RunStoppedError",
    "Scorecard",
    "StoppedError",
    "StoreUnavailableError",
    "UnpricedModelError",
    "UnusableAnswerError",
    "add_listener",
    "alerts",
    "call_context",
    "call_report",
    "controls",
    "enable_logging",
    "evaluate",
    "from_config",
    "health",
    "metrics",
    "registry",
    "tracking",
    "wrap",
]

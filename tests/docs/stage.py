"""What stands around the examples of docstrings, by the module whose names they show: they say what is particular."""

from __future__ import annotations

from typing import Final

_PROGRAM: Final = """
import json
from datetime import timedelta
from pathlib import Path

import dspy
import dspy_prod
from dspy_prod import Metric, Rollout, alerts, metrics, privacy, registry, testing, tracking
from dspy_prod.tracking import RunMessages


class Triage(dspy.Module):
    def __init__(self):
        super().__init__()
        self.classify = dspy.Predict("message -> category, reply")

    def forward(self, message):
        return self.classify(message=message)


def evaluate(program):
    return {"accuracy": 0.9, "examples": 200}


lm = dspy_prod.LM("openai/gpt-4o-mini", max_tokens=200, store="memory://")
dspy.configure(lm=lm)
program = Triage()
service = dspy_prod.Production(program, name="triage")
Path("prod.toml").write_text('[lm.small]\\nmodel = "openai/gpt-4o-mini"\\n')
"""

_REGISTRY: Final = """
import mlflow

mlflow.set_tracking_uri("sqlite:///mlflow.db")
first = registry.publish(program, "triage")
program.classify.demos = [dspy.Example(message="I was charged twice.", category="billing", reply="Sorry!")]
second = registry.publish(program, "triage", metrics={"accuracy": 0.9})
for number in (first, second, first):
    registry.promote("triage", number)
    registry.promote("triage", number, alias="staging")
strict = registry.Gate(lambda program: {"accuracy": 0.7}, thresholds={"accuracy": 0.85})
"""

_SERVICE: Final = """
from contextlib import asynccontextmanager

from fastapi import FastAPI
from starlette.applications import Starlette

import dspy_prod.asgi
from dspy_prod.asgi import CallContextMiddleware

app = FastAPI()
"""

STAGES: Final = {
    "dspy_prod": _PROGRAM,
    "dspy_prod.alerts": _PROGRAM,
    "dspy_prod.asgi": _SERVICE,
    "dspy_prod.guardrails": "from dspy_prod.guardrails import cost, error_rate, fallback_rate, latency\n",
    "dspy_prod.metrics": _PROGRAM,
    "dspy_prod.privacy": _PROGRAM,
    "dspy_prod.registry": _PROGRAM + _REGISTRY,
    "dspy_prod.testing": _PROGRAM,
    "dspy_prod.tracking": _PROGRAM + 'tracking.enable("stage", tracking_uri="sqlite:///mlflow.db")\n',
}
"""Public module → the code before its examples."""

_AS_FIRST: Final = 'registry.promote("triage", first)\n'

BEFORE: Final = {
    "dspy_prod.registry.GateReport": _AS_FIRST,
    "dspy_prod.registry.PromotionRefusedError": _AS_FIRST,
    "dspy_prod.registry.promote": _AS_FIRST,
}
"""Name → what an example takes for granted that another one may have changed."""

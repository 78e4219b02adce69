"""Attributes of spans: what MLflow calls those that it knows, and how it keeps a value.

Needs neither DSPy nor MLflow: the process that writes traces begins the sooner.
"""

from __future__ import annotations

import json
from typing import Any, Final

import orjson

REQUEST_ID: Final = "mlflow.traceRequestId"
TYPE: Final = "mlflow.spanType"
INPUTS: Final = "mlflow.spanInputs"
OUTPUTS: Final = "mlflow.spanOutputs"
COST: Final = "mlflow.llm.cost"
MODEL: Final = "mlflow.llm.model"
PROVIDER: Final = "mlflow.llm.provider"
USAGE: Final = "mlflow.chat.tokenUsage"
MESSAGES: Final = "mlflow.message.format"
TAG: Final = "mlflow.traceTag."
"""Prefix of root-span attributes that MLflow turns into tags of the trace."""


def dumped(value: Any) -> str:
    """A value as MLflow keeps attributes: JSON text. What is not valid Unicode becomes a question mark."""
    try:
        return orjson.dumps(value, default=str, option=orjson.OPT_NON_STR_KEYS).decode()
    except TypeError:  # lone surrogates, or integers beyond 64 bits
        return valid(json.dumps(value, default=str, ensure_ascii=False))


def valid(text: str) -> str:
    """The text with what is not valid Unicode replaced."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode()

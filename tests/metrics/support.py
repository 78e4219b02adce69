"""A service that has seen everything: answers, hits, errors, another model, an open circuit, a wait, a spent budget."""

from __future__ import annotations

import itertools
import time
import warnings
from collections.abc import Mapping
from typing import Any
from urllib.request import Request, urlopen

from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

import dspy_prod
from dspy_prod import Budget, CircuitBreaker, Price, RateLimit, RejectedError, Retry
from dspy_prod.telemetry.events import BUS
from dspy_prod.testing import Provider, Status

PRICE = (0.15, 0.60)
_numbers = itertools.count()


def lm_at(provider: Provider, model: str, **policies: Any) -> dspy_prod.LM:
    """An LM with a store of its own."""
    defaults: dict[str, Any] = {
        "cache": False,
        "max_tokens": 50,
        "prices": {f"openai/{model}": Price(input=PRICE[0], output=PRICE[1])},
    }
    return dspy_prod.LM(
        f"openai/{model}", api_base=provider.url, api_key="sk-none-of-yours-1234",
        store=policies.pop("store", f"memory://metrics-{next(_numbers)}"), **{**defaults, **policies},
    )  # fmt: skip


def refused(lm: dspy_prod.LM, prompt: str = "more") -> str:
    """Why a call is refused."""
    try:
        lm(prompt)
    except RejectedError as error:
        return error.reason
    raise AssertionError("it was not refused")


def busy(provider: Provider, name: str) -> list[dspy_prod.LM]:
    """Live through all of it with models whose names begin so; the LMs, to be kept alive."""
    good = lm_at(provider, f"{name}-good", cache=True, budget=Budget(usd=1, per="day", name=f"{name}-day"),
                 limit=RateLimit(rpm=60_000, tpm=10_000_000))  # fmt: skip
    for number in range(6):
        good(f"question {number % 4}")
    unpriced = lm_at(provider, f"{name}-unpriced", prices={})
    unpriced("what does it cost?")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is a budget for one call
        poor = lm_at(provider, f"{name}-poor", budget=Budget(usd=0.00006, per="total", soft=0.5, name=f"{name}-poor"))
    assert poor("once")
    assert refused(poor) == "budget_exceeded"
    slow = lm_at(provider, f"{name}-slow", limit=RateLimit(rpm=120, burst=1))
    slow("now")
    slow("half a second later")
    prices = {f"openai/{name}-{each}": Price(input=PRICE[0], output=PRICE[1]) for each in ("good", "down")}
    down = lm_at(
        provider, f"{name}-down", fallbacks=[f"openai/{name}-good"], retry=Retry(attempts=2, backoff=0.001),
        breaker=CircuitBreaker(failure_threshold=2, recovery_timeout=60), prices=prices,
    )  # fmt: skip
    down("by the other model")
    down("at once by the other model")
    BUS.emit("experiment_alarm", time.time(), experiment=name, what="rollback", reason="worse", stage=0, variant="b",
             verdict="rollback")  # fmt: skip
    return [good, unpriced, poor, slow, down]


def failing(name: str) -> Any:
    """Faults for a `Provider`: the model that is down."""
    return lambda call: Status(500) if call.model.endswith(f"{name}-down") else None


def scraped(url: str, accept: str = "text/plain") -> dict[str, Metric]:
    """What Prometheus would read there, by family."""
    with urlopen(Request(url, headers={"Accept": accept}), timeout=10) as answer:
        text = answer.read().decode()
    return {family.name: family for family in text_string_to_metric_families(text)}


def value(families: Mapping[str, Metric], sample: str, **labels: str) -> float:
    """The sum of all samples of this name with these labels."""
    found = [
        each.value
        for family in families.values()
        for each in family.samples
        if each.name == sample and all(each.labels.get(name) == label for name, label in labels.items())
    ]
    return sum(found)

"""Warnings that an LM gives its user: DSPy's deprecation of `messages=`, budgets that one call nearly fills, and
fallbacks that could not help."""

from __future__ import annotations

import inspect
import warnings
from typing import Any

from dspy.lm15 import Message, NotConfiguredError, Request

from dspy_prod.compat.dspy import warns_of_messages
from dspy_prod.lm.beneath import Beneath
from dspy_prod.pipeline.upstream.upstream import Upstream
from dspy_prod.records import usd
from dspy_prod.runtime.switch import disabled


def warn_messages(lm: Beneath, messages: Any) -> None:
    """DSPy's own deprecation of `messages=`, attributed to the caller instead of to this library."""
    if not warns_of_messages(lm, messages):
        return
    level = 1
    frame = inspect.currentframe()
    while frame is not None:
        module = str(frame.f_globals.get("__name__", ""))
        if module.split(".", 1)[0] not in ("dspy", "dspy_prod"):
            break
        level += 1
        frame = frame.f_back
    warnings.warn(
        "Passing OpenAI-style messages= to an LM is deprecated in DSPy and goes away in DSPy 3.5; "
        "pass a dspy.lm15.Request, or a plain prompt",
        DeprecationWarning,
        stacklevel=level,
    )


def warn_steered_budgets(lm: Beneath) -> None:
    """Warn when other settings are in force than those an LM is built with: what `set_budget` said outlasts it."""
    if disabled():
        return
    for built, rule in zip(lm.settings.budgets, lm.pipeline.rules, strict=True):
        if built != rule.options:
            warnings.warn(
                f"The budget {built.title!r} keeps the settings that are in force, {rule.options!r}; {built!r} is what "
                "LMs were built with before those were said. Call lm.set_budget(...) to change them",
                UserWarning,
                stacklevel=3,
            )


def warn_idle_fallbacks(lm: Beneath) -> None:
    """Warn of fallbacks that could answer nothing: without a key, or, under a budget, without a price.

    Nobody would notice before the outage they are there for.
    """
    for route in lm.pipeline.fallbacks:
        missing = _missing_key(route.upstream)
        if missing is not None:
            warnings.warn(f"The fallback {route.model} cannot be used: {missing}", UserWarning, stacklevel=3)
        elif (lm.pipeline.budgets or route.rules) and route.rates() is None:
            warnings.warn(
                f"The fallback {route.model} cannot be used under a budget, because no price is known for it; pass "
                f"prices={{{route.model!r}: dspy_prod.Price(input=..., output=...)}} (USD per million tokens)",
                UserWarning,
                stacklevel=3,
            )


def _missing_key(upstream: Upstream) -> str | None:
    """What the native engine says of a key that is nowhere; LiteLLM only says it when it is called."""
    if not isinstance(upstream.spec, str):
        return None
    request = Request(model=upstream.model, messages=(Message.user("?"),))
    try:
        engine, native = upstream.sync_engine(request, None)
        if native:
            found = engine.resolve(upstream.model)
            engine.router.lm(f"{found.provider}:{found.model}")
    except NotConfiguredError as error:
        return " ".join(error.message.split())
    except Exception:  # whatever else is wrong, the first call tells
        return None
    return None


def warn_coarse_budgets(lm: Beneath) -> None:
    """Warn when one call's bound is a large part of a budget: the last part of it could not be spent."""
    if disabled() or not lm.settings.budgets:
        return
    if not isinstance(lm.settings.engine, str):
        return
    rates = lm.pipeline.primary.rates()
    if rates is None:
        return
    given = lm.kwargs.get("max_tokens") or lm.kwargs.get("max_completion_tokens")
    tokens = given or rates.max_output_tokens
    if tokens is None:
        return
    size = f"max_tokens={given}" if given else f"The model's own limit of {tokens} output tokens"
    remedy = "Lower max_tokens" if given else "Set max_tokens"
    bound = rates.bound(0, int(tokens))
    for budget in lm.settings.budgets:
        if budget.per == "call":
            if bound > budget.limit_nano:
                warnings.warn(
                    f"{size} lets one call of {lm.model} cost {usd(bound):.6f} USD, more than the budget "
                    f"{budget.title!r} allows for one ({budget.usd:g} USD), so that every call is refused. {remedy}",
                    UserWarning,
                    stacklevel=4,
                )
        elif bound > 0.05 * budget.limit_nano:
            warnings.warn(
                f"{size} lets one call of {lm.model} reserve {usd(bound):.6f} USD, more than 5 % of the "
                f"budget {budget.title!r} ({budget.usd:g} USD); up to one such reservation may stay unspent. "
                f"{remedy}, or set shrink_last=True",
                UserWarning,
                stacklevel=4,
            )

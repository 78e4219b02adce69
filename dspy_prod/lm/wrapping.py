"""`dspy_prod.wrap`: policies beneath an LM that somebody else built."""

from __future__ import annotations

from typing import Any

import dspy
from dspy.utils.dummies import DummyLM

from dspy_prod.compat.dspy import caches_responses, engines_of
from dspy_prod.errors import ConfigError
from dspy_prod.lm.assembling import refuse_own_forward
from dspy_prod.lm.lm import LM
from dspy_prod.lm.settings import ATTRIBUTES, hide


def wrap(lm: dspy.LM, **policies: Any) -> LM:
    """The same LM with policies beneath it.

    Args:
        lm: a `dspy.LM` somebody else built, or DSPy's `DummyLM`; its cache and retries are replaced by ours.
        policies: policy arguments of `dspy_prod.LM`.

    Raises:
        ConfigError: another kind of LM, or one with a `forward` of its own, which would be bypassed.

    Example:
        ```python
        guarded = dspy_prod.wrap(dspy.LM("openai/gpt-4o-mini"), budget=dspy_prod.Budget(usd=1, name="wrapped"))
        ```
    """
    hide(policies)
    if isinstance(lm, LM):
        return lm.copy(**policies)
    if not isinstance(lm, (dspy.LM, DummyLM)):
        raise ConfigError(f"wrap takes a dspy.LM, got {type(lm).__name__}; for a custom model implement an engine")
    refuse_own_forward(lm)
    arguments = hide(dict(lm.kwargs))
    tokens = arguments.pop("max_tokens", None)
    arguments["max_tokens"] = arguments.pop("max_completion_tokens", None) if tokens is None else tokens
    if "retry" not in policies:
        arguments["num_retries"] = lm.num_retries
    arguments.update(hide({name: getattr(lm, name) for name in ATTRIBUTES if hasattr(lm, name)}))
    arguments["cache"] = caches_responses(lm)
    arguments["callbacks"] = list(lm.callbacks)
    if "engine" not in policies:
        arguments["engine"], arguments["async_engine"] = engines_of(lm)
    return LM(lm.model, lm.model_type, **{**arguments, **policies})

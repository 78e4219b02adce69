"""Whether a model's bare name, without a provider before it, is one that DSPy or LiteLLM knows whom to ask for."""

from __future__ import annotations

from dspy.clients.engines.lm15_engine import LM15Engine
from dspy.lm15 import RouterConfig, UnknownModelError

from dspy_prod.compat.litellm import get_litellm


def is_served(model: str) -> bool:
    """Whether a call for this model would be sent anywhere: a car has a model, too, and nobody serves it.

    Args:
        model: a name, as `dspy.LM` takes it.

    Example:
        ```python
        is_served("gpt-4o-mini")  # True
        is_served("Golf")  # False
        ```
    """
    try:
        LM15Engine(RouterConfig(env={}), model_type="chat").resolve(model)
    except UnknownModelError:
        pass
    except Exception:  # it knows the model, and what it misses is something else
        return True
    else:
        return True
    try:
        litellm = get_litellm(feature="dspy_prod")
    except ImportError:  # then it is asked for nothing
        return False
    try:
        litellm.get_llm_provider(model)
    except litellm.BadRequestError:
        return False
    except Exception:  # as above
        return True
    return True

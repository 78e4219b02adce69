"""The steps in which DSPy executes a call, as far as this library takes them itself.

`dspy.clients.execution` serves legacy plugins, compatibility engines, `n > 1`, retries and streams. What it does for
one canonical request on an engine object is written again in `asking`, `executing` and `finishing`, in the same order
and with the same errors; every other call still goes through it, and all do if a version of DSPy has other steps than
the known ones.
"""

from __future__ import annotations

import logging
from inspect import signature
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from dspy.clients import execution

from dspy_prod.compat.foreign import names, version_of

STEPS: Final = {
    "PreparedCall": "prompt messages kwargs legacy request cache n managed",
    "CallResult": "responses outputs usage cost raw response_model cache_hit cost_details",
    "prepare": "lm prompt messages kwargs asynchronous direct",
    "finalize": "lm call result",
    "_canonical": "call compat",
    "_result": "lm response call provider request estimate",
    "_hint_responses_api": "lm exc",
}
"""What the short way is made of: names in DSPy's executor, and their parameters."""


def _known() -> bool:
    """Whether this DSPy has exactly these steps."""
    try:
        return all(
            " ".join(signature(getattr(execution, name)).parameters) == parameters for name, parameters in STEPS.items()
        )
    except (AttributeError, TypeError, ValueError):
        return False


SHORT: Final = _known()
"""Whether calls go the short way. Only then all the names below are there."""

if TYPE_CHECKING:
    PreparedCall: TypeAlias = Any
    CallResult: TypeAlias = Any
    canonical: Any
    result_by_dspy: Any
    hint: Any
elif SHORT:
    PreparedCall, CallResult, _, _, canonical, result_by_dspy, hint = names("dspy.clients.execution", *STEPS)
else:
    PreparedCall = CallResult = result_by_dspy = hint = None
    [canonical] = names("dspy.clients.execution", "_canonical")
    logging.getLogger("dspy_prod").warning(
        "DSPy %s executes calls in other steps than dspy_prod knows; its own, slower executor is used",
        version_of("dspy"),
    )

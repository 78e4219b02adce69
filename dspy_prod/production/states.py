"""What of a program's saved state is taken when nobody vouches for whoever wrote it.

DSPy's own loader leaves three addresses out of an LM's arguments. LiteLLM knows more of them, `fallbacks` has some
within, and a predictor's own arguments (`config`) are not looked at.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Set
from typing import Any, Final

import dspy
from dspy.clients.base_lm import LM_CLASS_STATE_KEY

from dspy_prod.compat.dspy import keys_beside
from dspy_prod.errors import ConfigError
from dspy_prod.privacy.states import beyond, harmless

_PLAIN: Final = (None, "dspy.clients.lm.LM", "dspy.clients.typesafe.TypeSafe")
"""Classes that DSPy loads without `allow_unsafe_lm_state`."""

_ENGINES: Final = ("engine", "async_engine")
_log = logging.getLogger("dspy_prod")


def vouchless(program: Any, state: Mapping[str, Any]) -> dict[str, Any]:
    """The state, with the LMs in it made of what cannot lead their calls elsewhere; a warning names the rest.

    Args:
        program: the program that is to take it.
        state: what `dspy.Module.save` wrote.

    Raises:
        ConfigError: a predictor's state has keys that nobody writes, or arguments by which calls could go elsewhere.
    """
    if isinstance(program, dspy.Predict):  # its state is that of the program, and `save` adds to it
        return _parameter("self", program, state, {"metadata"})
    kept = dict(state)
    for name, parameter in program.named_parameters():
        if isinstance(state.get(name), Mapping):
            kept[name] = _parameter(name, parameter, state[name])
    return kept


def _parameter(name: str, parameter: Any, state: Mapping[str, Any], more: Set[str] = frozenset()) -> dict[str, Any]:
    strangers, arguments = beyond(state, keys_beside(parameter) | more)
    if strangers or arguments:
        raise ConfigError(
            f"the saved state of {name!r} says {', '.join([*strangers, *arguments])}, which DSPy does not write and "
            "which could change what its calls do: set it in the code, or load the state with "
            "allow_unsafe_lm_state=True if you trust who wrote it"
        )
    lm = state.get("lm")
    if not isinstance(lm, Mapping) or lm.get(LM_CLASS_STATE_KEY) not in _PLAIN:
        return dict(state)
    kept, left_out = harmless(lm, LM_CLASS_STATE_KEY, ours=False)
    if "model" in left_out:
        raise ConfigError(
            f"the saved LM of {name!r} has an address for its model, to which prompts and a key would go; load the "
            "state with allow_unsafe_lm_state=True if you trust who wrote it"
        )
    engines = {key: lm[key] for key in _ENGINES if key in lm}  # DSPy refuses those that are not its own
    left_out = [key for key in left_out if key not in engines]
    if left_out:
        _log.warning(
            "The LM %s of %r is rebuilt without %s, by which its calls could go elsewhere; load the state with "
            "allow_unsafe_lm_state=True if you trust who wrote it",
            lm.get("model"), name, ", ".join(left_out),
        )  # fmt: skip
    return {**state, "lm": {**kept, **engines}}

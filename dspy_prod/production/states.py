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

from dspy_prod.compat.saving import is_parameter, is_read_by_dspy, keys_beside
from dspy_prod.errors import ConfigError
from dspy_prod.privacy.states import PREDICTOR, beyond, harmless_within, rebuilt

_ENGINES: Final = ("engine", "async_engine")
_log = logging.getLogger("dspy_prod")


def vouchless(program: Any, state: Mapping[str, Any]) -> dict[str, Any]:
    """The state, with the LMs in it made of what cannot lead their calls elsewhere; a warning names the rest.

    Args:
        program: the program that is to take it.
        state: what `dspy.Module.save` wrote.

    Raises:
        ConfigError: a predictor's state has keys that its class does not write, or arguments by which calls could go
            elsewhere; an LM has an address for its model; or the state is nested too deep to be read.
    """
    try:
        return _vouchless(program, state)
    except RecursionError:
        raise ConfigError("the saved state is nested too deep to be read; save the program again") from None


def _vouchless(program: Any, state: Mapping[str, Any]) -> dict[str, Any]:
    if is_parameter(program):  # its state is that of the program, and `save` adds to it
        return _parameter("self", program, state, {"metadata"})
    parameters = dict(program.named_parameters())
    return {
        name: _parameter(name, parameters[name], value)
        if name in parameters and isinstance(value, Mapping)
        else _of_others(str(name), value)
        for name, value in state.items()
    }


def _parameter(name: str, parameter: Any, state: Mapping[str, Any], more: Set[str] = frozenset()) -> dict[str, Any]:
    by_dspy = is_read_by_dspy(parameter)
    if by_dspy:
        strangers, arguments = beyond(state, keys_beside(parameter, state) | more)
        if strangers or arguments:
            raise ConfigError(
                f"the saved state of {name!r} says {', '.join([*strangers, *arguments])}, which "
                f"{type(parameter).__name__} does not write and which could change what its calls do: set it in the "
                "code, or load the state with allow_unsafe_lm_state=True if you trust who wrote it"
            )
    known = PREDICTOR if isinstance(parameter, dspy.Predict) else frozenset()
    return {
        key: _lm(name, value)
        if by_dspy and key == "lm"
        else value
        if key in known
        else _of_others(name, value, str(key))
        for key, value in state.items()
    }


def _lm(name: str, lm: Any) -> Any:
    """The LM of a predictor, or of a `dspy.Flex`, for DSPy's loader, which refuses classes and engines of others.

    A loader of the parameter's own may be asked first, and look at neither.
    """
    if not isinstance(lm, Mapping):
        return _of_others(name, lm, "lm")
    engines = {key: lm[key] for key in _ENGINES if key in lm}

    def refused(where: str, part: Mapping[str, Any], left_out: list[str]) -> None:
        if part is lm:
            _say(name, lm, [key for key in left_out if key not in engines])
        else:
            _say(f"{name}.{where}", part, left_out)

    return {**rebuilt(lm, LM_CLASS_STATE_KEY, refused, "lm"), **engines}


def _of_others(name: str, value: Any, at: str = "") -> Any:
    """What only a class that is not DSPy's reads: it may make LMs of it."""

    def refused(where: str, lm: Mapping[str, Any], left_out: list[str]) -> None:
        _say(f"{name}.{where}" if where else name, lm, left_out)

    return harmless_within(value, LM_CLASS_STATE_KEY, refused, at)


def _say(name: str, lm: Mapping[str, Any], left_out: list[str]) -> None:
    if "model" in left_out:
        raise ConfigError(
            f"the saved LM of {name!r} has an address for its model, to which prompts and a key would go; load the "
            "state with allow_unsafe_lm_state=True if you trust who wrote it"
        )
    if left_out:
        _log.warning(
            "The LM %s of %r is rebuilt without %s, by which its calls could go elsewhere; load the state with "
            "allow_unsafe_lm_state=True if you trust who wrote it",
            lm.get("model"), name, ", ".join(left_out),
        )  # fmt: skip

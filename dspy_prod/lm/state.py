"""An LM as JSON and back: what `program.save("x.json")` writes for a predictor's own LM.

The state holds every constructor argument that differs from its default, under the argument's own name, and no secret:
keys come from the environment when it is loaded, and headers are given again with `copy(extra_headers=...)`. Loading
with DSPy takes `program.load("x.json", allow_unsafe_lm_state=True)`, as for every LM class that is not DSPy's own.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import Any, Final, TypeVar

import dspy
from dspy.clients.base_lm import LM_CLASS_STATE_KEY, BaseLM
from dspy.lm15 import CacheConfig

from dspy_prod.compat.dspy import dump_engine, load_engine
from dspy_prod.compat.lm15 import cache_config_from_dict, cache_config_to_dict
from dspy_prod.errors import ConfigError
from dspy_prod.lm.beneath import Beneath
from dspy_prod.lm.settings import ATTRIBUTES, DSPY, ROWS
from dspy_prod.options import Options
from dspy_prod.policies.sharing import quoted
from dspy_prod.privacy.known import blotted_in, known
from dspy_prod.privacy.names import bare_url, public
from dspy_prod.privacy.states import harmless
from dspy_prod.stores.addresses import with_password

Loaded = TypeVar("Loaded", bound=dspy.LM)

_log = logging.getLogger("dspy_prod")

_EXPECTED: Final = frozenset({"api_key", "azure_ad_token_provider"})
"""Secrets that are found again without being told: no word about them."""


def dump(lm: Beneath, base: Mapping[str, Any]) -> dict[str, Any]:
    """What `load` rebuilds the LM from.

    Args:
        lm: the LM.
        base: DSPy's own part of the state: class, model and generation arguments.

    Raises:
        TypeError: an argument is not JSON, or an engine object cannot be saved; the message names it.
        ConfigError: a key stands in the place of something else, such as the model.
    """
    settings = lm.settings
    dropped = {"num_retries", *settings.clients, *settings.extras}  # said by `retry`, and by the settings
    state = {name: value for name, value in base.items() if name not in dropped}
    if isinstance(state.get("prompt_cache"), CacheConfig):
        state["prompt_cache"] = cache_config_to_dict(state["prompt_cache"])
    if "max_completion_tokens" in state:  # reasoning models: DSPy's constructor takes the other name
        state["max_tokens"] = state.pop("max_completion_tokens")
    state.update({name: value for name in ATTRIBUTES if DSPY[name] is not None and (value := getattr(lm, name))})
    for field, row in ROWS.items():
        value = getattr(settings, field)
        if row.saved and value != row.default and (lm.cache or field != "cache"):
            state[row.name] = _saved(row.name, value)
    given = {**settings.clients, **settings.extras}
    written = public(given)
    lost = sorted(given.keys() - written.keys() - _EXPECTED)
    if lost:
        _log.warning("%r: %s may hold secrets and are not saved; set them again after loading", lm, ", ".join(lost))
    state.update(written)
    _check_json(state)
    for name, value in state.items():
        _check_no_key(name, value)
    return state


def load(cls: type[Loaded], state: Mapping[str, Any], allow: bool) -> Loaded:
    """The LM that `dump` described.

    Args:
        cls: the class to make.
        state: what `dump` gave, after JSON.
        allow: whether whoever wrote the state is trusted: classes that it names may be imported (engines, other LM
            classes), and what says where calls go, or with what, holds. Else only what is harmless does, see
            `privacy.states`, and a warning names the rest.

    Raises:
        ValueError: the state names a class and `allow` is False.
        ConfigError: the state contradicts itself or is none, or an address stands for its model and `allow` is False.
    """
    try:
        json.dumps(state, allow_nan=False, default=str)
    except (TypeError, ValueError) as error:  # it could be neither sent nor saved again
        raise ConfigError(f"the saved state of an LM is no JSON ({error}); save the program again") from None
    try:
        return _load(cls, state, allow)
    except (TypeError, AttributeError, KeyError) as error:  # what somebody wrote by hand fails in whatever way
        raise ConfigError(
            f"the saved state of an LM cannot be read ({type(error).__name__}: {error}); save the program again"
        ) from error


def _load(cls: type[Loaded], state: Mapping[str, Any], allow: bool) -> Loaded:
    _check_no_key("model", state.get("model"))
    arguments = dict(state) if allow else _trusted(state)
    arguments.pop(LM_CLASS_STATE_KEY, None)
    arguments.pop("num_retries", None) if "retry" in arguments else None
    if isinstance(arguments.get("prompt_cache"), Mapping):
        arguments["prompt_cache"] = cache_config_from_dict(arguments["prompt_cache"])
    for name in ("engine", "async_engine"):
        if arguments.get(name) is not None and not isinstance(arguments[name], str):
            arguments[name] = load_engine(arguments[name], name, allow_custom_lm_class=allow)
    if "fallbacks" in arguments:
        arguments["fallbacks"] = [_load_fallback(cls, item, allow) for item in arguments["fallbacks"]]
    if isinstance(arguments.get("store"), str):
        arguments["store"] = with_password(arguments["store"])
    with quoted():  # loading must not change what a budget allows
        loaded: Loaded = cls(**arguments)
    return loaded


def _trusted(state: Mapping[str, Any], *, ours: bool = True) -> dict[str, Any]:
    """What of a state, of an LM of ours or of another one, needs nobody's word for it."""
    for name in ("engine", "async_engine"):
        if state.get(name) is not None and not isinstance(state[name], str):
            load_engine(state[name], name, allow_custom_lm_class=False)  # DSPy's refusal, in its words
    arguments, left_out = harmless(state, LM_CLASS_STATE_KEY, ours=ours)
    if "model" in left_out:
        raise ConfigError(
            f"the saved model {state['model']!r} is an address, to which prompts and a key would go; load the state "
            "with allow_unsafe_lm_state=True if you trust who wrote it"
        )
    if left_out:
        _log.warning(
            "The LM %r is rebuilt without %s, by which its calls could go elsewhere, or past a budget; load it with "
            "allow_unsafe_lm_state=True if you trust who wrote its state, or say them again with copy(...)",
            state.get("model"),
            ", ".join(left_out),
        )
    return arguments


def _saved(name: str, value: Any) -> Any:
    """A setting as JSON, under the name of its argument."""
    if value is None:
        return False  # switched off
    if isinstance(value, str):
        return bare_url(value)
    if isinstance(value, Options):
        return value.model_dump(mode="json", exclude_defaults=True)
    if isinstance(value, tuple):
        return [_saved(name, item) for item in value]
    if isinstance(value, Mapping):
        return {key: _saved(name, item) for key, item in value.items()}
    if isinstance(value, BaseLM):
        return public(value.dump_state())
    return bare_url(value.url) if name == "store" else dump_engine(value, name)


def _load_fallback(cls: type[dspy.LM], state: Any, allow: bool) -> str | dspy.LM:
    if isinstance(state, str):
        return state if allow else str(_trusted({"model": state})["model"])
    if not isinstance(state, Mapping):
        raise ConfigError(f"a saved fallback is a model name or an LM's state, not {type(state).__name__}")
    named = state.get(LM_CLASS_STATE_KEY)  # this class, or one of ours that it is derived from: nothing to import
    own: Any = next((each for each in cls.__mro__ if f"{each.__module__}.{each.__qualname__}" == named), BaseLM)
    if not allow:
        state = _trusted(state, ours=own not in dspy.LM.__mro__)
    loaded: dspy.LM = own.load_state(dict(state), allow_custom_lm_class=allow)
    return loaded


def _check_no_key(name: str, value: Any) -> None:
    """A key that somebody gave in place of a name must not get into a file."""
    if blotted_in(value, known()) is not value:
        raise ConfigError(f"{name}= is, or holds, what is known as a key or a password; give it as api_key= alone")


def _check_json(state: Mapping[str, Any]) -> None:
    for name, value in state.items():
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise TypeError(
                f"{name}= of this LM ({type(value).__name__}) cannot be saved as JSON: {error}. Pass it with each call "
                "instead, or set the LM again after loading"
            ) from None

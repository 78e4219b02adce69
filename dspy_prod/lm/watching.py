"""Whether an LM's `kwargs`, and the environment, still say what was installed beneath it.

`dspy.LM` reads its client settings from `lm.kwargs` at every call, and DSPy changes them there: `lm.launch()` points an
LM at the server it has started. Ours are compiled into engines, limits and cache keys, so each call looks first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TypeVar

from dspy_prod.compat.environ import watch
from dspy_prod.lm.beneath import INSTALLED, Beneath
from dspy_prod.lm.copying import checked, twin_of
from dspy_prod.lm.settings import CANONICAL_KEYS, Settings, hide, split
from dspy_prod.pipeline.upstream.destination import variables

Watchable = TypeVar("Watchable", bound=Beneath)


class Watched:
    """What an LM was installed for.

    Attributes:
        elsewhere: its `kwargs` hold what is no part of a request: settings of the client, which are in its identity.
    """

    __slots__ = ("_given", "_model", "_still", "elsewhere")

    def __init__(self, model: str, kwargs: Mapping[str, Any], engine: Any) -> None:
        self._model = model
        self._given = {name: _kept(value) for name, value in kwargs.items() if name not in CANONICAL_KEYS}
        self.elsewhere = bool(self._given)
        self._still = (
            watch(variables(kwargs, model)) if isinstance(engine, str) else None
        )  # an engine object goes its own way

    def holds(self, model: str, kwargs: Mapping[str, Any]) -> bool:
        """Whether the LM may be used as it is."""
        if model is not self._model and model != self._model:
            return False
        if self._still is not None and not self._still():
            return False
        if CANONICAL_KEYS.issuperset(kwargs):
            return not self._given
        return {name: value for name, value in kwargs.items() if name not in CANONICAL_KEYS} == self._given


def _kept(value: Any) -> Any:
    """The value as it is now, whatever becomes of the tables in it."""
    if isinstance(value, dict):
        return {name: _kept(item) for name, item in value.items()}
    return [_kept(item) for item in value] if isinstance(value, list) else value


def settled(lm: Watchable) -> Watchable:
    """The LM, with what its `kwargs` and the environment say now beneath it.

    Raises:
        ConfigError: they say something impossible.
    """
    if not lm.watched.holds(lm.model, lm.kwargs):
        _, clients, extras = split(hide(lm.kwargs))
        made: Beneath = twin_of(lm)  # apart, so that no other thread meets half of it
        made._install(checked(replace(lm.settings, clients=clients, extras=extras), "lm.kwargs"))
        lm.__dict__.update({name: made.__dict__[name] for name in INSTALLED})
    return lm


def arguments_of(kwargs: Mapping[str, Any], settings: Settings) -> dict[str, Any]:
    """What `lm.kwargs` shows: the arguments of generation there, and these settings."""
    canonical = {name: value for name, value in kwargs.items() if name in CANONICAL_KEYS}
    return {**canonical, **settings.clients, **settings.extras}

"""What a route's model does not take, though the call was written for another model: it is left out for this route.

An argument that only shapes the answer must not turn every call of a fallback into an error of status 400, in the
outage for which the fallback is there.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Final

from dspy.lm15 import Config, Request

from dspy_prod.compat.dspy import is_openai_reasoning_model

_OPENAI: Final = frozenset({"openai", "azure", "azure_ai", "openrouter", "github"})
_THINKS_NOT: Final = re.compile(r"(gpt-3\.5|gpt-4|chatgpt|gpt-5(\.\d+)*-chat)")

_Refused = Callable[[Any], bool]
_SET: Final[_Refused] = lambda value: value is not None and value != ()  # noqa: E731
_OF_REASONING_MODELS: Final[Mapping[str, _Refused]] = {
    "temperature": lambda value: value is not None and value != 1,
    "top_p": lambda value: value is not None and value != 1,
    "frequency_penalty": _SET,
    "presence_penalty": _SET,
    "logprobs": _SET,
    "stop": _SET,
}
_OF_OTHERS: Final[Mapping[str, _Refused]] = {"reasoning": _SET}
_LEFT_OUT: Final = {name: getattr(Config(), name) for name in (*_OF_REASONING_MODELS, *_OF_OTHERS)}


def refused_by(model: str) -> Mapping[str, _Refused]:
    """The settings that a model refuses (OpenAI, "Reasoning models"), each with the values that it does."""
    provider, _, name = model.rpartition("/")
    if is_openai_reasoning_model(model):
        return _OF_REASONING_MODELS
    if (provider.split("/")[0] or "openai") in _OPENAI and _THINKS_NOT.match(name):
        return _OF_OTHERS
    return {}


def fitted(request: Request, refused: Mapping[str, _Refused]) -> tuple[Request, list[str]]:
    """The request without what is refused, and the names of what was left out."""
    config = request.config
    names = [name for name, refuses in refused.items() if refuses(getattr(config, name))]
    if not names:
        return request, names
    return replace(request, config=replace(config, **{name: _LEFT_OUT[name] for name in names})), names

"""What a route's model does not take, though the call was written for another model: it is left out for this route.

An argument that only shapes the answer must not turn every call of a fallback into an error of status 400, in the
outage for which the fallback is there. What a model refuses is told by `RULES` from its name, and by what DSPy and
LiteLLM know of it. Tools and schemas are not left out: without them it would be another question.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any, Final, NamedTuple, TypeAlias

from dspy.lm15 import Config, Request

from dspy_prod.compat.dspy import is_openai_reasoning_model, known_of
from dspy_prod.pipeline.upstream.upstream import Upstream
from dspy_prod.runtime.patterns import Pattern

Refuses: TypeAlias = Callable[[Config], bool]
"""Whether a setting is refused as it stands in these settings."""


def _given(name: str) -> Refuses:
    return lambda config: getattr(config, name) not in (None, ())


def _beside(name: str) -> Refuses:
    return lambda config: bool(config.extensions) and name in config.extensions


def _not_one(name: str) -> Refuses:
    return lambda config: getattr(config, name) not in (None, 1)


def _thinks(config: Config) -> bool:
    return config.reasoning is not None and config.reasoning.effort != "off"


_FREE_SAMPLING: Final[Mapping[str, Refuses]] = {
    "temperature": _not_one("temperature"), "top_p": _not_one("top_p"), "top_k": _given("top_k"),
}  # fmt: skip
_THINKING: Final[Mapping[str, Refuses]] = {"reasoning": _given("reasoning")}


class Rule(NamedTuple):
    """What the models of one kind refuse.

    Attributes:
        told_by: where it is said.
        models: of which model strings, as (provider, name).
        refused: settings, each with when it is refused.
    """

    told_by: str
    models: Callable[[str, str], bool]
    refused: Mapping[str, Refuses]


_OPENAI: Final = frozenset({"openai", "azure", "azure_ai", "openrouter", "github"})
_THINKS_NOT: Final = Pattern(r"(gpt-3\.5|gpt-4|chatgpt|gpt-5(\.\d+)*-chat)")
_CLAUDE: Final = Pattern(r"claude")
_CLAUDE_OF_ONE_DIAL: Final = Pattern(r"claude-(?:opus-4[-.][1-9](?!\d)|(?:sonnet|haiku)-4[-.][5-9](?!\d))")
_CLAUDE_WITHOUT_DIALS: Final = Pattern(
    r"claude-(?:opus-4[-.][7-9](?!\d)|(?:opus|sonnet|haiku)-(?:[5-9]|latest)|fable|mythos)"
)
_CLAUDE_THINKS_NOT: Final = Pattern(r"claude-(?:instant|v?2|3-(?:haiku|sonnet|opus)|3[-.]5)")

RULES: Final[tuple[Rule, ...]] = (
    Rule(
        'OpenAI, "Reasoning models"',
        lambda provider, name: is_openai_reasoning_model(f"{provider}/{name}"),
        {
            "temperature": _not_one("temperature"), "top_p": _not_one("top_p"), "stop": _given("stop"),
            "frequency_penalty": _given("frequency_penalty"), "presence_penalty": _given("presence_penalty"),
            "logprobs": _given("logprobs"),
        },
    ),
    Rule(
        "OpenAI, of its other models",
        lambda provider, name: provider in _OPENAI and _THINKS_NOT.match(name) is not None,
        _THINKING,
    ),
    Rule(
        'Anthropic, "Extended thinking": its own temperature, a `top_p` of at least 0.95, no `top_k`',
        lambda _, name: _CLAUDE.search(name) is not None,
        {
            "temperature": lambda config: _thinks(config) and config.temperature not in (None, 1),
            "top_p": lambda config: _thinks(config) and config.top_p is not None and config.top_p < 0.95,
            "top_k": lambda config: _thinks(config) and config.top_k is not None,
        },
    ),
    Rule(
        "Anthropic, of Claude 4.1 and later: temperature or `top_p`, not both",
        lambda _, name: _CLAUDE_OF_ONE_DIAL.search(name) is not None,
        {"top_p": lambda config: config.top_p is not None and (config.temperature is not None or _thinks(config))},
    ),
    Rule("Anthropic, of Claude 4.7 and later", lambda _, name: _CLAUDE_WITHOUT_DIALS.search(name) is not None,
         _FREE_SAMPLING),
    Rule("Anthropic, of models before 3.7", lambda _, name: _CLAUDE_THINKS_NOT.search(name) is not None, _THINKING),
)  # fmt: skip
"""All that fit a model hold."""

_ARGUMENTS: Final = {
    "temperature": "temperature", "top_p": "top_p", "frequency_penalty": "frequency_penalty",
    "presence_penalty": "presence_penalty", "logprobs": "logprobs", "stop": "stop", "seed": "seed",
    "reasoning": "reasoning_effort", "service_tier": "service_tier", "store": "store",
}  # fmt: skip
"""Settings, and the arguments by which LiteLLM's lists name them. It refuses what a list lacks, before it is sent."""

_BESIDE: Final = ("logit_bias", "verbosity", "prediction", "safety_identifier", "top_logprobs")
"""Arguments that no setting says, but an extension of them, under the name by which LiteLLM's lists have them."""

_LEFT_OUT: Final = {name: getattr(Config(), name) for name in (*_ARGUMENTS, "top_k")}


class Fitting:
    """What the model of one fallback refuses.

    Args:
        model: model string.
        upstream: the way to it, which knows more of the model once it is ready.
    """

    __slots__ = ("_asked", "_refused", "_upstream")

    def __init__(self, model: str, upstream: Upstream) -> None:
        self._upstream = upstream
        self._refused = refused_by(model)
        self._asked = not isinstance(upstream.spec, str)

    def fitted(self, request: Request) -> tuple[Request, list[str]]:
        """The request without what is refused, and the names of what was left out."""
        if not self._asked and self._upstream.ready:
            self._asked = True
            self._refused = (*self._refused, *known_refusals(self._upstream))
        config = request.config
        names = list(dict.fromkeys(name for name, refuses in self._refused if refuses(config)))
        if not names:
            return request, names
        changed = {name: _LEFT_OUT[name] for name in names if name in _LEFT_OUT}
        if len(changed) < len(names):
            changed["extensions"] = {name: value for name, value in config.extensions.items() if name not in names}
        return replace(request, config=replace(config, **changed)), names


def refused_by(model: str) -> tuple[tuple[str, Refuses], ...]:
    """The settings that a model refuses, as its name tells, each with when it does."""
    provider, _, name = model.rpartition("/")
    provider = provider.split("/")[0] or "openai"
    fitting = [rule for rule in RULES if rule.models(provider, name)]
    return tuple([item for rule in fitting for item in rule.refused.items()])


def known_refusals(upstream: Upstream) -> Iterable[tuple[str, Refuses]]:
    """What DSPy's catalogue, or LiteLLM's lists where it carries the model, tell besides."""
    found: dict[str, Any] = {}
    with suppress(Exception):  # LiteLLM raises what it likes of a model it does not know
        if upstream.provider == "litellm":
            taken = upstream.capabilities().params
            if taken:
                found = {name: _given(name) for name, argument in _ARGUMENTS.items() if argument not in taken}
                found.update({name: _beside(name) for name in _BESIDE if name not in taken})
        else:
            known = known_of(upstream.provider, upstream.model.partition("/")[2] or upstream.model)
            if known and not known.get("supports_reasoning"):
                found.update(_THINKING)
            if known.get("supports_sampling_params") is False:
                found.update(_FREE_SAMPLING)
    return found.items()

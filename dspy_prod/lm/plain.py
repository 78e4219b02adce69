"""What else a plain `dspy.LM` has: the older entry point, and what it tells of its engine and its model."""

from __future__ import annotations

from typing import Any, cast

from dspy_prod.compat.dspy import OwnCache, engines_of
from dspy_prod.lm.beneath import Beneath
from dspy_prod.lm.calling import aask, ask, begin, result_of


class AsPlain(OwnCache):
    """An LM that answers these questions as a plain one does, though other engines stand beneath it."""

    @property
    def _beneath(self) -> Beneath:
        return cast("Beneath", self)

    def forward(self, prompt: Any = None, messages: Any = None, **kwargs: Any) -> Any:
        """DSPy's older entry point: the answer in the form of a provider's, without history."""
        lm, kwargs, scope, known = begin(self._beneath, prompt, messages, kwargs)
        with scope:
            result = result_of(known) if known else ask(lm, scope, prompt, messages, kwargs)[1]
        return result.provider_response()

    async def aforward(self, prompt: Any = None, messages: Any = None, **kwargs: Any) -> Any:
        """Asynchronous `forward`."""
        lm, kwargs, scope, known = begin(self._beneath, prompt, messages, kwargs)
        with scope:
            result = result_of(known) if known else (await aask(lm, scope, prompt, messages, kwargs))[1]
        return result.provider_response()

    @property
    def engine(self) -> Any:
        """What was asked for: `"auto"`, `"lm15"`, `"litellm"`, or an engine object."""
        return self._beneath.settings.engine

    @property
    def supports_function_calling(self) -> bool:
        """Whether the model calls tools, as a plain `dspy.LM` says."""
        return bool(engines_of(self._beneath)[0].supports_function_calling)

    @property
    def supports_reasoning(self) -> bool:
        """Whether the model reasons natively."""
        return bool(engines_of(self._beneath)[0].supports_reasoning)

    @property
    def supports_response_schema(self) -> bool:
        """Whether the model answers in a given JSON schema."""
        return bool(engines_of(self._beneath)[0].supports_response_schema)

    @property
    def supported_params(self) -> set[str]:
        """Arguments that the model takes."""
        return set(engines_of(self._beneath)[0].supported_params)

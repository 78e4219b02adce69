"""What the model beneath can do, in the words in which DSPy's adapters ask an engine object.

DSPy reads capabilities off an engine object and takes a missing one for False. Ours passes on what DSPy itself would
say of the model, so that JSONAdapter keeps sending schemas and tools go on working.
"""

from __future__ import annotations

from typing import Any

from dspy.clients.capabilities import _capabilities


class StandIn:
    """What DSPy's own look-ups need to know of an LM: which backend carries it, and what it can do."""

    def __init__(self, upstream: Any, clients: dict[str, Any]) -> None:
        self.model = upstream.model
        self.model_type = upstream.model_type
        self.kwargs = clients
        self.engine = self._engine_spec = upstream.spec
        self._providers = upstream._providers

    @property
    def _provider_name(self) -> str:
        return self.model.split("/", 1)[0] if "/" in self.model else "openai"


def capabilities_of(upstream: Any) -> Any:
    """DSPy's `Capabilities` of the model behind an upstream; an engine object says for itself.

    The first question about a model that only LiteLLM knows imports LiteLLM, which takes seconds.
    """
    return _capabilities(StandIn(upstream, upstream.clients))

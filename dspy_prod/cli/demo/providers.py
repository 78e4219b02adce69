"""Who answers in the demo: a real local model behind a relay, the simulated provider, or a model of your choice."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any, Final

from dspy.lm15 import Request, Response, ServerError

import dspy_prod
from dspy_prod.cli.demo.local_model import LocalModel
from dspy_prod.pipeline.upstream.upstream import Upstream
from dspy_prod.testing import Provider, Relay

PRIMARY: Final = "lm_studio/triage-large"
FALLBACK: Final = "lm_studio/triage-small"
PRICES: Final = {PRIMARY: (0.50, 1.50), FALLBACK: (0.10, 0.30)}
"""USD per million tokens that the demo's two providers charge."""


class LocalProviders:
    """Two OpenAI-compatible providers on loopback with prices, faults and bills; one model answers for both.

    Args:
        simulate: answer with made-up text instead of the local model.
    """

    def __init__(self, simulate: bool) -> None:
        prices = {model.split("/", 1)[1]: price for model, price in PRICES.items()}
        make: Callable[[], Provider] = partial(Provider, latency=(0.05, 0.2), prices=prices)
        reason = "asked for" if simulate else LocalModel.available()
        self.description = "SmolLM2-135M on this machine, behind a relay that injects faults"
        with ExitStack() as opened:
            if reason is None:
                try:
                    make = partial(Relay, opened.enter_context(LocalModel()).url, prices=prices)
                except RuntimeError as error:  # the packages are here, but the server does not start
                    reason = str(error)
            if reason is not None:
                self.description = f"the simulated provider ({reason})"
            self.primary, self.fallback = opened.enter_context(make()), opened.enter_context(make())
            self._closing = opened.pop_all()

    def lm(self, **policies: Any) -> dspy_prod.LM:
        """The production LM in front of both."""
        prices = {name: dspy_prod.Price(input=price[0], output=price[1]) for name, price in PRICES.items()}
        common: dict[str, Any] = {"api_key": "local", "max_tokens": 96, "temperature": 0.0}
        spare = dspy_prod.LM(
            FALLBACK, api_base=self.fallback.url, prices=prices, store=policies["store"],
            namespace=policies["namespace"], retry=policies.get("retry"), **common,
        )  # fmt: skip
        return dspy_prod.LM(PRIMARY, api_base=self.primary.url, prices=prices, fallbacks=[spare], **common, **policies)

    def outage(self, *, total: bool = False) -> None:
        """The primary answers 500 to everything; in a total outage the fallback does too."""
        self.primary.down()
        if total:
            self.fallback.down()

    def recover(self) -> None:
        """Both work again."""
        self.primary.up()
        self.fallback.up()

    def bill_nano(self) -> int:
        """What both providers bill together, in nano-USD."""
        return self.primary.bill.nano + self.fallback.bill.nano

    def requests(self) -> int:
        """HTTP requests that reached the providers."""
        return len(self.primary.calls) + len(self.fallback.calls)

    def close(self) -> None:
        """End providers and model."""
        self._closing.close()


class _Switch:
    """An engine for a real model that can be told to fail."""

    supports_response_schema = True
    supports_function_calling = True
    supported_params = frozenset({"temperature", "max_tokens", "response_format"})

    def __init__(self, model: str) -> None:
        self._upstream = Upstream(model, "chat", "auto", None, {}, {})
        self.down = False

    def complete(self, request: Request) -> Response:
        if self.down:
            raise ServerError("injected outage", status=500)
        engine, _ = self._upstream.sync_engine(request, None)
        response: Response = engine.complete(request)
        return response


class RealProvider:
    """A real model; its outage is injected in front of it, and its bill is the provider's own."""

    def __init__(self, model: str) -> None:
        self.model = model
        self.description = f"{model} (a real provider: this costs money)"
        self._primary, self._fallback = _Switch(model), _Switch(model)

    def lm(self, **policies: Any) -> dspy_prod.LM:
        """The production LM in front of the model, with the model itself as its fallback."""
        spare = dspy_prod.LM(
            self.model, engine=self._fallback, max_tokens=200, store=policies["store"],
            namespace=policies["namespace"] + "-spare", breaker=False,
        )  # fmt: skip
        return dspy_prod.LM(self.model, engine=self._primary, max_tokens=200, fallbacks=[spare], **policies)

    def outage(self, *, total: bool = False) -> None:
        """Calls to the primary fail; in a total outage the fallback's do too."""
        self._primary.down = True
        self._fallback.down = total

    def recover(self) -> None:
        """Both work again."""
        self._primary.down = self._fallback.down = False

    def bill_nano(self) -> int | None:
        """Unknown here: see the provider's dashboard."""
        return None

    def requests(self) -> int | None:
        """Not counted."""
        return None

    def close(self) -> None:
        """Nothing to end."""

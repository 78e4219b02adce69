"""The model settings under which a predictor was published: shown by MLflow, and part of what makes a version."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import dspy

from dspy_prod.privacy.names import public
from dspy_prod.registry.published.states import is_json, lm_state

_SHOWN: Final = ("temperature", "max_tokens", "top_p", "top_k", "frequency_penalty", "presence_penalty")
_POSITIVE: Final = ("max_tokens", "top_k")


@dataclass(frozen=True)
class LMSettings:
    """Which model a predictor runs on, how it is called, and through which adapter. Holds no secret.

    Attributes:
        model: the model's name, None when no LM is configured.
        config: LM state, the predictor's own arguments, and adapter settings, as JSON values.
    """

    model: str | None
    config: Mapping[str, Any]

    @classmethod
    def of(cls, predictor: Any, adapter: Any) -> LMSettings:
        """The settings in force here."""
        lm = predictor.lm or dspy.settings.lm
        plain = {key: value for key, value in public(vars(adapter)).items() if is_json(value) and key != "callbacks"}
        config: dict[str, Any] = {"adapter": {"class": type(adapter).__name__, **plain}}
        own = {key: value for key, value in public(predictor.config).items() if is_json(value)}
        if own:
            config["config"] = own
        if lm is None:
            return cls(None, config)
        config["lm"] = lm_state(lm)
        return cls(str(getattr(lm, "model", type(lm).__name__)), config)

    @property
    def adapter(self) -> str:
        """The adapter's class."""
        return str(self.config["adapter"]["class"])

    def model_config(self) -> dict[str, Any]:
        """As MLflow's `model_config`. Its page shows what it does not know without a name: no adapter here."""
        found: dict[str, Any] = {}
        if self.model is not None:
            provider, _, model = self.model.rpartition("/")
            found.update({"model_name": model, **({"provider": provider} if provider else {})})
        arguments = {**self.config.get("lm", {}), **self.config.get("config", {})}
        for name in _SHOWN:
            value = arguments.get(name)
            if isinstance(value, (int, float)) and not isinstance(value, bool) and value >= (name in _POSITIVE):
                found[name] = value
        return found

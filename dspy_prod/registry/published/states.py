"""A predictor's state as JSON and back, such that the restored predictor sends the same prompts.

The state is DSPy's own (`Predict.dump_state`), without traces and training examples, which are no part of a prompt.
Demos are kept as what they are: a plain dict or a `dspy.Example` with its input keys. A value that is no JSON (a model,
an image, a date) is kept in the form in which DSPy's adapters render it. Beside the state stand the model settings.
"""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import dspy
import pydantic
from dspy.adapters.utils import serialize_for_json
from dspy.clients.base_lm import LM_CLASS_STATE_KEY, BaseLM

from dspy_prod.compat.dspy import input_keys
from dspy_prod.compat.saving import keys_beside, writes_more
from dspy_prod.errors import ConfigError
from dspy_prod.privacy.names import public
from dspy_prod.privacy.states import PREDICTOR, beyond, harmless, harmless_within
from dspy_prod.registry.errors import RegistryError

_OWN: Final = ("traces", "train", "demos", "lm", "typed_demos")
_PER_OBJECT: Final = ("history", "callbacks", "traces", "train", "lm")
_SHOWN: Final = ("temperature", "max_tokens", "top_p", "top_k", "frequency_penalty", "presence_penalty")
_POSITIVE: Final = ("max_tokens", "top_k")
_log = logging.getLogger("dspy_prod")


def to_text(value: Any) -> str:
    """Compact JSON in ASCII. The order of keys is kept, for it shows in prompts."""
    return json.dumps(value, separators=(",", ":"))


def dumped(name: str, predictor: Any, *, typed_demos: bool = False) -> str:
    """The state of a predictor as JSON text; a ConfigError when something in it cannot be written as such.

    With `typed_demos`, values of demos become objects of their field's type again when the state is applied.
    """
    bare = copy.copy(predictor)
    bare.demos, bare.traces, bare.train, bare.lm = [], [], [], None
    state = {key: value for key, value in bare.dump_state().items() if key not in _OWN}
    state["demos"] = [_demo(demo) for demo in predictor.demos]
    state["typed_demos"] = typed_demos
    state["lm"] = None if predictor.lm is None else lm_state(predictor.lm)
    try:
        return to_text(state)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"the state of predictor {name!r} cannot be published as JSON: {error}. Keep in demos and signature only "
            "texts, numbers, lists, dicts, pydantic models and dspy types"
        ) from None


def prepared(predictor: Any, text: str, allow_unsafe: bool = False, whose: str = "the state") -> dict[str, Any]:
    """The attributes that give a predictor the state of a text; the predictor itself is left as it is.

    Without `allow_unsafe`, LMs in what a class of somebody's own has written are rebuilt as `restored_lm` does.

    Args:
        predictor: the predictor.
        text: what `dumped` gave, or what somebody made of it.
        allow_unsafe: as in `restored_lm`.
        whose: of which predictor and version, for messages.

    Raises:
        RegistryError: such an LM has an address for its model.
    """

    def refused(where: str, lm: Mapping[str, Any], left_out: list[str]) -> None:
        if "model" in left_out:
            raise RegistryError(
                f"{whose} has an address for the model of the LM in {where}, to which prompts and a key would go: say "
                "it in the code, or load(..., allow_unsafe_lm_state=True) if you trust whoever may write to the "
                "registry"
            )
        _left_out(where, lm, left_out)

    state = json.loads(text)
    typed, demos = state.pop("typed_demos"), state.pop("demos")
    if not allow_unsafe:
        state = {
            key: value if key in PREDICTOR else harmless_within(value, LM_CLASS_STATE_KEY, refused, key)
            for key, value in state.items()
        }
    clone = copy.copy(predictor)
    clone.load_state({**state, "lm": None, "demos": []})
    if not isinstance(clone.signature.instructions, str):
        raise TypeError("its instructions are no text")
    clone.demos = [_restored(demo, clone.signature if typed else None) for demo in demos]
    return {key: value for key, value in clone.__dict__.items() if key not in _PER_OBJECT}


def check_keys(whose: str, predictor: Any, text: str, allow_unsafe: bool) -> None:
    """Refuse what DSPy would set as an attribute, or send with each call, because a state says so.

    Args:
        whose: of which predictor and version, for messages.
        predictor: the predictor.
        text: what `dumped` gave, or what somebody made of it.
        allow_unsafe: as in `restored_lm`: whether the arguments that go with each call (`config`) may be any, and a
            class that writes more than DSPy's may have written any key that no predictor has for something else.

    Raises:
        RegistryError: the state has keys that the predictor's class does not write, or such arguments that may lead
            elsewhere.
    """
    state = json.loads(text)
    strangers, arguments = beyond(state, {"typed_demos", *keys_beside(predictor, state, trusted=allow_unsafe)})
    if strangers:
        trusting = writes_more(predictor) and not allow_unsafe
        raise RegistryError(
            f"{whose} has {', '.join(strangers)} in its state, which {type(predictor).__name__} does not write: "
            "publish the program again"
            + (", or load(..., allow_unsafe_lm_state=True) if you trust whoever may write to the registry" * trusting)
        )
    if arguments and not allow_unsafe:
        raise RegistryError(
            f"{whose} would call with {', '.join(arguments)}, by which its calls could go elsewhere: say it in the "
            "code, or load(..., allow_unsafe_lm_state=True) if you trust whoever may write to the registry"
        )


def own_lm(text: str) -> dict[str, Any] | None:
    """The state of the LM that a predictor had of its own, from the predictor's state."""
    state: dict[str, Any] | None = json.loads(text)["lm"]
    return state


def lm_state(lm: Any) -> dict[str, Any]:
    """What rebuilds an LM, without its keys. What cannot be written as JSON is left out."""
    try:
        state = public(lm.dump_state())
    except Exception as error:  # an engine object without a state of its own, or whatever a foreign LM raises
        _log.warning("The settings of %s are published by its model name only: %s", type(lm).__name__, error)
        state = {"model": str(getattr(lm, "model", type(lm).__name__))}
    return {key: value for key, value in state.items() if is_json(value)}


def restored_lm(name: str, state: Mapping[str, Any] | None, allow_unsafe: bool) -> Any:
    """The LM that a predictor had, or None when it had none or may not get it back.

    Args:
        name: the predictor's name, for messages.
        state: what `lm_state` gave.
        allow_unsafe: as `allow_unsafe_lm_state` of `dspy.Module.load`: whether a class that the state names may be
            imported and an address in it be called.
    """
    if not state or LM_CLASS_STATE_KEY not in state:
        return None
    if not allow_unsafe:
        if state[LM_CLASS_STATE_KEY] != "dspy.clients.lm.LM" or "engine" in state:
            _log.warning(
                "Predictor %r was published with an LM of its own (%s), which is not rebuilt: use set_lm, or "
                "load(..., allow_unsafe_lm_state=True) if you trust whoever may write to the registry",
                name, state.get("model"),
            )  # fmt: skip
            return None
        state, left_out = harmless(state, LM_CLASS_STATE_KEY, ours=False)
        if left_out:
            _left_out(name, state, left_out)
        if "model" not in state:
            return None  # an address stood there
    return BaseLM.load_state(dict(state), allow_custom_lm_class=allow_unsafe)


def _left_out(name: str, state: Mapping[str, Any], left_out: list[str]) -> None:
    _log.warning(
        "The LM %s of predictor %r is rebuilt without %s, by which its calls could go elsewhere: use set_lm, "
        "or load(..., allow_unsafe_lm_state=True) if you trust whoever may write to the registry",
        None if "model" in left_out else state.get("model"), name, ", ".join(left_out),
    )  # fmt: skip


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


def _demo(demo: Any) -> dict[str, Any]:
    is_example = isinstance(demo, dspy.Example)
    values = {key: value if is_json(value) else serialize_for_json(value) for key, value in demo.items()}
    inputs = input_keys(demo) if is_example else None
    return {"values": values, "example": is_example, "inputs": None if inputs is None else sorted(inputs)}


def _restored(demo: Mapping[str, Any], signature: Any) -> Any:
    values = dict(demo["values"])
    if signature is not None:
        for key, info in signature.fields.items():
            if key in values:
                try:
                    values[key] = pydantic.TypeAdapter(info.annotation).validate_python(values[key])
                except Exception:  # an incomplete or older demo: it stays as it is written
                    continue
    if not demo["example"]:
        return values
    example = dspy.Example(**values)
    return example if demo["inputs"] is None else example.with_inputs(*demo["inputs"])


def is_json(value: Any) -> bool:
    """Whether JSON gives the very value back."""
    if value is None or type(value) in (str, bool, int, float):
        return True
    if type(value) is list:
        return all(is_json(item) for item in value)
    return type(value) is dict and all(type(key) is str and is_json(item) for key, item in value.items())

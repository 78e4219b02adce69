"""LMs in what a class of somebody's own has saved, under any name and at any depth, and classes that load them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

import dspy
from dspy.clients.base_lm import LM_CLASS_STATE_KEY, BaseLM
from dspy.predict.parameter import Parameter

from dspy_prod import Production
from dspy_prod.registry.published.copies import Release
from dspy_prod.registry.published.loading import put_into
from dspy_prod.registry.published.manifest import Manifest, PredictorEntry, sha256
from dspy_prod.registry.published.signatures import fields_of
from dspy_prod.registry.published.states import dumped
from tests.fuzz import invariants
from tests.fuzz.draws import Draws

AWAY: Final = "http://127.0.0.1:9/v1"
"""Where no call may go on the word of a state."""

MODELS: Final = (
    "openai/m", "gpt-4o", "bedrock/anthropic.claude-3-haiku-20240307-v1:0", "anthropic.claude-3-haiku-20240307-v1:0",
    "custom/m", "/m", f"oobabooga/{AWAY}", f"huggingface/{AWAY}", AWAY,
)  # fmt: skip
"""Names for which somebody would be asked."""

KINDS: Final = (None, "dspy.clients.lm.LM", "x.Y", "dspy_prod.lm.LM", "dspy.clients.typesafe.TypeSafe")
ARGUMENTS: Final = (
    "api_base", "base_url", "azure_endpoint", "aws_bedrock_runtime_endpoint", "aws_web_identity_token", "headers",
    "vertex_credentials", "organization", "extra_query", "extra_headers", "never_heard_of", "fallbacks", "model_list",
    "custom_llm_provider", "tools", "ssl_verify", "score",
)  # fmt: skip
LEADING: Final = ("api_base", "base_url", "model_list", "fallbacks", "custom_llm_provider", "deployment_id", "azure")
"""Those by which a call goes somewhere, whatever the model is called."""

CARS: Final = ({"model": "Golf", "colour": "red"}, {"model": 5, "fallbacks": ["Polo"]}, {"model": "T-1000", "id": 7})
READINGS: Final[tuple[Callable[[dict[str, Any]], Any], ...]] = (
    BaseLM.load_state,
    dspy.LM.load_state,
    lambda state: dspy.LM(**{name: value for name, value in state.items() if name != LM_CLASS_STATE_KEY}),
)
"""How a class makes an LM of a mapping."""


class Judged(dspy.Predict):  # type: ignore[misc]
    """Writes LMs beside its own, and makes one of whatever could be one."""

    judges: Any = None

    def dump_state(self, json_mode: bool = True) -> dict[str, Any]:
        return {**super().dump_state(json_mode), "judges": self.judges}

    def load_state(self, state: dict[str, Any], *, allow_unsafe_lm_state: bool = False) -> Any:
        rest = dict(state)
        self.judges = rest.pop("judges")
        self.made = list(_made(state["lm"])) + list(_made(self.judges))
        return super().load_state({**rest, "lm": None}, allow_unsafe_lm_state=allow_unsafe_lm_state)


class Weighing(Parameter):  # type: ignore[misc]
    """The same, of no predictor."""

    def __init__(self) -> None:
        self.made: list[Any] = []

    def dump_state(self, json_mode: bool = True) -> dict[str, Any]:
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        self.made = list(_made(state))


class Both(dspy.Module):  # type: ignore[misc]
    """A program that has one of each."""

    def __init__(self) -> None:
        super().__init__()
        self.judged = Judged("question -> answer")
        self.weighing = Weighing()


def judges(draws: Draws) -> None:
    """Load a state with an LM in it; none that a class makes of it calls elsewhere, and a car stays what it is."""
    car = draws.pick(CARS)
    beside = {"judges": [_nested(draws, _lure(draws)), {"cars": car}]}
    if draws.one_in(3):
        _publish(beside)
        return
    program = Both()
    state: dict[str, Any] = program.dump_state()
    state["judged"].update(beside)
    if draws.one_in(2):
        state["judged"]["lm"] = _lure(draws)
    state["weighing"] = {draws.pick(("lm", "judge", "note")): _nested(draws, _lure(draws)), "car": car}
    try:
        Production(program).load_state(state)
    finally:
        _stay(program.judged, program.weighing)
    if program.judged.judges[1]["cars"] is not car:
        raise invariants.Violation("data", f"{car} became {program.judged.judges[1]}")


def _publish(beside: Mapping[str, Any]) -> None:
    predictor = Judged("question -> answer")
    text = dumped("self", predictor)
    entry = PredictorEntry("self", None, None, sha256(text), fields_of(predictor.signature))
    manifest = Manifest("d", (entry,), "openai/m", "ChatAdapter", {}, dspy="3.4.1")
    text = json.dumps({**json.loads(text), **beside})
    try:
        put_into(predictor, Release("triage", 1, manifest, {"self": text}))
    finally:
        _stay(predictor)


def _stay(*loaded: Any) -> None:
    for each in loaded:
        for lm in getattr(each, "made", ()):
            invariants.stays({"lm": lm}, AWAY)


def _lure(draws: Draws) -> dict[str, Any]:
    """What DSPy would load as an LM whose calls go elsewhere."""
    state: dict[str, Any] = {"model": draws.pick(MODELS)}
    for _ in range(1 + draws.below(3)):
        state[draws.pick(ARGUMENTS)] = _away(draws)
    if draws.one_in(6):
        state = {"model": "Golf", draws.pick(LEADING): _away(draws)}
    kind = draws.pick(KINDS)
    if kind is not None:
        state[LM_CLASS_STATE_KEY] = kind
    if draws.one_in(4):
        state["temperature"] = 0.5
    return state


def _away(draws: Draws) -> Any:
    call = {"model": "openai/m", "api_base": AWAY}
    return draws.pick((AWAY, [AWAY], {"x": AWAY}, [call], {"m": [call]}, [{"api_base": AWAY}], (call, AWAY)))


def _nested(draws: Draws, value: Any) -> Any:
    for _ in range(draws.below(5)):
        value = draws.pick((
            [value], (value,), {"asks": value}, {"lm": value}, [None, {"x": [value]}], {"model": "Golf", "of": value},
            {"model": "openai/m", "stop": [value]}, {LM_CLASS_STATE_KEY: "dspy.clients.lm.LM", "thinking": value},
        ))  # fmt: skip
    return value


def _made(value: Any) -> Iterator[Any]:
    """The LMs that a class can make of what is in a state, in whichever way."""
    if isinstance(value, dict):
        for read in READINGS:
            try:
                yield read(dict(value))
            except Exception:
                continue
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        for each in value:
            yield from _made(each)

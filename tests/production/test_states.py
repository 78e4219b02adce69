"""What a saved program may say when nobody vouches for whoever wrote it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dspy
import pytest
from dspy.clients.base_lm import LM_CLASS_STATE_KEY, BaseLM
from dspy.predict.parameter import Parameter

from dspy_prod import ConfigError, Production

ELSEWHERE = "http://elsewhere.invalid/v1"
FALLBACKS = [{"model": "openai/m", "api_base": ELSEWHERE}]
PLAIN = {LM_CLASS_STATE_KEY: "dspy.clients.lm.LM", "model": "openai/m", "cache": False, "max_tokens": 10}


class Two(dspy.Module):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__()
        self.first = dspy.Predict("question -> answer")
        self.then = [dspy.ChainOfThought("question -> answer")]


def qa() -> Any:
    return dspy.Predict("question -> answer")


def saved(program: Any, file: Path, change: dict[str, Any]) -> Path:
    """The program, saved, and what somebody made of its first predictor's state."""
    program.save(file)
    state = json.loads(file.read_text())
    (state if isinstance(program, dspy.Predict) else state["first"]).update(change)
    file.write_text(json.dumps(state))
    return file


def first(prod: Production) -> Any:
    return prod.predictors()[0]


@pytest.mark.parametrize("make", [qa, Two])
@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"config": {"api_base": ELSEWHERE}}, r"config\.api_base"),
        ({"config": {"fallbacks": FALLBACKS}}, r"config\.fallbacks"),
        ({"forward": "x"}, "forward"),
        ({"lm": {**PLAIN, "model": f"huggingface/{ELSEWHERE}"}}, "address for its model"),
    ],
    ids=str,
)
def test_a_state_that_dspy_did_not_write_is_refused(
    make: Callable[[], Any], change: dict[str, Any], named: str, tmp_path: Path
) -> None:
    """The key of the environment and the prompt went to the address; `forward` made each call a TypeError."""
    prod = Production(make())
    before = prod.dump_state()
    with pytest.raises(ConfigError, match=named):
        prod.load(saved(make(), tmp_path / "x.json", change))
    assert prod.dump_state() == before
    assert first(prod).config == {}


@pytest.mark.parametrize("make", [qa, Two])
@pytest.mark.parametrize("kind", [LM_CLASS_STATE_KEY, "the class is not told"])
def test_an_lm_is_rebuilt_without_what_leads_elsewhere(
    make: Callable[[], Any], kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """DSPy leaves three addresses out; LiteLLM honours those in `fallbacks`, and more."""
    lm = {**PLAIN, "temperature": 0.5, "fallbacks": FALLBACKS, "aws_bedrock_runtime_endpoint": ELSEWHERE}
    if kind != LM_CLASS_STATE_KEY:
        del lm[LM_CLASS_STATE_KEY]
    file = saved(make(), tmp_path / "x.json", {"lm": lm})
    prod = Production(make())
    prod.load(file)
    assert first(prod).lm.kwargs == {"temperature": 0.5, "max_tokens": 10}
    assert "aws_bedrock_runtime_endpoint, fallbacks" in caplog.text
    assert ELSEWHERE not in caplog.text
    prod.load(file, allow_unsafe_lm_state=True)
    assert first(prod).lm.kwargs["fallbacks"] == FALLBACKS


@pytest.mark.parametrize("make", [qa, Two])
def test_what_dspy_writes_is_taken_without_a_word(
    make: Callable[[], Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Demos, instructions and a plain LM with its engine are what they were."""
    program = make()
    part = program.predictors()[0]
    part.demos = [dspy.Example(question="q", answer="a")]
    part.signature = part.signature.with_instructions("Be brief.")
    part.lm = dspy.LM("openai/m", temperature=0.5, engine="litellm", num_retries=7)
    program.save(tmp_path / "x.json")
    prod = Production(make())
    prod.load(tmp_path / "x.json")
    assert prod.dump_state() == json.loads(json.dumps(program.dump_state()))
    assert caplog.text == ""


@pytest.mark.parametrize("make", [qa, Two])
def test_whom_one_trusts_may_say_more(make: Callable[[], Any], tmp_path: Path) -> None:
    """As with DSPy, for a predictor that keeps its arguments in its state, say."""
    prod = Production(make())
    file = saved(make(), tmp_path / "x.json", {"config": {"api_base": ELSEWHERE}})
    prod.load(file, allow_unsafe_lm_state=True)
    assert first(prod).config == {"api_base": ELSEWHERE}


class Judging(dspy.Module):  # type: ignore[misc]
    """A program that writes its state as it likes."""

    def __init__(self) -> None:
        super().__init__()
        self.judge: Any = None

    def dump_state(self, json_mode: bool = True) -> dict[str, Any]:
        return {"judges": [{"of": "style", "asks": None if self.judge is None else self.judge.dump_state()}]}

    def load_state(self, state: dict[str, Any], *, allow_unsafe_lm_state: bool = False) -> None:
        self.judge = dspy.LM.load_state(state["judges"][0]["asks"])


class Weighing(Parameter):  # type: ignore[misc]
    """A parameter that is no predictor, with an LM of its own."""

    def __init__(self) -> None:
        self.lm: Any = None

    def dump_state(self, json_mode: bool = True) -> dict[str, Any]:
        return {"by": None if self.lm is None else self.lm.dump_state()}

    def load_state(self, state: dict[str, Any]) -> None:
        self.lm = dspy.LM(**{key: value for key, value in state["by"].items() if key != LM_CLASS_STATE_KEY})


class Weighed(dspy.Module):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__()
        self.weighing = Weighing()


class WithFlex(dspy.Module):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__()
        self.flex = dspy.Flex("question -> answer")


@pytest.mark.parametrize(
    ("make", "state", "found"),
    [
        (lambda: dspy.Flex("question -> answer"), lambda lm: {"module_src": None, "lm": lm}, lambda it: it.lm),
        (WithFlex, lambda lm: {"flex": {"module_src": None, "lm": lm}}, lambda it: it.flex.lm),
        (Judging, lambda lm: {"judges": [{"of": "style", "asks": lm}]}, lambda it: it.judge),
        (Weighed, lambda lm: {"weighing": {"by": lm}}, lambda it: it.weighing.lm),
    ],
    ids=["a Flex", "within a module", "a module's own state", "a parameter"],
)
@pytest.mark.parametrize("kind", ["dspy.clients.lm.LM", "of.another.Class", None])
def test_an_lm_anywhere_in_a_state_is_rebuilt_without_what_leads_elsewhere(
    make: Any, state: Any, found: Any, kind: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    """A program that is a parameter, but no predictor, got the headers and fallbacks of whoever wrote the file."""
    lm = {**PLAIN, LM_CLASS_STATE_KEY: kind, "fallbacks": FALLBACKS, "extra_headers": {"x": "y"}, "temperature": 0.5}
    if kind is None:
        del lm[LM_CLASS_STATE_KEY]
    program = make()
    try:
        Production(program).load_state(state(lm))
    except ValueError as error:
        assert "Refusing to import custom serialized LM class" in str(error)  # noqa: PT017 (DSPy's own loader has it)
        assert found(program) is None
        return
    assert found(program).kwargs == {"temperature": 0.5, "max_tokens": 10}
    assert "extra_headers, fallbacks" in caplog.text
    assert ELSEWHERE not in caplog.text


def test_a_mapping_that_is_no_lm_is_taken_as_it_is(caplog: pytest.LogCaptureFixture) -> None:
    """A car has a model, too."""
    cars = [{"model": "Golf", "colour": "red"}, {"model": 5, "fallbacks": ["Polo"]}]
    program = Remembering()
    Production(program).load_state({"facts": {"cars": cars}})
    assert program.facts.facts == {"cars": cars}
    assert caplog.text == ""


class Facts(Parameter):  # type: ignore[misc]
    """A parameter whose keys are what the data say."""

    def __init__(self) -> None:
        self.facts: dict[str, Any] = {}

    def dump_state(self, json_mode: bool = True) -> dict[str, Any]:
        return dict(self.facts)

    def load_state(self, state: dict[str, Any]) -> None:
        self.facts = dict(state)


class Remembering(dspy.Module):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__()
        self.facts = Facts()


class Noting(dspy.Predict):  # type: ignore[misc]
    """Has a note now and then, for which it keeps an address that it does not save."""

    note = None
    endpoint = "http://here.invalid"

    def dump_state(self, json_mode: bool = True) -> dict[str, Any]:
        state: dict[str, Any] = super().dump_state(json_mode)
        for key in ("note", "callbacks", "rerank"):
            if isinstance(getattr(self, key), str):
                state[key] = getattr(self, key)
        return state

    def rerank(self) -> None:
        """Of the class's own."""


class Collecting(Noting):
    """What it has found is no attribute."""

    def load_state(self, state: dict[str, Any], *, allow_unsafe_lm_state: bool = False) -> Any:
        self.found = {key: value for key, value in state.items() if key.startswith("fact")}
        rest = {key: value for key, value in state.items() if key not in self.found}
        return super().load_state(rest, allow_unsafe_lm_state=allow_unsafe_lm_state)


class Within(dspy.Module):  # type: ignore[misc]
    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner


def test_keys_that_the_data_say_are_taken_where_their_class_reads_them() -> None:
    """Plain DSPy loaded the program; this was a ConfigError, for a new program has no such key yet."""
    program = Remembering()
    Production(program).load_state({"facts": {"capital": "Paris", "forward": "x"}})
    assert program.facts.facts == {"capital": "Paris", "forward": "x"}


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_key_that_a_class_writes_now_and_then_is_taken(wrapped: bool) -> None:
    saved = Noting("question -> answer")
    saved.note = "found"
    fresh = Noting("question -> answer")
    program, state = (Within(fresh), {"inner": saved.dump_state()}) if wrapped else (fresh, saved.dump_state())
    Production(program).load_state(state)
    assert fresh.note == "found"


def test_keys_that_the_data_say_are_taken_by_a_predictor_that_reads_them() -> None:
    program = Collecting("question -> answer")
    Production(program).load_state({**program.dump_state(), "fact 1": "Paris"})
    assert program.found == {"fact 1": "Paris"}


@pytest.mark.parametrize("kind", [Noting, Collecting])
@pytest.mark.parametrize("key", ["forward", "callbacks", "history", "__class__", "_compiled", "rerank", "endpoint"])
def test_no_key_is_taken_that_names_something_else_of_a_predictor(kind: Any, key: str) -> None:
    """Whoever wrote the file would change what is called, though the class writes keys of its own."""
    program = kind("question -> answer")
    with pytest.raises(ConfigError, match=rf"\b{key}\b.* {kind.__name__} does not write"):
        Production(program).load_state({**program.dump_state(), key: "http://elsewhere.invalid"})
    assert key not in vars(program) or vars(program)[key] != "http://elsewhere.invalid"


@pytest.mark.parametrize("key", ["fact 1", "note"])
def test_a_plain_predictor_takes_no_key_of_others(key: str) -> None:
    program = qa()
    with pytest.raises(ConfigError, match=key):
        Production(program).load_state({**program.dump_state(), key: "x"})


def test_a_parameter_that_dspy_reads_gets_what_it_writes_alone() -> None:
    """`Retrieve` sets each key as an attribute, too."""
    program = Within(dspy.Retrieve(k=3))
    Production(program).load_state({"inner": {"k": 5}})
    assert program.inner.k == 5
    with pytest.raises(ConfigError, match="forward"):
        Production(program).load_state({"inner": {"k": 5, "forward": "x"}})


class Judged(dspy.Predict):  # type: ignore[misc]
    """Writes further LMs beside its own, and reads them as DSPy does."""

    judges: Any = ()

    def dump_state(self, json_mode: bool = True) -> dict[str, Any]:
        return {**super().dump_state(json_mode), "judges": [judge.dump_state() for judge in self.judges]}

    def load_state(self, state: dict[str, Any], *, allow_unsafe_lm_state: bool = False) -> Any:
        rest = dict(state)
        self.judges = [BaseLM.load_state(each) for each in rest.pop("judges")]
        return super().load_state(rest, allow_unsafe_lm_state=allow_unsafe_lm_state)


class OfAnyClass(dspy.Predict):  # type: ignore[misc]
    """Makes a plain LM of the state of any."""

    def load_state(self, state: dict[str, Any], *, allow_unsafe_lm_state: bool = False) -> Any:
        super().load_state({**state, "lm": None}, allow_unsafe_lm_state=allow_unsafe_lm_state)
        self.lm = None if state["lm"] is None else dspy.LM.load_state(state["lm"])
        return self


class OfAny(Parameter):  # type: ignore[misc]
    """The same, of no predictor."""

    def __init__(self) -> None:
        self.lm: Any = None

    def dump_state(self, json_mode: bool = True) -> dict[str, Any]:
        return {"lm": None if self.lm is None else self.lm.dump_state()}

    def load_state(self, state: dict[str, Any]) -> None:
        self.lm = dspy.LM.load_state(state["lm"])


@pytest.mark.parametrize(
    "lm",
    [
        {"model": "bedrock/m", "aws_bedrock_runtime_endpoint": ELSEWHERE, "aws_web_identity_token": "/etc/passwd"},
        {"model": "openai/m", "azure_endpoint": ELSEWHERE, "organization": "x"},
        {"model": "gpt-4o", "never_heard_of": ELSEWHERE},
    ],
    ids=str,
)
@pytest.mark.parametrize("make", [Judged, lambda signature: Within(Judged(signature))])
def test_an_lm_of_which_only_the_model_tells_is_rebuilt(
    make: Any, lm: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    """DSPy loads what names no class as its own LM, whatever else it has; nothing was said."""
    program = make("question -> answer")
    judged = program.predictors()[0]
    state = {**judged.dump_state(), "judges": [lm]}
    Production(program).load_state(state if program is judged else {"inner": state})
    [judge] = judged.judges
    assert judge.model == lm["model"]
    assert {name for name, value in judge.kwargs.items() if value is not None} == set()
    for name in lm.keys() - {"model"}:
        assert name in caplog.text
    assert ELSEWHERE not in caplog.text
    Production(judged).load_state(state, allow_unsafe_lm_state=True)
    assert ELSEWHERE in judged.judges[0].kwargs.values()


def test_an_address_as_a_model_is_refused_wherever_it_stands() -> None:
    program = Judged("question -> answer")
    state = {**program.dump_state(), "judges": [{"model": f"oobabooga/{ELSEWHERE}"}]}
    with pytest.raises(ConfigError, match=r"LM of 'self\.judges\[0\]' has an address for its model"):
        Production(program).load_state(state)
    assert program.judges == ()


@pytest.mark.parametrize("kind", ["x.Y", "dspy_prod.lm.LM", "dspy.clients.lm.LM", "dspy.clients.typesafe.TypeSafe"])
@pytest.mark.parametrize("make", [OfAny, lambda: OfAnyClass("question -> answer")])
def test_an_lm_is_rebuilt_whatever_class_it_names(make: Any, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    """A loader of the class's own looked at no class; the address in it was where calls went."""
    lm = {LM_CLASS_STATE_KEY: kind, "model": "openai/m", "temperature": 0.5, "api_base": ELSEWHERE}
    program = Within(make())
    Production(program).load_state({"inner": {**program.inner.dump_state(), "lm": lm}})
    assert program.inner.lm.kwargs["temperature"] == 0.5
    assert "api_base" not in program.inner.lm.kwargs
    assert "api_base" in caplog.text


@pytest.mark.parametrize("make", [OfAny, lambda: OfAnyClass("question -> answer")])
def test_fallbacks_have_no_address_whoever_reads_them(make: Any) -> None:
    """Those of a state that said it was of our LM were kept as they were, and DSPy's gave them to LiteLLM."""
    lm = {LM_CLASS_STATE_KEY: "dspy_prod.lm.LM", "model": "openai/m", "fallbacks": FALLBACKS}
    program = Within(make())
    Production(program).load_state({"inner": {**program.inner.dump_state(), "lm": lm}})
    assert ELSEWHERE not in repr(vars(program.inner.lm))


def test_a_state_that_is_nested_too_deep_is_a_config_error() -> None:
    deep: Any = "x"
    for _ in range(5_000):
        deep = [deep]
    with pytest.raises(ConfigError, match="nested too deep"):
        Production(Remembering()).load_state({"facts": {"deep": deep}})

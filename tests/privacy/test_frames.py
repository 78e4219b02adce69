"""Error reporters show the `repr` of every local of every frame: none of ours shows a key."""

from __future__ import annotations

import asyncio
import json
import pickle
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import dspy
import pytest
from dspy.lm15 import Message, Request

import dspy_prod
from dspy_prod import registry, tracking
from dspy_prod.privacy.unshown import Unshown, unshown

KEY, HEADER = "a-key-that-looks-like-nothing", "a-header-that-looks-like-nothing"
PASSWORD, VARIABLE = "a-password-that-is-plain", "a-variable-that-holds-a-key"
OURS = str(Path(dspy_prod.__file__).parent)
MODEL, BASE = "openai/gpt-4o-mini", f"http://user:{PASSWORD}@127.0.0.1:9/v1"
OWN: dict[str, Any] = {"api_key": KEY, "extra_headers": {"x-api-key": HEADER}}
NATIVE: dict[str, Any] = {"api_key": KEY}
"""What the native engine takes."""


def frames(error: BaseException | None, seen: set[int]) -> Iterator[tuple[str, Any]]:
    """Our frames of an error, its causes and what they came from."""
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        for frame, _ in traceback.walk_tb(error.__traceback__):
            if frame.f_code.co_filename.startswith(OURS):
                yield f"{Path(frame.f_code.co_filename).relative_to(OURS)}:{frame.f_code.co_name}", frame
        yield from frames(error.__cause__, seen)
        error = error.__context__


def reported(value: Any, depth: int = 5) -> str:
    """As Sentry reports a local: item by item, and what is in neither a mapping nor a sequence by its `repr`.

    Others (rich, cgitb) show less: rich asks a container that has a `repr` of its own for it.
    """
    if depth and isinstance(value, Mapping):
        return " ".join(f"{name} {reported(item, depth - 1)}" for name, item in dict(value).items())
    if depth and isinstance(value, (Set, Sequence)) and not isinstance(value, (str, bytes, bytearray)):
        return " ".join(reported(item, depth - 1) for item in value)
    return repr(value)


def shown(error: BaseException) -> list[str]:
    """Where a reporter would show one of the secrets."""
    return [
        f"{place} {name}"
        for place, frame in frames(error, set())
        for name, value in frame.f_locals.items()
        if any(secret in repr(value) + reported(value) for secret in (KEY, HEADER, PASSWORD, VARIABLE))
    ]


def check(asked: Callable[[], Any]) -> None:
    with pytest.raises(Exception) as caught:
        asked()
    assert list(frames(caught.value, set())), caught.value
    assert shown(caught.value) == []


@pytest.fixture(autouse=True)
def variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", VARIABLE)


# -- calls -----------------------------------------------------------------------------------------------------------
async def streamed(lm: dspy_prod.LM) -> None:
    ask = dspy.streamify(dspy.Predict("q -> a"), stream_listeners=[dspy.streaming.StreamListener("a")])
    with dspy.context(lm=lm):
        async for _ in ask(q="q"):
            pass


CALLS: dict[str, Callable[[dspy_prod.LM, dict[str, Any]], Any]] = {
    "sync": lambda lm, more: lm("q", **more),
    "async": lambda lm, more: asyncio.run(lm.acall("q", **more)),
    "several": lambda lm, more: lm("q", n=3, **more),
    "forward": lambda lm, more: lm.forward("q", **more),
    "aforward": lambda lm, more: asyncio.run(lm.aforward("q", **more)),
    "predict": lambda lm, more: dspy.Predict("q -> a")(q="q", lm=lm, config=more),
    "refused": lambda lm, more: lm("q", temperature="hot", **more),
    "slip": lambda lm, more: lm("q", max_tokns=3, **more),
    "policy": lambda lm, more: lm("q", budget=3, **more),
    "policy, async": lambda lm, more: asyncio.run(lm.acall("q", budget=3, **more)),
    "timeout": lambda lm, more: lm("q", timeout="x", **more),
    "preview": lambda lm, more: lm.preview("q", budget=3, **more),
}
OTHERS: dict[str, Callable[[dspy_prod.LM, dict[str, Any]], Any]] = {
    "typed": lambda lm, more: lm(Request(model=MODEL, messages=[Message.user("q")])),
    "typed, async": lambda lm, more: asyncio.run(lm.acall(Request(model=MODEL, messages=[Message.user("q")]))),
    "stream": lambda lm, more: asyncio.run(streamed(lm)),
}
"""Which take no settings of their own."""

ENGINES = [("lm15", "chat"), ("lm15", "responses"), ("litellm", "chat"), ("litellm", "responses"), ("litellm", "text")]


def lm_of(engine: str, model_type: Any = "chat", **arguments: Any) -> dspy_prod.LM:
    given = {"api_base": BASE, "store": "memory://", "cache": False, "num_retries": 0, "breaker": False, **arguments}
    return dspy_prod.LM(MODEL, model_type, engine=engine, **given)


@pytest.mark.parametrize("call", [*CALLS, *OTHERS])
@pytest.mark.parametrize(("engine", "model_type"), ENGINES)
def test_no_local_of_ours_shows_the_key_of_an_lm(engine: str, model_type: str, call: str) -> None:
    """A reporter printed the key with each error: it stood in mappings that travel through our frames."""
    own = NATIVE if engine == "lm15" else OWN
    refused = call == "refused" and engine == "litellm"
    check(lambda: {**CALLS, **OTHERS}[call](lm_of(engine, model_type, **own), {"timeout": 1.5} if refused else {}))


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("engine", ["lm15", "litellm"])
def test_no_local_of_ours_shows_the_key_of_a_call(engine: str, call: str) -> None:
    """The same for settings that are given with one call."""
    more = {"api_base": BASE, **(NATIVE if engine == "lm15" else OWN)}
    if call == "timeout":
        more["headers"] = {"x-api-key": HEADER}
    check(lambda: CALLS[call](lm_of(engine, api_key="none"), more))


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_no_local_of_ours_shows_the_key_of_a_fallback(asynchronous: bool) -> None:
    """Fallbacks have keys of their own."""
    lms = [dspy.LM("openai/m", api_base=BASE, **OWN), lm_of("lm15", **NATIVE), "openai/gpt-4o"]
    lm = lm_of("litellm", fallbacks=lms, **OWN)
    check(lambda: asyncio.run(lm.acall("q")) if asynchronous else lm("q"))


def test_no_local_of_ours_shows_a_key_that_was_changed() -> None:
    """`lm.kwargs` is read anew when it was changed."""
    lm = lm_of("litellm", **OWN)
    lm.kwargs.update(api_key=KEY, timeout="x")
    check(lambda: lm("q"))


# -- construction ----------------------------------------------------------------------------------------------------
WRONG: dict[str, dict[str, Any]] = {
    "timeout": {"timeout": "x"},
    "retry": {"retry": "x"},
    "slip": {"max_tokns": 2},
    "engine": {"engine": object()},
    "budget": {"budget": {"per": "day"}},
    "fallbacks": {"fallbacks": [3]},
    "prices": {"prices": 3},
    "namespace": {"namespace": 3},
    "address": {"base_url": BASE, "timeout": "x"},
    "cloud": {"aws_secret_access_key": KEY, "vertex_credentials": {"private_key": KEY}, "timeout": "x"},
    "redis": {"store": f"redis://user:{PASSWORD}@host/0"},
    "scheme": {"store": f"sqlitx://user:{PASSWORD}@host/0"},
    "option": {"store": f"sqlite:///state.db?password={PASSWORD}"},
    "no file": {"store": f"sqlite://user:{PASSWORD}@host"},
    "memory": {"store": f"memory://user:{PASSWORD}@host"},
}


def copied(arguments: dict[str, Any]) -> Any:
    return lm_of("litellm", api_key=KEY).copy(**arguments)


WAYS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "LM": lambda given: dspy_prod.LM(MODEL, **{"store": "memory://", **OWN, **given}),
    "copy": lambda given: copied({**OWN, **given}),
    "wrap": lambda given: dspy_prod.wrap(dspy.LM(MODEL, **OWN), **given),
    "wrap ours": lambda given: dspy_prod.wrap(lm_of("litellm", **OWN), **given),
    "from_config": lambda given: dspy_prod.LM.from_config(**{"model": MODEL, **OWN, **given}),
    "load_state": lambda given: dspy_prod.LM.load_state({"model": MODEL, **OWN, **given}, allow_custom_lm_class=True),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("way", WAYS)
def test_no_local_of_ours_shows_a_key_when_an_lm_cannot_be_made(way: str, wrong: str) -> None:
    """A misspelt argument beside the key, and the reporter had the key."""
    check(lambda: WAYS[way](dict(WRONG[wrong])))


class Own(dspy.LM):
    """An LM that cannot be wrapped."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError


REFUSED: dict[str, Callable[[], Any]] = {
    "own class": lambda: dspy_prod.wrap(Own(MODEL, **OWN)),
    "own class as fallback": lambda: lm_of("litellm", fallbacks=[Own(MODEL, **OWN)], **OWN),
    "no LM": lambda: dspy_prod.wrap(3, **OWN),  # type: ignore[arg-type]
    "not JSON": lambda: lm_of("litellm", extra_body={"x": object()}, **OWN).dump_state(),
    "budget": lambda: lm_of("litellm", **OWN).set_budget("x"),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("case", REFUSED)
def test_no_local_of_ours_shows_a_key_when_something_is_refused(case: str) -> None:
    """Saving, wrapping and changing an LM pass its settings on too."""
    check(REFUSED[case])


# -- files and variables ---------------------------------------------------------------------------------------------
FILES = {
    "key": (f'model="m"\napi_key="{KEY}"', {}),
    "header": (f'model="m"\n[headers]\nauthorization="{HEADER}"', {}),
    "URL": (f'model="m"\nstore="redis://user:{PASSWORD}@host"', {}),
    "no TOML": (f'model="m"\nstore="redis://user:{PASSWORD}@host', {}),
    "slip": ('modl="m"', {"API_KEY": KEY}),
    "no table": ('model="m"', {"HEADERS": HEADER}),
    "later": ('model="m"', {"API_KEY": KEY, "HEADERS": json.dumps({"x": HEADER}), "TIMEOUT": "x"}),
    "store": ('model="m"', {"STORE": f"redis://user:{PASSWORD}@host"}),
    "named": ('model="m"\napi_key_env="MINE"\ntimeout=-1', {}),
    "not set": ('model="m"\napi_key_env="NONE"', {}),
}


@pytest.mark.parametrize("case", FILES)
def test_no_local_of_ours_shows_what_a_configuration_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    """A mistake in the file, and the reporter had the whole environment: `env` was a local."""
    text, variables = FILES[case]
    (tmp_path / "prod.toml").write_text(text)
    monkeypatch.setenv("MINE", KEY)
    for name, value in variables.items():
        monkeypatch.setenv(f"DSPY_PROD__{name}", value)
    check(lambda: dspy_prod.LM.from_config(tmp_path / "prod.toml"))
    check(lambda: dspy_prod.from_config(tmp_path / "prod.toml"))


def test_no_local_of_ours_shows_the_store_that_the_environment_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """The default store's URL may hold a password too."""
    monkeypatch.setenv("DSPY_PROD_STORE", f"redis://user:{PASSWORD}@127.0.0.1:1/0")
    check(lambda: dspy_prod.LM(MODEL, budget=dspy_prod.Budget(usd=1, per="day")))


# -- MLflow ----------------------------------------------------------------------------------------------------------
SERVER = f"http://user:{PASSWORD}@127.0.0.1:9"
MLFLOW: dict[str, Callable[[str | None], Any]] = {
    "tracking": lambda uri: tracking.enable(tracking_uri=uri, sample=3),
    "patterns": lambda uri: tracking.enable(tracking_uri=uri, redact={"x": "("}),
    "load": lambda uri: registry.load(dspy.Predict("q -> a"), "x@production", tracking_uri=uri),
    "publish": lambda uri: registry.publish(dspy.Predict("q -> a"), "x", tracking_uri=uri),
    "diff": lambda uri: registry.diff("x", 1, 2, tracking_uri=uri),
    "history": lambda uri: registry.history("x", tracking_uri=uri),
    "versions": lambda uri: registry.versions("x", tracking_uri=uri),
    "programs": lambda uri: registry.programs(tracking_uri=uri),
    "promote": lambda uri: registry.promote("x@1", "production", tracking_uri=uri),
    "rollback": lambda uri: registry.rollback("x", tracking_uri=uri),
    "deploy": lambda uri: registry.deploy("x", 1, evaluate=len, report_dir=None, tracking_uri=uri),
}


@pytest.mark.parametrize("call", MLFLOW)
@pytest.mark.parametrize("given", [True, False], ids=["given", "MLflow's own"])
def test_no_local_of_ours_shows_the_password_of_mlflow(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, call: str, given: bool
) -> None:
    """The tracking URI travels through every frame of the registry."""
    import mlflow

    monkeypatch.setenv("MLFLOW_TRACKING_URI", SERVER)
    monkeypatch.setattr(mlflow, "get_registry_uri", lambda: SERVER)
    check(lambda: MLFLOW[call](SERVER if given else None))


@pytest.mark.parametrize("place", [f"ftp://user:{PASSWORD}@host", f"file:///x?password={PASSWORD}"])
def test_no_local_of_ours_shows_the_password_of_an_impossible_uri(place: str) -> None:
    """Nor does the refusal itself."""
    check(lambda: tracking.enable(tracking_uri=place))
    if place.startswith("file"):
        check(lambda: registry.programs(tracking_uri=place))


# -- the text itself -------------------------------------------------------------------------------------------------
def test_a_secret_is_a_text_like_any_other() -> None:
    """Whoever sends it sends the key; whoever prints its `repr`, or a piece of it, prints a mark."""
    secret = Unshown(KEY)
    assert secret == KEY
    assert f"Bearer {secret}" == f"Bearer {KEY}"
    assert json.dumps({"key": secret}) == json.dumps({"key": KEY})
    assert pickle.loads(pickle.dumps(secret)) == KEY
    assert KEY[:8] not in repr(secret[:8])


def test_two_secrets_have_two_marks() -> None:
    """Where settings are told apart by their `repr`, two keys are two; one key is one."""
    assert repr(Unshown("one key")) != repr(Unshown("other key"))
    assert repr(Unshown("one key")) == repr(Unshown("one key"))


def test_what_holds_no_secret_is_the_same_object() -> None:
    """Arguments are compared and kept alive by what they are."""
    table = {"max_tokens": 3, "tags": ["a", {"b": "c"}]}
    assert unshown(table) is table
    assert unshown({"metadata": {"api_key": KEY}, "x": 1}) == {"metadata": {"api_key": KEY}, "x": 1}

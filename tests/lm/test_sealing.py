"""A secret given to an LM is sent to its provider and goes nowhere else."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import pickle
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import cloudpickle  # type: ignore[import-untyped]
import dspy
import pytest

import dspy_prod
from dspy_prod import Budget, RateLimit
from dspy_prod.lm import sealing
from dspy_prod.testing import Provider, Status

MODEL = "openai/gpt-4o-mini"
SECRETS = {
    "api_key": "sk-live-KEY",
    "extra_headers": {"X-Gateway": "sk-live-HEADER"},
}
HIDDEN = ("sk-live", "hunter2")


def hides(text: str | bytes) -> bool:
    """Whether no part of a secret is in it."""
    data = text if isinstance(text, bytes) else text.encode()
    return not any(part.encode() in data for part in HIDDEN)


@pytest.fixture
def provider() -> Iterator[Provider]:
    with Provider() as running:
        yield running


@pytest.fixture
def lm(provider: Provider, tmp_path: Path) -> Iterator[dspy_prod.LM]:
    """An LM with a secret in every place that takes one."""
    made = dspy_prod.LM(
        MODEL,
        api_key="sk-live-KEY",
        api_base=provider.url,
        fallbacks=[
            dspy.LM("openai/gpt-4.1-nano", api_key="sk-live-FALLBACK", api_base=provider.url),
            "openai/gpt-4.1-mini",
        ],
        budget=Budget(usd=5),
        limit=RateLimit(rpm=6000, burst=100),
        store=f"sqlite:///{tmp_path}/state.db",
        namespace="secrets",
        max_tokens=20,
    )
    yield made
    made.close()


@pytest.fixture
def loaded_with_secrets() -> dspy_prod.LM:
    """An LM that never calls, with the secrets that only LiteLLM and gateways take."""
    return dspy_prod.LM(
        "bedrock/anthropic.claude", store="memory://secrets", aws_secret_access_key="sk-live-AWS",
        aws_region_name="eu-1", extra_body={"auth": {"token": "sk-live-NESTED"}, "keep": 1},
        extra_headers={"Authorization": "sk-live-HEADER"},
        api_base="https://me:hunter2@gateway.example/v1", api_key=lambda: "sk-live-CALLABLE",
    )  # fmt: skip


VIEWS: dict[str, Callable[[dspy_prod.LM], Any]] = {
    "repr": repr,
    "str": str,
    "settings": lambda lm: repr(lm.settings),
    "pipeline": lambda lm: repr((lm.pipeline, lm.pipeline.routes, lm.pipeline.store, lm.pipeline.budgets)),
    "upstream": lambda lm: repr(lm.pipeline.primary.upstream),
    "engine": lambda lm: repr((lm._engine_spec, lm._async_engine_spec)),
    "limit key": lambda lm: lm.pipeline.primary.limit_key,
    "health": lambda lm: lm.health().model_dump_json() + repr(lm.health()),
    "health of all": lambda lm: dspy_prod.health().model_dump_json(),
    "costs": lambda lm: repr((lm.costs(), lm.costs(by="model"))),
    "preview": lambda lm: repr(lm.preview("q")),
    "ledger": lambda lm: repr((lm.ledger, lm.ledger.records(), [r.to_dict() for r in lm.ledger.records()])),
    "history": lambda lm: repr(lm.history),
    "state": lambda lm: json.dumps(lm.dump_state()),
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("which", ["lm", "loaded_with_secrets"])
def test_no_view_of_an_lm_shows_a_secret(view: str, which: str, request: pytest.FixtureRequest) -> None:
    """Neither reprs nor reports nor records nor saved states."""
    lm = request.getfixturevalue(which)
    if which == "lm":
        lm("question")
    assert hides(VIEWS[view](lm))


@pytest.mark.parametrize("dumps", [pickle.dumps, cloudpickle.dumps], ids=["pickle", "cloudpickle"])
@pytest.mark.parametrize("which", ["lm", "loaded_with_secrets"])
def test_no_pickle_holds_a_secret(dumps: Any, which: str, request: pytest.FixtureRequest) -> None:
    """Fallback LMs, headers, callables, cloud credentials and nested fields included."""
    lm = request.getfixturevalue(which)
    assert hides(dumps([lm, lm.copy(temperature=0.5), lm.__getstate__()]))
    if dumps is cloudpickle.dumps:  # plain pickle cannot write DSPy's signatures
        program = dspy.Predict("question -> answer")
        program.lm = lm
        assert hides(dumps(program))


def test_the_same_process_finds_the_secrets_of_a_pickle_again(lm: dspy_prod.LM, provider: Provider) -> None:
    """Keys of the LM and of its fallbacks; after the original is gone, too."""
    data = pickle.dumps(lm)
    twin = pickle.loads(data)
    assert twin.settings.clients == lm.settings.clients
    twin("question")
    assert provider.calls[-1].headers["authorization"] == "Bearer sk-live-KEY"
    del twin
    stranger = lm.copy(limit=None)
    data = pickle.dumps(stranger)
    del stranger
    alone = pickle.loads(data)
    assert alone.settings.clients["api_key"] == "sk-live-KEY"
    assert alone.settings.fallbacks[0].kwargs["api_key"] == "sk-live-FALLBACK"
    assert alone.settings.fallbacks[1] == "openai/gpt-4.1-mini"


def test_unsealing_gives_back_every_kind_of_secret(loaded_with_secrets: dspy_prod.LM) -> None:
    """What was taken out for the pickle is put back where it was."""
    settings = loaded_with_secrets.settings
    restored = settings.sealed().unsealed()
    assert (restored.clients, restored.extras) == (settings.clients, settings.extras)


CHILD = """
import pickle, sys
lm = pickle.load(open(sys.argv[1], "rb"))
assert "api_key" not in lm.settings.clients, lm.settings.clients
print(lm("question from the child"), lm.pipeline.store.url, lm.pipeline.budgets[0].options.usd)
lm.close()
"""


def test_another_process_takes_its_key_from_the_environment(
    lm: dspy_prod.LM, provider: Provider, tmp_path: Path
) -> None:
    """The pickle has address, budget and store, and not the key."""
    path = tmp_path / "lm.pkl"
    path.write_bytes(pickle.dumps(lm))
    env = {
        **os.environ,
        "OPENAI_API_KEY": "sk-of-the-child",
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        "PYTHONPATH": os.getcwd(),
    }
    done = subprocess.run([sys.executable, "-c", CHILD, str(path)], env=env, capture_output=True, text=True, timeout=90)
    assert done.returncode == 0, done.stderr
    assert provider.calls[-1].headers["authorization"] == "Bearer sk-of-the-child"
    assert lm.ledger.records()[0].model == MODEL, "the child wrote into the same ledger"


def test_no_file_of_a_saved_program_holds_a_secret(lm: dspy_prod.LM, provider: Provider, tmp_path: Path) -> None:
    """State as JSON and pickle, and the whole program, which then loads and runs with its key."""
    program = dspy.Predict("question -> answer")
    program.lm = lm
    program.save(tmp_path / "state.json")
    program.save(tmp_path / "state.pkl")
    program.save(tmp_path / "whole", save_program=True)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) >= 4
    for path in files:
        assert hides(path.read_bytes()), path
    whole = dspy.load(tmp_path / "whole", allow_pickle=True)
    assert whole(question="q").answer
    assert provider.calls[-1].headers["authorization"] == "Bearer sk-live-KEY"
    assert whole.lm.pipeline.store is lm.pipeline.store


def test_the_store_file_holds_no_secret(lm: dspy_prod.LM, tmp_path: Path) -> None:
    """Ledger, limits, holds and cached answers included."""
    lm("question")
    lm.close()
    for path in tmp_path.iterdir():
        assert hides(path.read_bytes()), path


@pytest.mark.parametrize("status", [400, 401, 404, 429, 500, 503])
def test_no_error_log_or_event_shows_a_secret(
    status: int, lm: dspy_prod.LM, provider: Provider, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever the provider refuses, on all routes."""
    events: list[Any] = []
    provider.down(status)
    remove = dspy_prod.add_listener(events.append)
    try:
        with caplog.at_level(logging.DEBUG), pytest.raises(Exception) as caught:
            lm.copy(retry=False)("question")
        with caplog.at_level(logging.DEBUG):
            lm.health()
            lm.dump_state()
    finally:
        remove()
    assert events
    assert hides(repr(events))
    assert hides(caplog.text)
    error = caught.value
    assert hides("".join(traceback.format_exception(error)))
    assert hides(repr(vars(error)))
    assert hides(repr(error.args))


@pytest.mark.parametrize(
    "wrong",
    [
        {"timeout": -1},
        {"engine": object()},
        {"budget": Budget(usd=1, name="x"), "retry": "often"},
        {"store": "redis://:hunter2@127.0.0.1:1/0"},
        {"store": "postgres://me:hunter2@db.example/0"},
        {"fallbacks": [3]},
    ],
)
def test_no_construction_error_shows_a_secret(wrong: Any) -> None:
    """A mistake in one argument does not show the others, or a password in itself."""
    arguments = {"store": "memory://secrets", **SECRETS, **wrong}
    with pytest.raises((ValueError, TypeError, dspy_prod.StoreUnavailableError)) as caught:
        dspy_prod.LM(MODEL, **arguments)
    assert hides("".join(traceback.format_exception(caught.value)))


def test_the_provider_cannot_echo_a_key_into_the_ledger(lm: dspy_prod.LM, provider: Provider) -> None:
    """Records keep the class of an error, never its text, which a provider chooses."""
    provider.faults = Status(401, "Incorrect API key provided: sk-live-KEY")
    with contextlib.suppress(Exception):
        lm.copy(retry=False, fallbacks=())("question")
    records = lm.ledger.records()
    assert records
    assert hides(repr(records))
    assert hides(lm.health().model_dump_json())


def test_rotated_tokens_are_forgotten_and_living_lms_are_not() -> None:
    """A token that changes every minute, and a pickle of each copy: memory grew for the life of the process."""
    lm = dspy_prod.LM(MODEL, api_key="sk-live-KEY", store="memory://rotated")
    first = pickle.dumps(lm)
    settings = lm.settings
    for number in range(10_000):
        sealed = replace(settings, clients={"api_key": f"sk-live-{number}"}).sealed()
    assert len(sealing._VAULT.all()) == sealing.MAX_SECRETS
    assert sealed.unsealed().clients == {"api_key": "sk-live-9999"}
    assert pickle.loads(first).settings.clients == {"api_key": "sk-live-KEY"}, "the LM is alive"


def test_what_is_sealed_again_is_kept_longer() -> None:
    """The least recently pickled secrets go first."""
    kept = sealing.seal({"api_key": "sk-live-KEPT"})
    for number in range(sealing.MAX_SECRETS - 1):
        sealing.seal({"api_key": f"sk-live-{number}"})
    sealing.seal({"api_key": "sk-live-KEPT"})
    sealing.seal({"api_key": "sk-live-ONE-MORE"})
    assert sealing.unseal(kept) == {"api_key": "sk-live-KEPT"}

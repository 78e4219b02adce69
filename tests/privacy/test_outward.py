"""One door: whoever repeats a secret of ours, in whatever form, it does not leave the process with any text."""

from __future__ import annotations

import base64
import html
import json
import logging
import re
import traceback
import urllib.parse
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

import dspy_prod
from dspy_prod import cli
from dspy_prod.cli import reports
from dspy_prod.errors import ConfigError
from dspy_prod.lm.checking import Finding
from dspy_prod.privacy.error_text import error_text
from dspy_prod.privacy.outward import outward
from dspy_prod.privacy.redactor import Redactor
from dspy_prod.privacy.unshown import unshown
from dspy_prod.registry.deployment.run import Steps
from dspy_prod.registry.server import Server
from dspy_prod.telemetry.events import BUS
from dspy_prod.testing import Provider, Status
from dspy_prod.tracking.content import Content
from dspy_prod.tracking.delivery import Delivery

SECRET = 'correct horse/battery "staple" & Ümlaut+\\'
"""Looks like no secret, and is written differently in every language."""

FORMS: dict[str, Callable[[str], str]] = {
    "plain": str,
    "in a URL": lambda text: urllib.parse.quote(text, safe=""),
    "in a path": urllib.parse.quote,
    "in a form": urllib.parse.quote_plus,
    "in a URL, in small letters": lambda text: re.sub("%..", lambda hit: hit[0].lower(), urllib.parse.quote(text)),
    "JSON": lambda text: json.dumps(text)[1:-1],
    "JSON, not escaped": lambda text: json.dumps(text, ensure_ascii=False)[1:-1],
    "JSON in JSON": lambda text: json.dumps(json.dumps(text))[3:-3],
    "repr": lambda text: repr(text)[1:-1],
    "repr of bytes": lambda text: repr(text.encode())[2:-1],
    "HTML": html.escape,
    "base64": lambda text: base64.b64encode(text.encode()).decode(),
    "basic authorization": lambda text: base64.b64encode(f"user:{text}".encode()).decode(),
    "base64 in a URL": lambda text: base64.urlsafe_b64encode(f"u:{text}".encode()).decode(),
}
PART = base64.b64encode(SECRET.encode())[4:20].decode()


def shows(said: str, echoed: str) -> bool:
    """Whether a text shows the secret, or half of it."""
    return echoed in said or SECRET[:14] in said or SECRET[-14:] in said or PART in said


@pytest.fixture
def lm() -> dspy_prod.LM:
    return dspy_prod.LM("openai/m", api_key=SECRET, store="memory://outward", cache=False)


# -- what holds a secret ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_secret_is_hidden(lm: dspy_prod.LM, form: str) -> None:
    """A provider echoed the key as it found it: in JSON, in a URL, in the base64 of basic authorization."""
    echoed = FORMS[form](SECRET)
    assert "***" in outward(f"refused: {echoed}, sorry")
    assert not shows(outward(f"refused: {echoed}, sorry"), echoed)


PLAIN = "a-plain-word-for-it"
HELD: dict[str, tuple[dict[str, Any], str]] = {
    "header": ({"extra_headers": {"x-team": PLAIN}}, PLAIN),
    "bearer": ({"headers": {"Authorization": f"Bearer {PLAIN}"}}, PLAIN),
    "basic": ({"headers": {"Authorization": f"Basic {base64.b64encode(f'u:{PLAIN}'.encode()).decode()}"}}, PLAIN),
    "password": ({"api_base": f"https://user:{PLAIN}@host/v1"}, PLAIN),
    "quoted password": ({"api_base": "https://user:plain%20word%2F@host/v1"}, "plain word/"),
    "short password": ({"api_base": "https://u:pw@host/v1"}, "u:pw@host"),
    "query": ({"api_base": f"https://host/v1?api-key={PLAIN}"}, PLAIN),
    "extra query": ({"extra_query": {"api_key": PLAIN}}, PLAIN),
    "body": ({"extra_body": {"nested": {"access_token": PLAIN}}}, PLAIN),
    "AWS": ({"aws_secret_access_key": PLAIN}, PLAIN),
    "AWS session": ({"aws_session_token": PLAIN}, PLAIN),
    "Vertex": ({"vertex_credentials": json.dumps({"private_key": f"-----\n{PLAIN}\n-----"})}, f"-----\n{PLAIN}\n-----"),
    "Vertex table": ({"vertex_credentials": {"private_key": PLAIN}}, PLAIN),
}


@pytest.mark.parametrize("held", HELD)
def test_every_secret_of_an_lm_is_known(held: str) -> None:
    """Keys are not the only secrets that an LM is given."""
    arguments, secret = HELD[held]
    lm = dspy_prod.LM("openai/m", store="memory://outward", cache=False, **arguments)
    assert secret not in outward(f"refused: {secret}, sorry")
    del lm


@pytest.mark.parametrize("name", ["SOME_API_KEY", "SIGNING_KEY", "DB_PASSWORD", "GH_TOKEN", "AWS_SECRET_ACCESS_KEY"])
def test_every_secret_of_the_environment_is_known(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Whoever reads it from there."""
    monkeypatch.setenv(name, PLAIN)
    assert PLAIN not in outward(f"refused: {PLAIN}")


def test_a_placeholder_for_a_key_garbles_no_text() -> None:
    """`api_key="ollama"` is what Ollama's page says to write, and every `ollama/llama3` became `***/llama3`."""
    held = unshown("ollama", "api_key")
    assert outward("the circuit of ollama/llama3 is open") == "the circuit of ollama/llama3 is open"
    del held


# -- where texts leave -----------------------------------------------------------------------------------------------
class Broken:
    """A store that says too much."""

    durable, url, namespace = True, "sqlite:///x.db", "n"

    def __init__(self, said: str) -> None:
        self.said = said
        self.problems = {"failing": said}

    def flush(self, timeout: float) -> bool:
        raise RuntimeError(self.said)


def logged(said: str, kept: list[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    logger = logging.getLogger("dspy_prod")
    logger.warning("something failed: %s", said)
    try:
        raise RuntimeError(said)
    except RuntimeError:
        logger.exception("something failed")
    yield from kept


def emitted(said: str, kept: list[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    events: list[Any] = []
    remove = BUS.add(events.append)
    BUS.emit("registry_stale", 0.0, error=f"it said {said}", reference="x@production")
    remove()
    yield str(events[0].data["error"])


def healthy(said: str, kept: list[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    lm = dspy_prod.LM("openai/m", store="memory://outward-health")
    store: Any = Broken(said)
    from dspy_prod.status.health import _Look, problems_of

    look = _Look()
    look._store(store)
    monkeypatch.setattr("dspy_prod.status.health._Look", lambda: look)
    yield from lm.health().reasons
    yield str(problems_of(store))


def printed(said: str, kept: list[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    def fail(arguments: object) -> int:
        raise ConfigError(said)

    monkeypatch.setattr(reports, "health", fail)
    assert cli.main(["health"]) == 2
    yield from kept
    yield Finding(route="m", what="store", outcome="fails", detail=said).detail


def traced(said: str, kept: list[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    content = Content("redacted", Redactor())
    yield content.error("RuntimeError", said)
    yield str(content.text(said))
    yield str(content.shown([{"role": "user", "content": said}]))
    yield str(content.foreign({"name": said, "attributes": {"a": said, "b": json.dumps(said)}, "events": [said]}))
    yield str(content.foreign_info({"request_preview": said, "tags": {"a": said}, "trace_metadata": {"b": said}}))


def delivered(said: str, kept: list[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    delivery: Any = object.__new__(Delivery)
    delivery.failing, delivery.closing, delivery._changed = None, False, lambda: None
    delivery._heard(failing=said)
    yield delivery.failing
    yield from kept


def registered(said: str, kept: list[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    yield Server("http://host")._said(said)


def deployed(said: str, kept: list[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    steps = Steps(lambda _: None, lambda: None)
    with suppress(RuntimeError), steps.step("gate"):
        raise RuntimeError(said)
    yield str(steps.made)


def told(said: str, kept: list[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    yield error_text(RuntimeError(said))
    yield error_text(RuntimeError(f"{'word ' * 38}{said}"))


PLACES = [logged, emitted, healthy, printed, traced, delivered, registered, deployed, told]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("place", PLACES, ids=lambda place: place.__name__)
def test_no_text_leaves_with_a_secret(
    lm: dspy_prod.LM,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
    place: Callable[..., Iterator[str]],
    form: str,
) -> None:
    """Each place had its own idea of what to hide, and some had none."""
    echoed = FORMS[form](SECRET)
    texts = [*place(f"no such key: {echoed}", [], monkeypatch), caplog.text, *capsys.readouterr()]
    assert "".join(texts).count("***")
    assert [text for text in texts if shows(text, echoed)] == []


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("engine", ["lm15", "litellm"])
def test_no_error_of_a_call_shows_a_secret(tmp_path: Path, engine: str, form: str) -> None:
    """Neither its text, nor its notes, arguments and causes, nor what is written of it."""
    echoed = FORMS[form](SECRET)
    with Provider(faults=Status(401, f"Incorrect key: {echoed}")) as provider:
        lm = dspy_prod.LM(
            "openai/m", engine=engine, api_key="k", api_base=provider.url, cache=False,
            store=f"sqlite:///{tmp_path}/state.db",
        )  # fmt: skip
        held = unshown(SECRET, "api_key")
        with pytest.raises(Exception) as caught:
            lm("hello")
        lm.close()
        lm.pipeline.store.close()
        del held
    said = "".join(traceback.format_exception(caught.value))
    error: BaseException | None = caught.value
    while error is not None:
        said += f"{error} {error!r} {error.args!r} {getattr(error, '__notes__', '')!r}"
        error = error.__cause__ or error.__context__
    assert "***" in said
    assert not shows(said, echoed)
    written = b"".join(path.read_bytes() for path in tmp_path.iterdir()).decode("latin-1")
    assert not shows(written, echoed)


def test_what_cannot_be_looked_at_is_not_told(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A door that breaks stays shut, and fails nobody."""
    monkeypatch.setattr("dspy_prod.privacy.outward.outward", lambda text: 1 / 0)
    logging.getLogger("dspy_prod").warning("it said %s", PLAIN)
    assert PLAIN not in caplog.text
    assert "<redaction failed>" in caplog.text

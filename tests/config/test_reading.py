"""One file configures a whole service, or a message names the place and the remedy and nothing has begun."""

from __future__ import annotations

import json
import logging
import re
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import dspy
import httpx
import pytest

import dspy_prod
from dspy_prod import ConfigError, call_report, tracking
from dspy_prod.testing import Provider

FULL = """
store = "memory://config-full"
namespace = "triage"
timeout = 7

[[budget]]
usd = 5
per = "day"

[retry]
attempts = 1

[lm.small]
model = "openai/small"
limit = { rpm = 500 }

[lm.big]
model = "openai/big"
api_key_env = "TEAM_KEY"
temperature = 0.5
timeout = 20

[production]
name = "triage"
fallback_response = "later"
deadline = 9.5
tags = { team = "support" }

[logging]
level = "ERROR"
format = "json"
logger = "own.logger"
"""


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Path]]:
    """Writes a file and gives its path; keys are in the environment, and what has begun ends."""
    monkeypatch.setenv("TEAM_KEY", "sk-team-1")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-other-1")

    def writer(text: str) -> Path:
        path = tmp_path / "prod.toml"
        path.write_text(text, encoding="utf-8")
        return path

    yield writer
    tracking.disable()


def refused(path: Path | None) -> str:
    """The message with which a configuration is refused."""
    with pytest.raises(ConfigError) as caught:
        dspy_prod.from_config(path)
    assert "sk-" not in str(caught.value)
    return str(caught.value)


# -- what a file says --------------------------------------------------------------------------------------------------
def test_several_lms_share_what_stands_at_the_top(write: Any) -> None:
    """A budget there is one for all; each says for itself where it calls and with which key."""
    config = dspy_prod.from_config(write(FULL))
    small, big = config.lms["small"], config.lms["big"]
    assert config.lm is small
    assert (small.model, big.model) == ("openai/small", "openai/big")
    assert small.settings.limit is not None
    assert big.settings.limit is None
    assert (small.settings.clients["timeout"], big.settings.clients["timeout"]) == (7, 20)
    assert big.settings.clients["api_key"] == "sk-team-1"
    assert "api_key" not in small.settings.clients
    assert small.pipeline.store is big.pipeline.store
    assert small.settings.budgets == big.settings.budgets != ()
    assert {lm.settings.retry.attempts for lm in config.lms.values()} == {1}
    assert "sk-" not in repr(config)
    config.close()


def test_a_file_of_one_lm_stays_what_it_was(write: Any) -> None:
    """The same LM as from `LM.from_config`; it may stand beside others."""
    config = dspy_prod.from_config(write('model = "openai/m"\nmax_tokens = 5\nstore = "memory://config-one"'))
    assert list(config.lms) == ["default"]
    assert config.lm.kwargs["max_tokens"] == 5
    text = 'model = "openai/m"\nmax_tokens = 5\nstore = "memory://config-two"\n[lm.other]\nmodel = "openai/o"'
    config = dspy_prod.from_config(write(text))
    assert list(config.lms) == ["default", "other"]
    assert config.lm.model == "openai/m"
    assert "max_tokens" not in config.lms["other"].kwargs or config.lms["other"].kwargs["max_tokens"] != 5


EMBEDDERS = """
store = "memory://config-embedders"
timeout = 7

[[budget]]
usd = 5
per = "day"

[cache]
ttl = 60

[lm.small]
model = "openai/small"

[embedder.docs]
model = "openai/text-embedding-3-small"
batch_size = 16
dimensions = 8
limit = { rpm = 500 }
api_key_env = "TEAM_KEY"

[embedder.docs.litellm]
encoding_format = "float"

[embedder.bare]
model = "openai/text-embedding-3-small"
cache = false
"""


def test_embedders_stand_beside_lms(write: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With arguments of their own, and what stands at the top: the same budget, not another one of the same size."""
    monkeypatch.setenv("DSPY_PROD__EMBEDDER__BARE__TIMEOUT", "3")
    config = dspy_prod.from_config(write(EMBEDDERS))
    docs, bare = config.embedders["docs"], config.embedders["bare"]
    assert (docs.model, docs.batch_size, docs.caching, bare.caching) == (bare.model, 16, True, False)
    assert docs.settings.extras == {"dimensions": 8, "encoding_format": "float"}
    assert (docs.settings.clients["timeout"], bare.settings.clients["timeout"]) == (7, 3)
    assert docs.settings.clients["api_key"] == "sk-team-1"
    assert "api_key" not in bare.settings.clients
    assert docs.settings.cache.ttl == 60
    assert (docs.settings.limit.rpm, bare.settings.limit) == (500, None)
    assert docs.pipeline.rules == bare.pipeline.rules == config.lm.pipeline.rules != ()
    assert "sk-" not in repr(config)
    config.close()


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ("[embedder]\nmodel = 'openai/e'", ["prod.toml:2", "a table for each embedder, such as [embedder.docs]"]),
        ("[embedder.docs]\nbatch_size = 5", ["prod.toml:2", "[embedder.docs] model: is missing"]),
        ("[embedder.docs]\nmodel = 'openai/e'\nbatch_siz = 5", ["prod.toml:4", "dspy_prod.Embedder", "'batch_size'"]),
        (
            "[embedder.docs]\nmodel = 'openai/e'\nmax_tokens = 5",
            ["prod.toml:4", "is no argument of dspy_prod.Embedder; it is one of an LM"],
        ),
        (
            "[embedder.docs]\nmodel = 'openai/e'\nclock = 'x'",
            ["prod.toml:4", "pass it to dspy_prod.Embedder(..., clock=...)"],
        ),
        (
            "[embedder.docs]\nmodel = 'openai/e'\ninput_type = 'query'",
            ["prod.toml:4", "goes into the table [embedder.docs.litellm]"],
        ),
        (
            "[embedder.docs]\nmodel = 'openai/e'\ntracking = true",
            ["prod.toml:4", "[tracking] is no part of [embedder.docs]"],
        ),
        ("[embedder.docs]\nmodel = 'openai/e'\nbatch_size = true", ["prod.toml:4", "batch_size: takes a whole number"]),
        ("[embedder.docs]\nmodel = 'openai/e'\napi_key = 'sk-1'", ["prod.toml:4", "a key does not belong in a file"]),
        ("[embedder.Docs]\nmodel = 'openai/e'", ["prod.toml:2", "a name has small letters"]),
    ],
)
def test_an_embedder_that_cannot_be_is_refused_with_its_place(write: Any, table: str, words: list[str]) -> None:
    """As of an LM: file, line, key and what to do."""
    message = refused(write(f'model = "openai/m"\n{table}'))
    assert [word for word in words if word not in message] == []


def test_a_program_answers_as_the_file_says(write: Any) -> None:
    """With the fallback, under the name and with the tags that stand there; what is given wins."""
    with Provider() as provider:
        text = FULL.replace('model = "openai/small"', f'model = "openai/small"\napi_base = "{provider.url}"')
        config = dspy_prod.from_config(write(text))
        config.lm.breaker("force_open")
        program = dspy.Predict("question -> answer")
        with dspy.context(lm=config.lm):
            answer = config.production(program)(question="q")
            assert (answer.answer, call_report(answer).reason) == ("later", "circuit_open")
            assert config.production(program, fallback_response="now")(question="q").answer == "now"
        config.lm.breaker("reset")
        assert config.production(program).name == "triage"
        refusals = config.lm.ledger.records()
        assert {(record.program, record.tags) for record in refusals} == {("triage", (("team", "support"),))}
        config.close()


def test_logging_begins_and_ends_with_it(write: Any, caplog: pytest.LogCaptureFixture) -> None:
    """As JSON, by the logger that is named."""
    logger = logging.getLogger("own.logger")
    config = dspy_prod.from_config(write(FULL.replace('"ERROR"', '"WARNING"')))
    config.lm.breaker("force_open")
    assert logger.level == logging.WARNING
    lines = [json.loads(record.getMessage()) for record in caplog.records if record.name == "own.logger"]
    assert [line["event"] for line in lines] == ["breaker_opened"]
    config.close()
    assert logger.level == logging.NOTSET


def test_tracking_begins_and_ends_with_it(write: Any, tmp_path: Path) -> None:
    """Where the table says; `false` leaves it out."""
    text = 'model = "openai/m"\nstore = "memory://config-t"\n[tracking]\nexperiment_name = "007"\n'
    text += f'tracking_uri = "sqlite:///{tmp_path}/mlflow.db"\nsample = 0.5\nexit_timeout = 0.2\n'
    config = dspy_prod.from_config(write(text))
    now = tracking.status()
    assert now is not None
    assert (now.experiment, now.uri) == ("007", f"sqlite:///{tmp_path}/mlflow.db")
    config.close()
    assert tracking.status() is None


# -- the environment ---------------------------------------------------------------------------------------------------
def test_variables_win_over_the_file(write: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Down to one option of one LM, and whole tables off."""
    for name, value in {
        "LM__BIG__MODEL": "openai/bigger",
        "LM__SMALL__LIMIT__RPM": "5",
        "LM__BIG__BUDGET__USD": "2",
        "PRODUCTION__NAME": "2026",
        "PRODUCTION__DEADLINE": "3",
        "LOGGING": "false",
        "NAMESPACE": "other",
    }.items():
        monkeypatch.setenv(f"DSPY_PROD__{name}", value)
    config = dspy_prod.from_config(write(FULL))
    assert config.lms["big"].model == "openai/bigger"
    assert config.lms["small"].settings.limit.rpm == 5  # type: ignore[union-attr]
    assert [budget.usd for budget in config.lms["big"].settings.budgets] == [2]
    assert [budget.usd for budget in config.lms["small"].settings.budgets] == [5]
    assert config.lm.settings.namespace == "other"
    assert config.production(dspy.Predict("question -> answer")).name == "2026"
    assert logging.getLogger("own.logger").level == logging.NOTSET


def test_a_service_can_be_configured_by_variables_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several LMs too."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-1")
    monkeypatch.setenv("DSPY_PROD__STORE", "memory://config-env")
    monkeypatch.setenv("DSPY_PROD__LM__A__MODEL", "openai/a")
    monkeypatch.setenv("DSPY_PROD__LM__B__MODEL", "openai/b")
    config = dspy_prod.from_config()
    assert {name: lm.model for name, lm in config.lms.items()} == {"a": "openai/a", "b": "openai/b"}


def test_a_file_turns_metrics_and_alerts_on_until_it_is_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The page can be scraped; the webhook's URL comes from a variable, and is shown nowhere."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-1")
    monkeypatch.setenv("HOOK", "http://127.0.0.1:9/secret-path")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    file = tmp_path / "prod.toml"
    file.write_text(M + f"[metrics]\nport = {port}\n[alerts]\nurl_env = 'HOOK'\nformat = 'json'\n")
    config = dspy_prod.from_config(file)
    try:
        assert httpx.get(f"http://127.0.0.1:{port}/metrics").status_code == 200
        assert "secret-path" not in repr(config)
    finally:
        config.close()
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"http://127.0.0.1:{port}/metrics")


# -- what is refused ---------------------------------------------------------------------------------------------------
M = 'model = "openai/m"\nstore = "memory://config-x"\n'


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('store = "memory://x"', ["prod.toml", "model", "is missing"]),
        (M + "[metrics]\nprot = 1", ["prod.toml:4", "[metrics]", "did you mean 'port'?"]),
        (M + "[metrics]\nport = 70000", ["prod.toml:4", "[metrics] port", "65535"]),
        (M + "[metrics]\nattributes = ['zzz']", ["prod.toml", "[metrics]", "attributes", "zzz"]),
        (M + "[alerts]\nevery = 5", ["prod.toml:3", "[alerts] url_env", "is missing"]),
        (M + "[alerts]\nurl_env = 'NOT_SET'", ["prod.toml:4", "[alerts] url_env", "$NOT_SET is not set"]),
        (M + "[productoin]\nname = 'x'", ["prod.toml:3", "productoin"]),
        (M + "[production]\nname = 5", ["prod.toml:4", "[production] name", "takes text, got 5"]),
        (M + "[production]\nfallback = 'x'", ["prod.toml:4", "did you mean 'fallback_response'?"]),
        (M + "[production]\nzzz = 'x'", ["prod.toml:4", "it has name, fallback_response"]),
        (M + "[production]\ndeadline = true", ["prod.toml:4", "takes a number, got True"]),
        (M + "production = 'x'", ["prod.toml:3", "takes a table [production]"]),
        (M + "[tracking]\nqueue_size = 1.5", ["prod.toml:4", "takes a whole number"]),
        (M + "[tracking]\nsample = 2", ["prod.toml:4", "[tracking] sample", "a share from 0 to 1"]),
        (M + "[tracking]\ntracking_uri = 'http://u:sk-1@h'", ["prod.toml:4", "$DSPY_PROD__TRACKING__TRACKING_URI"]),
        (M + "[logging]\nlevel = 'LOUD'", ["prod.toml:4", "[logging] level", "'INFO'"]),
        (M + "[logging]\nformat = 'xml'", ["prod.toml:4", "[logging] format", "'json'"]),
        ("[lm.a]\nmax_tokens = 5", ["prod.toml:1", "[lm.a] model", "is missing"]),
        ("[lm.a]\nmodel = 'openai/a'\nlimt = 5", ["prod.toml:3", "limt", "'limit'"]),
        ("[lm.a]\nmodel = 'openai/a'\n[lm.a.limit]\nrpm = 'x'", ["prod.toml:4", "[limit] rpm"]),
        ("[lm.a]\nmodel = 'openai/a'\napi_key = 'sk-1'", ["prod.toml:3", "api_key", "api_key_env"]),
        ("[lm.a]\nmodel = 'openai/a'\napi_key_env = 'NOBODYS'", ["prod.toml:3", "$NOBODYS is not set"]),
        ("[limit]\nrpm = 'x'\n[lm.a]\nmodel = 'openai/a'", ["prod.toml:2", "[limit] rpm"]),
        ("temperature = 0.5\n[lm.a]\nmodel = 'openai/a'", ["prod.toml:1", "temperature", "move it into [lm.a]"]),
        ("tempratur = 0.5\n[lm.a]\nmodel = 'openai/a'", ["prod.toml:1", "tempratur", "did you mean 'temperature'"]),
        ("lm = 'openai/m'", ["prod.toml:1", "lm", "[lm.big]"]),
        ("[lm]\nmodel = 'openai/m'", ["lm: takes a table for each LM"]),
        ("[lm.default]\nmodel = 'openai/m'", ["prod.toml:1", "lm.default", "choose another name"]),
        ("[lm.Big]\nmodel = 'openai/m'", ["prod.toml:1", "lm.Big", "small letters"]),
    ],
)
def test_what_cannot_be_meant_is_told_with_its_place(write: Any, text: str, words: list[str]) -> None:
    """The file, the line, the key and what to do; and nothing has begun."""
    message = refused(write(text))
    for word in words:
        assert word in message
    assert tracking.status() is None


def test_nothing_begins_when_a_later_table_is_wrong(write: Any) -> None:
    """Logging is ended again when tracking cannot begin."""
    logger = logging.getLogger("own.later")
    refused(write(M + "[logging]\nlogger = 'own.later'\nlevel = 'ERROR'\n[tracking]\nsample = 2"))
    assert logger.level == logging.NOTSET


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("LM__BGI__MODEL", "openai/x", ["$DSPY_PROD__LM__BGI__MODEL", "no [lm.bgi]", "small, big"]),
        ("PRODUCTION__NAM", "x", ["$DSPY_PROD__PRODUCTION__NAM", "did you mean 'name'"]),
        ("LM__BIG__LIMIT__RPM", "many", ["$DSPY_PROD__LM__BIG__LIMIT__RPM", "[limit] rpm"]),
    ],
)
def test_a_variable_that_cannot_be_meant_is_told_by_its_name(
    write: Any, monkeypatch: pytest.MonkeyPatch, name: str, value: str, words: list[str]
) -> None:
    """Instead of being overlooked."""
    monkeypatch.setenv(f"DSPY_PROD__{name}", value)
    message = refused(write(FULL))
    for word in words:
        assert word in message


def test_a_program_s_arguments_are_told_with_their_place(write: Any) -> None:
    """When the program is there, which says what its outputs are."""
    config = dspy_prod.from_config(write(M + "[production]\nname = 'x'\nfallback_response = { queue = 'a' }"))
    with pytest.raises(ConfigError, match=re.escape("prod.toml")):
        config.production(dspy.Predict("question -> answer"))
    config = dspy_prod.from_config(write(M + "[production]\ncatch = 'none'"))
    with pytest.raises(ConfigError, match=r"prod\.toml:4: \[production\] catch: "):
        config.production(dspy.Predict("question -> answer"))


def test_a_single_lm_s_reader_points_to_this_one(write: Any) -> None:
    """A file for a whole service is more than one LM."""
    with pytest.raises(ConfigError, match=r"dspy_prod\.from_config"):
        dspy_prod.LM.from_config(write(FULL))

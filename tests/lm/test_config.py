"""A TOML file and environment variables give an LM, or a message that names file, key and remedy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import dspy_prod
from dspy_prod import Budget, Cache, CircuitBreaker, ConfigError, Price, RateLimit, Retry
from dspy_prod.lm import config
from dspy_prod.lm.config import load_config

FULL = """
model = "openai/gpt-4o-mini"
temperature = 0.0
max_tokens = 500
timeout = 20
stop = ["END"]
api_key_env = "TEAM_KEY"
fallbacks = ["anthropic/claude-haiku-4-5"]
store = "memory://config"
namespace = "triage"

[retry]
attempts = 4

[breaker]
recovery_timeout = 30

[limit]
rpm = 500
tpm = 200_000

[cache]
ttl = 300

[[budget]]
usd = 50
per = "day"

[[budget]]
usd = 0.5
scope = "tenant"

[prices."openai/gpt-4o-mini"]
input = 0.15
output = 0.60

[litellm]
num_ctx = 4096
"""


@pytest.fixture
def write(tmp_path: Path) -> Any:
    """Writes a file and gives its path."""

    def writer(text: str) -> Path:
        path = tmp_path / "prod.toml"
        path.write_text(text, encoding="utf-8")
        return path

    return writer


def refusal(path: Path | None, env: dict[str, str] | None = None) -> str:
    """The message of the refusal."""
    with pytest.raises(ConfigError) as caught:
        load_config(path, env or {})
    return str(caught.value)


# -- the file --------------------------------------------------------------------------------------------------------


def test_a_file_gives_every_argument(write: Any) -> None:
    """Tables become options, the key comes from the environment, LiteLLM's arguments stand beside the others."""
    assert load_config(write(FULL), {"TEAM_KEY": "sk-1"}) == {
        "model": "openai/gpt-4o-mini",
        "temperature": 0.0,
        "max_tokens": 500,
        "timeout": 20,
        "stop": ["END"],
        "api_key": "sk-1",
        "fallbacks": ["anthropic/claude-haiku-4-5"],
        "store": "memory://config",
        "namespace": "triage",
        "retry": Retry(attempts=4),
        "breaker": CircuitBreaker(recovery_timeout=30),
        "limit": RateLimit(rpm=500, tpm=200_000),
        "cache": Cache(ttl=300),
        "budget": [Budget(usd=50, per="day"), Budget(usd=0.5, scope="tenant")],
        "prices": {"openai/gpt-4o-mini": Price(input=0.15, output=0.60)},
        "num_ctx": 4096,
    }


def test_from_config_makes_the_lm(write: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """And arguments in code win over the file."""
    monkeypatch.setenv("TEAM_KEY", "sk-1")
    lm = dspy_prod.LM.from_config(write(FULL), max_tokens=77, limit=None)
    assert (lm.model, lm.kwargs["max_tokens"], lm.settings.limit) == ("openai/gpt-4o-mini", 77, None)
    assert lm.settings.retry == Retry(attempts=4)
    assert lm.settings.clients["api_key"] == "sk-1"
    assert [budget.title for budget in lm.settings.budgets] == ["day", "total/tenant"]
    assert lm.pipeline.store.url == "memory://config"


def test_the_example_in_the_documentation_is_valid(write: Any) -> None:
    """The module's docstring shows a file that works."""
    assert config.__doc__ is not None
    lines = [line[4:] for line in config.__doc__.splitlines() if line.startswith("    ") or not line]
    example = "\n".join(lines)
    arguments = load_config(write(example), {"TEAM_OPENAI_KEY": "sk-1"})
    assert arguments["model"] == "openai/gpt-4o-mini"
    assert arguments["budget"] == [Budget(usd=50, per="day")]
    assert arguments["aws_region_name"] == "eu-central-1"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("breaker = false", {"breaker": False}),
        ("cache = false", {"cache": False}),
        ("cache = true", {"cache": True}),
        ("retry = false", {"retry": False}),
        ("num_retries = 2", {"num_retries": 2}),
        ('engine = "litellm"', {"engine": "litellm"}),
        ("[budget]\nusd = 5", {"budget": [Budget(usd=5)]}),
        ('[extra_headers]\nX-Team = "a"', {"extra_headers": {"X-Team": "a"}}),
        ("[cache]\n", {"cache": Cache()}),
        ("", {}),
    ],
)
def test_short_forms(text: str, expected: dict[str, Any], write: Any) -> None:
    """A policy can be switched off, one budget needs no list, and an empty table is its defaults."""
    assert load_config(write(text), {}) == expected


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("modell = 'x'", ["modell", "did you mean 'model'"]),
        ("budgets = 5", ["budgets", "'budget'"]),
        ("aws_region_name = 'eu'", ["aws_region_name", "[litellm]"]),
        ("[limit]\nrmp = 5", ["[limit] rmp", "no option of RateLimit", "'rpm'"]),
        ("[limit]\nrpm = 'fast'", ["[limit] rpm", "valid number", "'fast'"]),
        ("[limit]\nrpm = '500'", ["[limit] rpm", "takes a number", "'500'"]),
        ("[retry]\nbudget_refill = true", ["[retry] budget_refill", "takes a number"]),
        ("[limit]\nrpm = 0.5", ["[limit]", "use rpm >= 1"]),
        ("[limit]\nburst = 5", ["[limit]", "set rpm too"]),
        ("[limit]\nrpm = true", ["[limit] rpm", "bool"]),
        ("[retry]\nattempts = 0", ["[retry] attempts", "greater than or equal to 1"]),
        ("[retry]\nattempts = 1.5", ["[retry] attempts", "integer"]),
        ("[cache]\nttl = -1", ["[cache] ttl", "greater than 0"]),
        ("[breaker]\nwindow_type = 'week'", ["[breaker] window_type", "'count' or 'time'"]),
        ("[[budget]]\nper = 'day'", ["[budget] usd", "is missing"]),
        ("[[budget]]\nusd = 5\nscope = 'planet'", ["[budget] scope", "'tenant'"]),
        ("budget = 5", ["budget", "[[budget]]"]),
        ("budget = [5]", ["budget", "[[budget]]"]),
        ("limit = 500", ["limit", "a table [limit]"]),
        ("prices = 5", ["prices", "a table"]),
        ("[prices]\n'a/b' = 5", ['prices."a/b"', "a table of input"]),
        ("[prices.'a/b']\ninput = -1\noutput = 1", ['[prices."a/b"] input']),
        ("fallbacks = 'a/b'", ["fallbacks", "takes a list"]),
        ("fallbacks = [5]", ["fallbacks", "model names"]),
        ("model = 5", ["model", "takes text", "got 5"]),
        ("max_tokens = 1.5", ["max_tokens", "takes a whole number"]),
        ("temperature = true", ["temperature", "takes a number"]),
        ("clock = 'x'", ["clock", "is an object", "from_config(..., clock=...)"]),
        ("callbacks = []", ["callbacks", "is an object"]),
        ("[litellm]\ntemperature = 1", ["litellm.temperature", "move it out of [litellm]"]),
        ("model = x", ["is not valid TOML", "line 1"]),
        (f"max_tokens = {'9' * 5000}", ["is not valid TOML", "digits"]),
        ("[litellm]\nx = [nan]", ["litellm", "nan and inf cannot be sent"]),
        ("temperature = inf", ["temperature", "nan and inf cannot be sent"]),
    ],
)
def test_a_mistake_is_named_with_file_key_and_remedy(text: str, words: list[str], write: Any) -> None:
    """The first thing that is wrong is said in words a person can act on."""
    path = write(text)
    message = refusal(path)
    assert message.startswith(str(path))
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("model = 'a/b'\nmax_token = 5", [":2: max_token", "did you mean 'max_tokens'"]),
        ("\n\n[limit]\nrpm = 5\ntpn = 5", [":5: [limit] tpn", "'tpm'"]),
        ("[[budget]]\nusd = 5\n[[budget]]\nusd = -5", ["[budget] usd", "greater than 0"]),
        ("[retry]\nattempts = 2\n[prices.'a/b']\ninput = -1\noutput = 1", [":4: [prices"]),
    ],
)
def test_a_slip_is_told_with_its_line(text: str, words: list[str], write: Any) -> None:
    """`max_token = 5` was "a secret does not belong in a file"."""
    message = refusal(write(text))
    for word in words:
        assert word in message


def test_a_misspelt_variable_is_blamed_and_not_the_file(write: Any) -> None:
    """The file was fine: somebody had set the wrong variable in the deployment."""
    path = write('model = "openai/gpt-4o"')
    for name, meant in (("DSPY_PROD__LIMT__RPM", "'limit'"), ("DSPY_PROD__MAX_TOKEN", "'max_tokens'")):
        with pytest.raises(ConfigError) as caught:
            load_config(path, {name: "5"})
        assert str(caught.value).startswith(f"${name}")
        assert meant in str(caught.value)


def test_a_missing_or_unreadable_file_is_named(tmp_path: Path) -> None:
    """With the directory it was looked for in."""
    assert f"there is no such file (looked from {Path.cwd()})" in refusal(tmp_path / "nope.toml")
    assert "cannot be read" in refusal(tmp_path)
    (tmp_path / "latin.toml").write_bytes('model = "é"'.encode("latin-1"))
    assert "UTF-8" in refusal(tmp_path / "latin.toml")


def test_a_file_without_a_model_is_named(write: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless the code says it."""
    path = write('store = "memory://config"')
    with pytest.raises(ConfigError, match=r"prod\.toml: model: is missing"):
        dspy_prod.LM.from_config(path)
    assert dspy_prod.LM.from_config(path, model="openai/gpt-4o").model == "openai/gpt-4o"


# -- secrets ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("api_key = 'sk-live'", ["api_key", 'api_key_env = "MY_KEY"']),
        ("[extra_headers]\nAuthorization = 'sk-live'", ["extra_headers.Authorization", "$DSPY_PROD__EXTRA_HEADERS"]),
        ("[litellm]\naws_secret_access_key = 'sk-live'", ["litellm.aws_secret_access_key", "$DSPY_PROD__LITELLM"]),
        ("store = 'redis://:sk-live@host/0'", ["store", "$DSPY_PROD__STORE"]),
        ("api_base = 'https://me:sk-live@host/v1'", ["api_base", "$DSPY_PROD__API_BASE"]),
    ],
)
def test_a_secret_in_a_file_is_refused_without_showing_it(text: str, words: list[str], write: Any) -> None:
    """Files are committed; the remedy is an environment variable."""
    message = refusal(write(text))
    assert "does not belong in a file" in message
    assert "sk-live" not in message
    for word in words:
        assert word in message


def test_a_key_comes_from_the_variable_that_the_file_names(write: Any) -> None:
    """A variable that is not set is named; a key in the environment itself wins."""
    path = write('model = "openai/gpt-4o"\napi_key_env = "TEAM_KEY"')
    assert load_config(path, {"TEAM_KEY": "sk-1"})["api_key"] == "sk-1"
    assert load_config(path, {"TEAM_KEY": "sk-1", "DSPY_PROD__API_KEY": "12345"})["api_key"] == "12345"
    assert "$TEAM_KEY is not set" in refusal(path)


# -- the environment -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variable", "value", "key", "expected"),
    [
        ("MODEL", "openai/gpt-4o", "model", "openai/gpt-4o"),
        ("TEMPERATURE", "0.5", "temperature", 0.5),
        ("NAMESPACE", "123", "namespace", "123"),
        ("LIMIT__RPM", "100", "limit", RateLimit(rpm=100, tpm=200_000)),
        ("LIMIT", "null", "limit", None),
        ("LIMIT", '{"rpm": 7}', "limit", RateLimit(rpm=7)),
        ("BREAKER", "false", "breaker", False),
        ("CACHE__TTL", "5", "cache", Cache(ttl=5)),
        ("FALLBACKS", '["a/b", "c/d"]', "fallbacks", ["a/b", "c/d"]),
        ("BUDGET", '{"usd": 1}', "budget", [Budget(usd=1)]),
        ("BUDGET__1__USD", "9", "budget", [Budget(usd=50, per="day"), Budget(usd=9, scope="tenant")]),
        ("PRICES", '{"a/b": {"input": 1, "output": 2}}', "prices", {"a/b": Price(input=1, output=2)}),
        ("LITELLM__NUM_CTX", "1", "num_ctx", 1),
        ("MODEL", "", "model", "openai/gpt-4o-mini"),
    ],
)
def test_environment_variables_win_over_the_file(
    variable: str, value: str, key: str, expected: Any, write: Any
) -> None:
    """Whole arguments and single options; an empty variable counts as not set."""
    arguments = load_config(write(FULL), {"TEAM_KEY": "k", f"DSPY_PROD__{variable}": value})
    assert arguments.get(key) == expected


def test_a_single_budget_needs_no_number(write: Any) -> None:
    """From a list of one, a table, or nothing."""
    env = {"DSPY_PROD__BUDGET__USD": "5", "DSPY_PROD__BUDGET__NAME": "2026"}
    for text in ('[[budget]]\nusd = 50\nper = "day"', '[budget]\nusd = 50\nper = "day"'):
        assert load_config(write(text), env)["budget"] == [Budget(usd=5, per="day", name="2026")]
    assert load_config(None, env)["budget"] == [Budget(usd=5, name="2026")]
    assert load_config(None, {"DSPY_PROD__BUDGET__0__USD": "7"})["budget"] == [Budget(usd=7)]


def test_a_secret_in_a_variable_is_not_shown() -> None:
    """Not even when it is not what the argument takes."""
    message = refusal(None, {"DSPY_PROD__EXTRA_HEADERS": "Authorization: sk-live"})
    assert "$DSPY_PROD__EXTRA_HEADERS: extra_headers: takes a table" in message
    assert "sk-live" not in message


def test_the_environment_alone_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """A container needs no file."""
    for name, value in {"MODEL": "openai/gpt-4o", "LIMIT__RPM": "60", "STORE": "memory://config"}.items():
        monkeypatch.setenv(f"DSPY_PROD__{name}", value)
    lm = dspy_prod.LM.from_config()
    assert (lm.model, lm.settings.limit) == ("openai/gpt-4o", RateLimit(rpm=60))


def test_other_variables_of_ours_are_left_alone() -> None:
    """`DSPY_PROD_STORE` and the like have one underscore and a meaning of their own."""
    assert load_config(None, {"DSPY_PROD_STORE": "memory://x", "DSPY_PROD_DISABLED": "1", "HOME": "/"}) == {}


@pytest.mark.parametrize(
    ("env", "words"),
    [
        ({"LIMIT__RMP": "5"}, ["$DSPY_PROD__LIMIT__RMP", "[limit] rmp", "'rpm'"]),
        ({"LIMIT__RPM": "fast"}, ["$DSPY_PROD__LIMIT__RPM", "valid number"]),
        ({"MODELL": "x"}, ["$DSPY_PROD__MODELL", "'model'"]),
        ({"MAX_TOKENS": "many"}, ["$DSPY_PROD__MAX_TOKENS", "a whole number"]),
        ({"BUDGET__USD": "5"}, ["$DSPY_PROD__BUDGET__USD", "2 budgets", "BUDGET__0__USD"]),
        ({"BUDGET__7__USD": "5"}, ["$DSPY_PROD__BUDGET__7__USD", "0 to 1"]),
        ({"LIMIT__": "5"}, ["$DSPY_PROD__LIMIT__", "TABLE__KEY"]),
        ({"BUDGET__0": "5"}, ["$DSPY_PROD__BUDGET__0", "BUDGET__0__USD"]),
        ({"CALLBACKS": "[]"}, ["$DSPY_PROD__CALLBACKS", "is an object"]),
    ],
)
def test_a_mistake_in_a_variable_is_named_by_the_variable(env: dict[str, str], words: list[str], write: Any) -> None:
    """Not by the file, where one would look in vain."""
    message = refusal(write(FULL), {"TEAM_KEY": "k", **{f"DSPY_PROD__{name}": value for name, value in env.items()}})
    for word in words:
        assert word in message


@pytest.mark.parametrize("text", ["[" * 3_000 + "]" * 3_000, '{"a":' * 3_000 + "1" + "}" * 3_000])
def test_a_variable_that_is_too_deep_to_be_json_is_text(text: str) -> None:
    """It raised a RecursionError, and nobody knew which variable it was."""
    with pytest.raises(ConfigError, match="timeout"):
        load_config(None, {"DSPY_PROD__MODEL": "openai/m", "DSPY_PROD__TIMEOUT": text})

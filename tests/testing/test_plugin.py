"""The pytest plugin, in test runs of its own: what its fixtures give, and what its guard and caps fail."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import dspy
import pytest

import dspy_prod

pytest_plugins = ["pytester"]

_ = dspy.LM, dspy_prod.LM, dspy_prod.Embedder  # inner runs take imports back, which numpy and others do not survive
WITH = ("-p", "no:dspy_prod", "-p", "dspy_prod.testing.plugin", "-p", "no:randomly", "-p", "no:cacheprovider")
"""By its module, whether or not it is installed."""


def run(pytester: pytest.Pytester, code: str, *options: str, ini: str = "") -> Any:
    """The result of a run of a file with this code."""
    pytester.makepyfile("import dspy, dspy_prod, pytest, socket\nfrom dspy_prod.testing import costs\n" + code)
    pytester.makeini(f"[pytest]\n{ini}")
    return pytester.runpytest_inprocess(*WITH, "--strict-markers", *options)


# -- who does not use it ---------------------------------------------------------------------------------------------
def test_loading_it_imports_nothing() -> None:
    """Neither DSPy nor anything of the library's but the plugin itself."""
    code = (
        "import sys, pytest; before = set(sys.modules); import dspy_prod.testing.plugin; "
        "new = {name.partition('.')[0] for name in set(sys.modules) - before}; "
        "print(sorted(name for name in sys.modules if name.startswith('dspy'))); "
        "assert not new & {'dspy', 'asyncio', 'litellm', 'numpy', 'mlflow', 'pydantic', 'orjson'}, new"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "dspy_prod.testing.provider" not in done.stdout


def test_it_leaves_other_tests_alone(pytester: pytest.Pytester) -> None:
    """A test that asks for nothing finds its sockets as they are, and fixtures of its own names."""
    result = run(pytester, """
@pytest.fixture
def provider():
    return "mine"

def test_one(provider):
    assert provider == "mine"
    assert "connect" not in vars(socket.socket)
""")  # fmt: skip
    result.assert_outcomes(passed=1)


def test_it_shows_its_parts(pytester: pytest.Pytester) -> None:
    told = run(pytester, "", "--fixtures").stdout.str() + run(pytester, "", "--markers").stdout.str()
    for name in ("dspy_prod_store", "fake_clock", "provider", "lm", "costs", "no_real_provider"):
        assert f"{name} -- " in told
    assert "@pytest.mark.max_cost(usd=None, calls=None)" in told


# -- fixtures --------------------------------------------------------------------------------------------------------
def test_fixtures(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    """An LM in front of a provider, each test with a store of its own whatever the shell says; the clock."""
    monkeypatch.setenv("DSPY_PROD__STORE", "redis://127.0.0.1:1/0")
    result = run(pytester, """
import os

@pytest.mark.parametrize("number", [1, 2])
def test_lm(lm, provider, dspy_prod_store, number):
    assert os.environ["DSPY_PROD_STORE"] == dspy_prod_store
    assert lm.costs().today_usd == 0.0
    with costs() as spent, dspy.context(lm=lm):
        dspy.Predict("question -> answer")(question="why")
        lm("same"), lm("same")
    assert (spent.calls, spent.cached, spent.failed) == (2, 1, 0)
    assert spent.nano == provider.bill.nano == round(spent.usd * 1e9)
    assert spent.tokens == sum(row.input_tokens + row.output_tokens for row in provider.bill.rows)
    assert spent.by("model") == {"openai/gpt-4o-mini": spent.usd}

def test_default_store(dspy_prod_store):
    assert dspy_prod.LM("openai/x", api_key="k").pipeline.store.url == dspy_prod_store

def test_clock(fake_clock):
    before = fake_clock.time()
    fake_clock.advance(60)
    assert fake_clock.time() == before + 60

def test_by(lm, costs):
    with costs() as spent:
        with dspy_prod.call_context(user="u", tags={"job": "j"}):
            lm("a")
        lm("b")
    assert spent.by("tag:job").keys() == {"j", ""}
    assert spent.by("user").keys() == {"u", ""}
    with pytest.raises(ValueError, match="by\\\\('colour'\\\\)"):
        spent.by("colour")
""")  # fmt: skip
    result.assert_outcomes(passed=5)


def test_a_provider_s_failed_callable_fails_the_test(pytester: pytest.Pytester) -> None:
    result = run(pytester, """
def test_it(lm, provider):
    provider.answer = lambda call: {}["no such key"]
    with pytest.raises(dspy.utils.exceptions.LMError):
        lm("a", num_retries=0)
""")  # fmt: skip
    result.assert_outcomes(passed=1, errors=1)
    result.stdout.fnmatch_lines(["*no such key*"])


def test_unknown_costs_are_not_zero(pytester: pytest.Pytester) -> None:
    result = run(pytester, """
@pytest.fixture
def unpriced(provider, dspy_prod_store):
    return dspy_prod.LM("openai/nobody-knows", api_base=provider.url, api_key="k")

def test_spent(unpriced):
    with costs() as spent:
        unpriced("a")
    assert spent.unknown == 1
    with pytest.raises(AssertionError, match="prices="):
        spent.usd

@pytest.mark.max_cost(usd=1)
def test_cap(unpriced):
    unpriced("a")
""")  # fmt: skip
    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines(["*max_cost: The cost of calls of openai/nobody-knows is not known*"])


# -- caps ------------------------------------------------------------------------------------------------------------
def test_max_cost(pytester: pytest.Pytester) -> None:
    result = run(pytester, """
@pytest.mark.max_cost(usd=0.001, calls=2)
def test_within(lm):
    lm("a"), lm("b")

@pytest.mark.max_cost(calls=1)
def test_calls(lm):
    lm("a"), lm("b")

@pytest.mark.max_cost(usd=0.000001)
def test_usd(lm):
    lm("long " * 1000)

@pytest.mark.max_cost(5)
def test_wrong():
    pass

@pytest.mark.max_cost(calls=True)
def test_no_number():
    pass

@pytest.mark.max_cost(calls=0)
def test_own_failure_comes_first(lm):
    lm("a")
    assert False, "its own"
""")  # fmt: skip
    result.assert_outcomes(passed=1, failed=5)
    result.stdout.fnmatch_lines_random([
        "*max_cost: the test made 2 LM calls, and 1 are allowed*",
        "*max_cost: the test cost 0.000*USD, and 1e-06 are allowed*",
        "*max_cost takes usd=<USD>, calls=<number> or both*",
        "*its own*",
    ])  # fmt: skip


def test_asynchronous_tests(pytester: pytest.Pytester) -> None:
    """As other plugins run them."""
    result = run(pytester, """
@pytest.fixture
def anyio_backend():
    return "asyncio"

@pytest.mark.anyio
@pytest.mark.no_real_provider
@pytest.mark.max_cost(calls=1)
@pytest.mark.parametrize("calls", [1, 2])
async def test_it(lm, calls):
    for number in range(calls):
        assert await lm.acall(str(number)) == ["ok"]
""")  # fmt: skip
    result.assert_outcomes(passed=1, failed=1)


# -- the guard -------------------------------------------------------------------------------------------------------
GUARDED = """
import asyncio

@pytest.fixture
def real(dspy_prod_store, monkeypatch):
    monkeypatch.delenv("OPENAI_API_BASE", raising=False)
    return dspy_prod.LM("openai/gpt-4o-mini", api_key="k")

def test_lm(real):
    real("a")

def test_lm_in_a_task(real):
    asyncio.run(real.acall("a"))

def test_embedder(dspy_prod_store):
    dspy_prod.Embedder("openai/text-embedding-3-small", api_key="k")("a")

def test_by_address(dspy_prod_store):
    dspy_prod.LM("openai/x", api_key="k", api_base="http://10.1.2.3/v1")("a")

def test_swallowed(real):
    try:
        real("a")
    except BaseException:
        pass

def test_socket():
    socket.create_connection(("192.0.2.1", 443), timeout=1)

def test_name():
    socket.create_connection(("api.openai.com", 443), timeout=1)

def test_connect_ex():
    with socket.socket() as one:
        one.connect_ex(("8.8.8.8", 53))

def test_plain_dspy():
    dspy.LM("openai/gpt-4o-mini", api_key="k", num_retries=0, cache=False)("a")
"""
FINE = """
def test_loopback(lm):
    assert lm("a") == ["ok"]

def test_ipv6_and_ollama(dspy_prod_store):
    for model, options in (("openai/x", {"api_base": "http://[::1]:9/v1"}), ("ollama/x", {})):
        with pytest.raises(dspy.utils.exceptions.LMError):
            dspy_prod.LM(model, api_key="k", retry=False, **options)("a")

def test_sockets():
    with socket.create_server(("127.0.0.1", 0)) as server:
        socket.create_connection(("localhost", server.getsockname()[1]), timeout=5).close()

def test_an_engine_of_its_own(dspy_prod_store):
    from dspy_prod.testing import ScriptedEngine
    assert dspy_prod.LM("openai/x", engine=ScriptedEngine("hi"), max_tokens=5)("a") == ["hi"]

@pytest.mark.real_provider
def test_meant():
    assert "connect" not in vars(socket.socket)
"""


def test_the_guard_fails_whoever_would_call_a_real_provider(pytester: pytest.Pytester) -> None:
    """Before anything is sent, and with what to do instead; also where the test swallows it."""
    result = run(pytester, GUARDED + FINE, ini="dspy_prod_guard = true")
    result.assert_outcomes(failed=9, passed=5)
    result.stdout.fnmatch_lines_random([
        "*would call a real provider: openai/gpt-4o-mini at openai. Use the fixtures `lm` or `provider`*",
        "*would call a real provider: openai/text-embedding-3-small at openai.*",
        "*would call a real provider: openai/x at 10.1.2.3/v1.*",
        "*would call a real provider: a connection to 192.0.2.1:443.*",
        "*would call a real provider: a connection to api.openai.com.*",
        "*would call a real provider: a connection to 8.8.8.8:53.*",
    ])  # fmt: skip


def test_it_is_off_unless_asked_for(pytester: pytest.Pytester) -> None:
    """By a marker, or by the fixture; hosts of one's own can be allowed."""
    result = run(pytester, """
def test_off():
    assert "connect" not in vars(socket.socket)

@pytest.mark.no_real_provider
@pytest.mark.parametrize("host", ["192.0.2.1", "192.0.2.2"])
def test_marked(host):
    with socket.socket() as one:
        one.settimeout(0.05)
        one.connect_ex((host, 9))

def test_fixture(no_real_provider):
    socket.getaddrinfo("example.com", 80)

def test_off_again():
    assert "connect" not in vars(socket.socket)
    assert socket.getaddrinfo.__module__ == "socket"
""", ini="dspy_prod_allow_hosts = 192.0.2.2")  # fmt: skip
    result.assert_outcomes(passed=3, failed=2)


def test_metadata_of_models_is_no_provider(pytester: pytest.Pytester) -> None:
    """DSPy and LiteLLM look for newer prices when they are imported; they get by without."""
    result = run(pytester, """
def test_quiet(no_real_provider):
    with pytest.raises(OSError):
        socket.create_connection(("raw.githubusercontent.com", 443))
""")  # fmt: skip
    result.assert_outcomes(passed=1)


@pytest.mark.slow
def test_under_xdist(pytester: pytest.Pytester) -> None:
    """Workers have a guard and stores of their own, and talk to their controller all the same."""
    pytester.makepyfile("""
import os, socket, pytest

@pytest.mark.parametrize("number", range(4))
def test_each(dspy_prod_store, number):
    assert str(os.getpid()) in dspy_prod_store

def test_real():
    socket.create_connection(("192.0.2.1", 443), timeout=1)
""")
    pytester.makeini("[pytest]\ndspy_prod_guard = true")
    result = pytester.runpytest_subprocess(*WITH, "-n", "2", timeout=120)
    result.assert_outcomes(passed=4, failed=1)


def test_the_code_of_the_guide_runs(pytester: pytest.Pytester) -> None:
    """Its blocks are a file of tests; what needs no pytest runs when that is imported."""
    guide = (Path(__file__).parents[2] / "docs" / "guide" / "testing.md").read_text("utf-8")
    code = "\n\n".join(re.findall(r"^```python\n(.*?)^```", guide, re.M | re.S))
    result = run(pytester, code, ini="dspy_prod_guard = true")
    result.assert_outcomes(passed=6)

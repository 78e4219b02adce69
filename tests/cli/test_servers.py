"""Commands on a server: a namespace that nobody uses is refused, and not made."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

import pytest
import redis

from dspy_prod.cli import main
from dspy_prod.stores.opening import MOST_NAMED
from dspy_prod.stores.redis.store import RedisStore
from tests.stores.redis.servers import started_valkey


@pytest.fixture(scope="module")
def server() -> Iterator[redis.Redis]:
    running = started_valkey()
    with closing(redis.Redis(port=running.port, decode_responses=True)) as client:
        yield client
    running.stop()


@pytest.fixture
def url(server: redis.Redis) -> str:
    """Of a server on which the namespaces `triage` and `the späti` are in use, among keys of others."""
    server.flushall()
    url = f"redis://127.0.0.1:{server.connection_pool.connection_kwargs['port']}/0"
    for namespace in ("triage", "the späti"):
        RedisStore(url, namespace).close()
    server.set("{dspy_prod:no}:metadata", "of somebody else")
    return url


def words(*command: str, url: str, namespace: str) -> list[str]:
    return [*command, "--store", url, "--namespace", namespace]


@pytest.mark.parametrize(
    "command",
    [
        ("stop", "--all"), ("resume", "--all"), ("breaker", "open", "openai/gpt-4o"), ("status",), ("health",),
        ("costs",), ("calls",), ("programs",), ("budgets",), ("budgets", "set", "day", "--usd", "3"),
        ("experiment", "list"), ("optimizations",),
    ],
)  # fmt: skip
def test_a_namespace_that_nobody_uses_is_refused_and_not_made(
    server: redis.Redis, url: str, command: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(server.keys())
    assert main(words(*command, url=url, namespace="trage")) == 2
    said = capsys.readouterr()
    assert not said.out
    assert "there is no namespace 'trage'" in said.err
    assert "only 'the späti', 'triage'; pass --namespace" in said.err
    assert sorted(server.keys()) == before


@pytest.mark.parametrize("namespace", ["triage", "the späti"])
def test_one_that_is_in_use_is_obeyed(url: str, namespace: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words("stop", "--all", url=url, namespace=namespace)) == 0
    assert "everything is stopped" in capsys.readouterr().out


def test_many_names_are_cut_short(url: str, server: redis.Redis, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(MOST_NAMED):
        server.hset(f"{{dspy_prod:a{number}}}:meta", "born", "x")
    assert main(words("status", url=url, namespace="trage")) == 2
    assert "'a9' and 2 more;" in capsys.readouterr().err


def test_who_may_not_look_for_names_is_told_of_none(
    url: str, server: redis.Redis, capsys: pytest.CaptureFixture[str]
) -> None:
    """And who may not even ask for this one is told that, not that it is missing."""
    server.execute_command("ACL SETUSER few reset on >secret ~{dspy_prod:tr*}:* +@all -scan -cluster")
    own = url.replace("//", "//few:secret@")
    assert main(words("status", url=own, namespace="trage")) == 2
    told = capsys.readouterr().err
    assert "there is no namespace 'trage'" in told
    assert "only" not in told
    assert "secret" not in told
    assert main(words("status", url=own, namespace="billing")) == 2
    assert "see the rights in the guide" in capsys.readouterr().err


def test_a_server_that_cannot_be_reached_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words("stop", "--all", url="redis://127.0.0.1:1/0", namespace="triage")) == 2
    assert "cannot be used" in capsys.readouterr().err


def test_a_name_that_is_no_text_is_named_too(url: str, server: redis.Redis, capsys: pytest.CaptureFixture[str]) -> None:
    """As a directory may be called; and what has a name that none of ours can have is passed over."""
    RedisStore(url, "caf\udce9").close()
    server.set("{dspy_prod:%FF}:meta", "of somebody else")
    server.execute_command("SET", b"{dspy_prod:\xff}:meta", "of somebody else")
    assert main(words("status", url=url, namespace="trage")) == 2
    assert "only 'caf\\udce9', 'the späti', 'triage';" in capsys.readouterr().err

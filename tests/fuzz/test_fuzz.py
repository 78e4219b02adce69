"""The short forms of `python -m tests.fuzz`: whatever is said, every rule of `invariants` holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dspy_prod.testing import Provider, Verbatim
from tests.e2e.support import PRICES, ask, make_lm, upstream
from tests.examples import examples
from tests.fuzz import invariants
from tests.fuzz.draws import by_chance, by_hypothesis, by_script, shrunk
from tests.fuzz.exchange import BODIES, Exchange, healthy
from tests.fuzz.invariants import Violation
from tests.fuzz.memory import watched
from tests.fuzz.mutations import mutated
from tests.fuzz.running import KINDS, Share, quiet, replay, run, shares
from tests.fuzz.sockets import HOME, URL, instead_of_sockets

SHORT = {"answers, native": 200, "answers, LiteLLM": 20, "states": 60, "rows": 20, "names": 150}
LONG = {"answers, native": 20_000, "answers, LiteLLM": 800, "states": 2_000, "rows": 300, "names": 5_000}


@pytest.fixture(params=[kind for kind in KINDS if kind != "rows"])
def kind(request: pytest.FixtureRequest) -> str:
    """Every kind of example."""
    name: str = request.param
    return name


@pytest.mark.long
@pytest.mark.timeout(600)
def test_whatever_is_said_every_rule_holds(kind: str) -> None:
    """Hundreds of examples drawn by chance, always the same ones."""
    tally = run(Share(kind, SHORT[kind], 1))
    assert tally.reproducers == []
    assert tally.examples == SHORT[kind]
    assert tally.answers > 0
    assert tally.errors.total() > 0


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_whatever_is_said_every_rule_holds_for_long(kind: str) -> None:
    """Thousands of them."""
    assert run(Share(kind, LONG[kind], 2)).reproducers == []


def test_memory_that_was_given_back_is_seen() -> None:
    """The peak of an example is told, not that of what came before it."""
    bytearray(300_000_000)
    taken = watched()
    assert taken() < 50_000_000
    bytearray(100_000_000)
    assert taken() > 90_000_000


def test_hypothesis_finds_no_answer_that_breaks_a_rule() -> None:
    """Hypothesis looks where chance does not, and makes what it finds small."""
    fuzzer = KINDS["answers, native"]()

    @examples(40)
    @given(st.data())
    def holds(data: Any) -> None:
        fuzzer.example(by_hypothesis(data))

    with quiet(), fuzzer.ready():
        holds()
        fuzzer.close()


@pytest.mark.parametrize("way", ["sync", "async"])
def test_over_a_socket_the_same_holds(way: str) -> None:
    """The answers of a real server on loopback are read by the same rules."""
    bodies = [mutated(by_chance(number), BODIES["chat"][0]).encode("utf-8", "surrogatepass") for number in range(25)]
    with Provider(prices=PRICES, faults=[Verbatim(body) for body in bodies]) as provider:
        lm = make_lm(provider.url, budget={"usd": 1_000}, breaker=False)
        for _ in bodies:
            said = ask(lm, way)
            if isinstance(said, BaseException):
                invariants.typed(said)
        assert len(upstream(lm)) == len(provider.calls) == len(bodies)
        assert all(record.cost_nano for record in upstream(lm))
        invariants.nothing_held(lm)
        lm.close()


# -- the fuzzer itself -------------------------------------------------------------------------------------------------
def test_what_violates_a_rule_is_made_small() -> None:
    """Of a long script only what matters is left."""
    script = [by_chance(number).below(50) for number in range(60)]
    script[37] = 42
    assert shrunk(script, lambda each: 42 in each) == [42]


def test_a_script_makes_the_same_choices_again() -> None:
    """What was drawn by chance is drawn again from what was noted."""
    drawn = by_chance(5)
    first = [drawn.below(100) for _ in range(20)]
    again = by_script(drawn.made)
    assert [again.below(100) for _ in range(20)] == first
    assert again.below(9) == 0


def test_a_violation_is_noticed_saved_and_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fuzzer that notices nothing would be green for ever."""
    monkeypatch.setattr("tests.fuzz.running.KEPT", 1)
    share = Share("answers, native", 30, 1)
    monkeypatch.setattr(invariants, "_problem", lambda *_: "wrong")
    tally = run(share)
    assert tally.violations["charge"] > 0
    path = tmp_path / "one.json"
    path.write_text(json.dumps(tally.reproducers[0]))
    said = replay(path)
    assert isinstance(said, Violation)
    assert said.kind == "charge"
    monkeypatch.undo()
    assert replay(path) is None


def test_a_connection_to_somebody_else_is_noticed() -> None:
    """A client that follows a redirect goes where the wire sees it."""
    away = Exchange(
        (b"HTTP/1.1 307 Away\r\nlocation: http://elsewhere.invalid/\r\ncontent-length: 0\r\n\r\n",), status=307
    )
    with instead_of_sockets() as wire:
        wire.load([away], healthy("chat", False, 0))
        assert httpx.post(URL, follow_redirects=True).status_code == 200
        assert wire.reached == [HOME, ("elsewhere.invalid", 80)]
        with pytest.raises(Violation, match="at home"):
            invariants.at_home(wire.reached, HOME)


def test_the_work_is_shared_out_whole() -> None:
    """A million examples are a million."""
    parts = shares(1_000, 7, 3, list(KINDS))
    assert abs(sum(part.examples for part in parts) - 1_000) <= len(KINDS)
    assert len({(part.kind, part.seed) for part in parts}) == len(parts)

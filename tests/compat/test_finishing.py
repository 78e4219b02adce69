"""A call ends as DSPy ends it: the same history, the same outputs."""

from __future__ import annotations

import os
import uuid
from datetime import datetime
from typing import Any

import dspy
import pytest
from dspy.clients.base_lm import GLOBAL_HISTORY, record_history
from dspy.clients.execution import finalize, prepare
from dspy.lm15 import Message, Request
from hypothesis import given
from hypothesis import strategies as st

from dspy_prod.compat import asking, executing, finishing
from dspy_prod.testing import ScriptedEngine

OWN = ("timestamp", "uuid")
HI = Request(model="openai/gpt-4o-mini", messages=(Message.user("hi"),))


def ended(end: Any, prompt: Any, kwargs: dict[str, Any], **settings: Any) -> tuple[Any, list[dict[str, Any]], Any]:
    """(outputs, history without what is new each time, usage by model) of one call."""
    lm = dspy.LM("openai/gpt-4o-mini", engine=ScriptedEngine("yes"), cache=False)
    call = prepare(lm, prompt, None, kwargs)
    with dspy.context(**settings), dspy.track_usage() as tracker:
        outputs = end(lm, call, executing.run_call(lm, call, asking.request_of(lm, call)))
    history = [{name: value for name, value in entry.items() if name not in OWN} for entry in lm.history]
    return outputs, history, tracker.get_total_tokens()


@pytest.mark.parametrize("prompt", ["hi", HI], ids=["text", "request"])
@pytest.mark.parametrize("settings", [{}, {"disable_history": True}, {"max_history_size": 0}], ids=str)
def test_a_call_ends_as_dspy_ends_it(prompt: Any, settings: dict[str, Any]) -> None:
    """Outputs, usage and every field of the history, in their order, are those that DSPy writes."""
    kwargs = {} if isinstance(prompt, Request) else {"temperature": 0.5}
    before = len(GLOBAL_HISTORY)
    expected, given = ended(finalize, prompt, kwargs, **settings), ended(finishing.finish, prompt, kwargs, **settings)
    assert given == expected
    assert [list(entry) for entry in given[1]] == [list(entry) for entry in expected[1]]
    if len(GLOBAL_HISTORY) > before:
        slow, quick = GLOBAL_HISTORY[-2:]
        assert list(quick) == list(slow)
        assert datetime.fromisoformat(quick["timestamp"]) >= datetime.fromisoformat(slow["timestamp"])


@pytest.mark.parametrize("most", [0, 1, 2])
def test_histories_grow_as_dspy_lets_them(most: int) -> None:
    """An LM and the modules that call it keep their newest entries, as many as are wanted; all calls have theirs."""

    def kept(keep: Any) -> list[list[Any]]:
        lm, module = dspy.LM("openai/gpt-4o-mini"), dspy.Module()
        with dspy.context(max_history_size=most, caller_modules=[module]):
            for number in range(3):
                keep(lm, {"number": number})
        return [lm.history, module.history, GLOBAL_HISTORY[-3:]]

    assert finishing.keep is not record_history
    assert kept(finishing.keep) == kept(record_history)


def test_long_histories_lose_their_oldest_a_few_at_a_time() -> None:
    """They never hold more than is wanted, nor much less; the newest are all there."""
    lm = dspy.LM("openai/gpt-4o-mini")
    lengths = set()
    with dspy.context(max_history_size=1_000):
        for number in range(2_500):
            finishing.keep(lm, {"number": number})
            lengths.add(len(lm.history))
            assert [entry["number"] for entry in lm.history[-3:]] == list(range(max(0, number - 2), number + 1))
    assert lengths == set(range(1, 1_001))
    assert [entry["number"] for entry in lm.history] == list(range(2_500 - len(lm.history), 2_500))
    assert len(lm.history) > 1_000 - 32


@given(drawn=st.lists(st.binary(min_size=16, max_size=16), min_size=1))
def test_an_entry_has_a_random_uuid(drawn: list[bytes]) -> None:
    """Each is a version 4, as `uuid.uuid4` makes it of the same random bytes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finishing, "_drawn", [])
        patch.setattr(os, "urandom", lambda size: b"".join(drawn))
        made = [finishing._uuid() for _ in drawn]
    assert made[::-1] == [str(uuid.UUID(bytes=random, version=4)) for random in drawn]


@given(at=st.integers(0, 2**33 * 10**9) | st.integers(0, 2**33).map(lambda second: second * 10**9))
def test_an_entry_tells_its_time_as_dspy_does(at: int) -> None:
    """The local time to the microsecond, whose zeros go unsaid, also when the second is that of the call before."""
    with pytest.MonkeyPatch.context() as patch:
        for nanos in (at, at + 999_999, at + 1_000_000_000):
            patch.setattr(finishing, "_now", lambda nanos=nanos: nanos)
            second, rest = divmod(nanos, 10**9)
            expected = datetime.fromtimestamp(second).replace(microsecond=rest // 1000)
            assert finishing._timestamp() == expected.isoformat()


def test_entries_have_random_ids() -> None:
    """Those of `uuid.uuid4`, each another one, in a forked child too."""
    given = [finishing._uuid() for _ in range(1000)]
    assert len(set(given)) == len(given)
    parsed = [uuid.UUID(each) for each in given]
    assert [str(each) for each in parsed] == given
    assert {(each.version, each.variant) for each in parsed} == {(4, uuid.RFC_4122)}
    fixed = (48, 49, 50, 51, 64, 65)  # version and variant
    for bit in set(range(128)) - set(fixed):
        assert 350 < sum(each.int >> (127 - bit) & 1 for each in parsed) < 650


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_a_forked_child_has_ids_of_its_own() -> None:
    """Parent and child hold the same randomness that is not used yet; the child must not use it."""
    finishing._uuid()
    reader, writer = os.pipe()
    if os.fork() == 0:
        os.write(writer, "".join(finishing._uuid() for _ in range(3)).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as told:
        theirs = told.read()
    os.wait()
    assert len(theirs) == 3 * 36
    assert not any(finishing._uuid() in theirs for _ in range(100))


def test_ids_seldom_ask_the_system(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each time it wakes every thread that waits for the interpreter."""
    asked: list[int] = []
    urandom = os.urandom
    monkeypatch.setattr(os, "urandom", lambda size: asked.append(size) or urandom(size))
    for _ in range(640):
        finishing._uuid()
    assert len(asked) in (10, 11)

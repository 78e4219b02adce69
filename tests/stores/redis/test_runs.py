"""Runs in Redis: how much is kept of them and for how long."""

from __future__ import annotations

import pytest

from dspy_prod.errors import StoreUnavailableError
from dspy_prod.stores.redis import runs
from dspy_prod.stores.redis.asking import KEPT_FOR
from dspy_prod.stores.vocabulary import Size
from tests.stores.redis.looking import keys_of
from tests.stores.redis.standin import Served


def keep(store: Served, key: bytes = b"a", answer: bytes = b"x", run: str = "it") -> int:
    return store.runs.keep(run, key, answer, "m", True).result(10)


def test_every_key_ends_400_days_after_it_was_last_written(served: Served) -> None:
    keep(served)
    served.runs.put_note("it", "header", "h")
    served.runs.put_note("noted", "header", "h")
    kept = keys_of(served.connection)
    assert set(kept) == {"runs", "run:it", "run:it:answers", "run:it:order", "run:noted"}
    assert set(kept.values()) <= {KEPT_FOR, KEPT_FOR - 1}


def test_a_removed_run_leaves_no_key(served: Served) -> None:
    keep(served)
    served.runs.put_note("it", "header", "h")
    served.runs.remove("it", "|run|it|")
    assert keys_of(served.connection) == {}


def test_answers_beyond_so_many_or_so_long_cannot_be_kept(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "MOST_ANSWERS", 3)
    monkeypatch.setattr(runs, "MOST_BYTES", 10)
    assert [keep(served, answer=b"xxxx") for _ in range(2)] == [0, 1]
    with pytest.raises(StoreUnavailableError, match="as many answers"):
        keep(served, answer=b"xxx")
    assert keep(served, b"b", b"xx") == 0
    with pytest.raises(StoreUnavailableError, match="'it' has as many"):
        keep(served, b"c", b"")
    assert served.runs.keep("it", b"b", b"", "m", False).result(10) == 0, "it is there already"
    assert served.runs.sizes() == {"it": Size(3, 10)}
    assert keep(served, run="another") == 0


def test_keys_and_answers_may_hold_any_bytes(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "_PAGE", 2)
    keys = [bytes(range(256)), b"", b":", b"0:", b"1:a"]
    for number, key in enumerate(keys):
        assert keep(served, key, bytes([number, 0, 255])) == 0
    assert keep(served, b":", b"again") == 1
    assert served.runs.answers("it") == [*((key, 0) for key in keys), (b":", 1)]
    assert [served.runs.answer("it", key, 0) for key in keys] == [bytes([number, 0, 255]) for number in range(5)]
    assert served.runs.answer("it", b":", 1) == b"again"


@pytest.mark.parametrize("name", ["", "a:b", "half \ud800", "nul \0", "ü", "it answers"])
def test_runs_are_told_apart_whatever_their_names_hold(served: Served, name: str) -> None:
    keep(served, run="it")
    keep(served, run=name)
    served.runs.put_note(name, name, name)
    shown = name.encode("utf-8", "backslashreplace").decode()
    assert served.runs.answered() == sorted(["it", shown])
    assert served.runs.noted(name) == {shown: name}
    served.runs.remove(name, None)
    assert served.runs.answered() == ["it"]


def test_a_run_that_had_its_time_is_no_name_any_more(served: Served) -> None:
    keep(served, run="old")
    client, key = served.connection.client(), served.connection.key
    client.delete(key("run", "old"), key("run", "old", "answers"), key("run", "old", "order"))
    assert (served.runs.answered(), served.runs.noted("header")) == ([], {})
    keep(served, run="new")
    assert client.smembers(key("runs")) == {b"new"}


def test_a_note_that_is_gone_takes_no_answers_with_it(served: Served) -> None:
    keep(served)
    served.runs.put_note("it", "header", "h")
    served.runs.put_note("it", "header", None)
    served.runs.put_note("bare", "header", "h")
    served.runs.put_note("bare", "header", None)
    assert served.runs.sizes() == {"it": Size(1, 1)}
    assert not served.runs.swap_note("it", "header", "h", "new")
    assert served.runs.swap_note("it", "header", None, "")
    assert served.runs.note("it", "header") == ""
    assert not served.runs.swap_note("it", "header", None, "x"), "an empty note is one"


def test_of_a_closed_store_the_answer_that_cannot_be_kept_is_told(served: Served) -> None:
    served.close()
    with pytest.raises(StoreUnavailableError, match="is closed"):
        keep(served)

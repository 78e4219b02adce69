"""The file of claims: who has what, between processes, and what damage does to it."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dspy_prod.stores.durable.flights import ALONE, FOLLOWS, LANDED, LEADS
from dspy_prod.stores.sqlite import claims
from dspy_prod.stores.sqlite.claims import ClaimsFile
from tests.stores.support import until

FORK = multiprocessing.get_context("fork")


def serve(path: str, namespace: str, pipe: Any) -> None:
    """Claim and free what one is told to, in another process."""
    file = ClaimsFile(path, namespace)
    while True:
        name, *arguments = pipe.recv()
        pipe.send(getattr(file, name)(*arguments))


class Other:
    """A process with claims of its own."""

    def __init__(self, path: str, namespace: str) -> None:
        self._pipe, theirs = FORK.Pipe()
        self.process = FORK.Process(target=serve, args=(path, namespace, theirs), daemon=True)
        self.process.start()

    def __call__(self, name: str, *arguments: Any) -> Any:
        self._pipe.send((name, *arguments))
        assert self._pipe.poll(20)
        return self._pipe.recv()


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "state.db")


@pytest.fixture
def other(path: str) -> Iterator[Callable[..., Other]]:
    made: list[Other] = []

    def make(namespace: str = "n") -> Other:
        made.append(Other(path, namespace))
        return made[-1]

    yield make
    for each in made:
        each.process.kill()
        each.process.join(10)


def test_one_of_two_processes_leads_until_it_is_done(path: str, other: Callable[..., Other]) -> None:
    """The other one follows; then the lead is his, with the hint that an answer may be there."""
    mine, his = ClaimsFile(path, "n"), other()
    assert his("claim", b"key", False) == LEADS
    assert mine.claim(b"key", False) == FOLLOWS
    assert b"key" not in mine._own
    assert his("followed", b"key")
    assert mine.claim(b"another", False) == LEADS
    his("free", b"key", False)
    assert mine.claim(b"key", True) == LANDED
    assert his("claim", b"key", False) == FOLLOWS
    mine.free(b"key", False)
    assert his("claim", b"key", False) == LANDED


def test_after_a_verdict_all_who_waited_ask_and_the_next_one_leads(path: str, other: Callable[..., Other]) -> None:
    mine, his = ClaimsFile(path, "n"), other()
    assert his("claim", b"key", False) == LEADS
    assert mine.claim(b"key", False) == FOLLOWS
    his("free", b"key", True)
    assert mine.claim(b"key", True) == ALONE
    assert mine.claim(b"key", True) == ALONE
    assert his("claim", b"key", False) == LANDED
    assert mine.claim(b"key", True) == FOLLOWS


def test_namespaces_have_nothing_to_do_with_each_other(path: str, other: Callable[..., Other]) -> None:
    assert other("one")("claim", b"key", False) == LEADS
    assert ClaimsFile(path, "another").claim(b"key", False) == LEADS


def test_a_killed_process_has_no_claims(path: str, other: Callable[..., Other]) -> None:
    mine, his = ClaimsFile(path, "n"), other()
    assert his("claim", b"key", False) == LEADS
    assert mine.claim(b"key", False) == FOLLOWS
    his.process.kill()
    until(lambda: mine.claim(b"key", True) == LANDED, 5)


def test_a_process_that_hangs_is_not_waited_for_without_end(
    path: str, other: Callable[..., Other], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its claim stands, but who waits asks for himself once it has not been renewed for long."""
    mine, his = ClaimsFile(path, "n"), other()
    assert his("claim", b"key", False) == LEADS
    os.kill(his.process.pid, signal.SIGSTOP)
    assert mine.claim(b"key", False) == FOLLOWS
    monkeypatch.setattr(claims, "GRACE", -1.5)
    until(lambda: mine.claim(b"key", True) == ALONE, 5)
    os.kill(his.process.pid, signal.SIGCONT)
    his("renew", set())
    assert mine.claim(b"key", True) == FOLLOWS


def test_a_fork_inherits_no_claims(path: str) -> None:
    """The child's claims are its own, and those of the parent stay."""
    mine = ClaimsFile(path, "n")
    assert mine.claim(b"key", False) == LEADS
    told = FORK.SimpleQueue()

    def child() -> None:
        theirs = ClaimsFile(path, "n")
        told.put((theirs.claim(b"key", False), theirs.claim(b"other", False)))

    process = FORK.Process(target=child)
    process.start()
    process.join(20)
    assert told.get() == (FOLLOWS, LEADS)
    assert mine.claim(b"other", False) in (LEADS, LANDED)


@pytest.mark.parametrize("damage", ["empty", "short", "noise", "header", "gone"])
def test_damage_ends_sharing_and_nothing_else(path: str, other: Callable[..., Other], damage: str) -> None:
    """Whatever becomes of the file while it is used, each process asks for itself at worst, and a new one mends it."""
    mine = ClaimsFile(path, "n")
    assert mine.claim(b"key", False) == LEADS
    file = Path(f"{path}-flights")
    size = file.stat().st_size
    if damage == "gone":
        file.unlink()
    elif damage in ("empty", "short"):
        os.truncate(file, 0 if damage == "empty" else size // 2)
    else:
        with open(file, "r+b") as handle:
            handle.write(os.urandom(size if damage == "noise" else 64))
    assert mine.claim(b"one", False) in (LEADS, LANDED, ALONE)
    mine.followed(b"key")
    mine.renew(set())
    mine.free(b"key", False)
    mine.free(b"one", False)
    his = other()
    assert his("claim", b"key", False) in (LEADS, LANDED)
    assert file.stat().st_size == size


def test_a_file_that_cannot_be_made_is_no_error(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It is told once, and tried again only after a while."""
    mine = ClaimsFile(str(tmp_path / "no" / "such" / "directory" / "state.db"), "n")
    with caplog.at_level("INFO", "dspy_prod"):
        assert [mine.claim(b"key", False) for _ in range(3)] == [ALONE] * 3
    assert len(caplog.records) == 1
    assert len(mine) == 0


def test_claims_have_a_bound(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "MOST", 3)
    mine = ClaimsFile(path, "n")
    assert [mine.claim(b"%d" % number, False) for number in range(5)] == [LEADS] * 3 + [ALONE] * 2
    mine.free(b"0", False)
    assert mine.claim(b"4", False) == LEADS


def test_others_cannot_read_the_file(path: str) -> None:
    ClaimsFile(path, "n").claim(b"key", False)
    assert Path(f"{path}-flights").stat().st_mode & 0o077 == 0


def test_a_claim_takes_microseconds(path: str) -> None:
    """No transaction: a thousand claims and ends take less than a second of this process."""
    mine = ClaimsFile(path, "n")
    began = time.process_time()
    for number in range(1_000):
        mine.claim(b"%d" % number, False)
        mine.free(b"%d" % number, False)
    assert time.process_time() - began < 1.0


def test_threads_that_claim_first_lose_nothing(path: str, other: Callable[..., Other]) -> None:
    """Eight threads open the file at once: what each claimed and ended is free for another process."""
    his = other()
    for number in range(20):
        mine = ClaimsFile(path, "n")
        together = threading.Barrier(8)
        keys = [b"%d.%d" % (number, thread) for thread in range(8)]

        def work(mine: ClaimsFile, together: threading.Barrier, key: bytes) -> None:
            together.wait(10)
            assert mine.claim(key, False) == LEADS
            mine.free(key, False)

        threads = [threading.Thread(target=work, args=(mine, together, key)) for key in keys]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(10)
        assert len(mine) == 0
        assert {his("claim", key, False) for key in keys} == {LANDED}


def test_a_claim_that_is_interrupted_is_none(
    path: str, other: Callable[..., Other], monkeypatch: pytest.MonkeyPatch
) -> None:
    mine, his = ClaimsFile(path, "n"), other()
    assert mine.claim(b"another", False) == LEADS
    assert mine._file is not None
    take = mine._file.claim

    def interrupted(*arguments: Any) -> int:
        take(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(mine._file, "claim", interrupted)
        with pytest.raises(KeyboardInterrupt):
            mine.claim(b"key", False)
    assert b"key" not in mine._own
    assert mine.claimed(b"another")
    assert his("claim", b"key", True) == LANDED
    his("free", b"key", False)


@pytest.mark.parametrize("how", ["free", "give up", "interrupt"])
def test_a_key_is_free_for_the_threads_of_its_process_once_it_is_unlocked(
    path: str, other: Callable[..., Other], monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """The lock is the process's: another LM got it as well, and the late unlock was that of the next flight."""
    mine, his = ClaimsFile(path, "n"), other()
    assert mine.claim(b"another", False) == LEADS
    file = mine._file
    assert file is not None
    take, unlock, taken = file.claim, file.unlock, []

    def late(name: bytes) -> None:
        taken.append(b"key" in mine._own)
        if how == "free":
            assert mine.claim(b"key", False) == FOLLOWS
            mine.free(b"key", False)  # of who had it: it ends once
        unlock(name)
        taken.append(b"key" in mine._own)

    def interrupted(*arguments: Any) -> int:
        take(*arguments)
        raise KeyboardInterrupt

    if how == "interrupt":
        monkeypatch.setattr(file, "claim", interrupted)
        monkeypatch.setattr(file, "unlock", late)
        with pytest.raises(KeyboardInterrupt):
            mine.claim(b"key", False)
    else:
        mine.free(b"another", False)
        assert mine.claim(b"key", False) == LEADS
        monkeypatch.setattr(file, "unlock", late)
        mine.free(b"key", False) if how == "free" else mine._give_up(OSError("full"))
    assert taken == [True, True]
    assert b"key" not in mine._own
    assert his("claim", b"key", True) == LANDED


def test_an_end_that_is_interrupted_is_one(
    path: str, other: Callable[..., Other], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody ends it a second time: its key would be taken among the threads for ever."""
    mine, his = ClaimsFile(path, "n"), other()
    assert mine.claim(b"key", False) == LEADS

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    assert mine._file is not None
    with monkeypatch.context() as patched:
        patched.setattr(mine._file, "free", interrupted)
        with pytest.raises(KeyboardInterrupt):
            mine.free(b"key", False)
    assert b"key" not in mine._own
    assert his("claim", b"key", True) == LANDED


def test_what_is_claimed_while_all_is_given_up_ends(
    path: str, other: Callable[..., Other], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was locked after all the others were let go, and then by nobody."""
    mine, his = ClaimsFile(path, "n"), other()
    assert mine.claim(b"another", False) == LEADS
    file = mine._file
    assert file is not None
    take = file.claim

    def meanwhile(name: bytes, waited: bool) -> int:
        mine._give_up(OSError("full"))
        return take(name, waited)

    monkeypatch.setattr(file, "claim", meanwhile)
    assert mine.claim(b"key", False) == LEADS
    assert b"another" not in mine._own
    assert his("claim", b"key", False) == FOLLOWS
    mine.free(b"key", False)
    assert his("claim", b"key", True) == LANDED


@pytest.mark.parametrize("how", ["close", "give up"])
def test_a_key_whose_claim_was_interrupted_twice_ends_with_all_the_others(
    path: str, other: Callable[..., Other], monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    mine, his = ClaimsFile(path, "n"), other()
    assert mine.claim(b"another", False) == LEADS
    file = mine._file
    assert file is not None
    take = file.claim

    class Own(dict):  # type: ignore[type-arg]
        def get(self, key: Any, default: Any = None) -> Any:
            raise KeyboardInterrupt

    def interrupted(*arguments: Any) -> int:
        take(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(file, "claim", interrupted)
        patched.setattr(mine, "_own", own := Own(mine._own))
        with pytest.raises(KeyboardInterrupt):
            mine.claim(b"key", False)
    mine._own = dict(own)
    assert len(mine) == 2
    assert his("claim", b"key", False) == FOLLOWS
    mine.close() if how == "close" else mine._give_up(OSError("full"))
    assert len(mine) == 0
    assert [his("claim", key, True) for key in (b"key", b"another")] == [LANDED] * 2

"""A call's event loop is closed while it leads; who is passed its lead gives it back: nothing stays claimed."""

from __future__ import annotations

import asyncio
import gc
import itertools
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from dspy.utils.exceptions import LMServerError

import dspy_prod
from dspy_prod import DeadlineExceededError, call_context
from dspy_prod.errors import RunStoppedError
from dspy_prod.pipeline import embedding, flow
from dspy_prod.runtime.reaper import REAPER
from dspy_prod.testing import Provider, ScriptedEngine, Status
from tests.e2e.support import until
from tests.integration.support import Caller, following
from tests.integration.test_left_loops import left
from tests.interrupts import interrupted
from tests.stores.redis.servers import started_valkey

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

NUMBERS = itertools.count()


@pytest.fixture(scope="module")
def valkey() -> Iterator[str]:
    server = started_valkey()
    yield f"redis://127.0.0.1:{server.port}/0"
    server.stop()


@pytest.fixture
def provider() -> Iterator[Provider]:
    with Provider() as provider:
        yield provider


@pytest.fixture(params=["memory", "sqlite", "redis"])
def lm(request: pytest.FixtureRequest, tmp_path: Path, provider: Provider) -> Iterator[Any]:
    if request.param == "redis":
        store = request.getfixturevalue("valkey")
    else:
        store = {"memory": f"memory://leads-{next(NUMBERS)}", "sqlite": f"sqlite:///{tmp_path}/state.db"}[request.param]
    lm = dspy_prod.LM(
        "openai/gpt-4o-mini", api_base=provider.url, api_key="k", store=store, namespace=f"leads-{next(NUMBERS)}"
    )
    yield lm
    gc.collect()  # what was left on a closed loop is settled while the store is there
    REAPER.flush()
    lm.close()


def claims(lm: Any) -> int:
    """What this process has claimed among processes."""
    flights = lm.pipeline.store.flights
    return 0 if flights is None else len(flights._claims)


def late(lm: Any) -> BaseException:
    with call_context(deadline=1e-6), pytest.raises(DeadlineExceededError) as raised:
        lm("same")
    return raised.value


def late_task(lm: Any) -> BaseException:
    with call_context(deadline=1e-6), pytest.raises(DeadlineExceededError) as raised:
        asyncio.run(lm.acall("same"))
    return raised.value


@pytest.mark.parametrize("late", [late, late_task])
def test_who_comes_with_no_time_left_leaves_no_lead_behind(
    lm: Any, provider: Provider, late: Callable[[Any], BaseException]
) -> None:
    provider.hold()
    task = left(lambda: lm.acall("same"), provider)()
    assert "identical call" in str(late(lm))
    assert (len(lm.pipeline.flights), claims(lm)) == (0, 0)
    provider.release()
    assert isinstance(Caller(lambda: lm("same")).outcome(10), list)
    assert not task.done()


def test_another_lm_of_the_process_leads_when_the_loop_of_who_did_is_closed(lm: Any, provider: Provider) -> None:
    """Only who asked the same LM noticed: any other followed to his deadline, also in other processes."""
    store = lm.pipeline.store
    other = dspy_prod.LM(
        lm.model, api_base=provider.url, api_key="k", store=store.url, namespace=store.namespace,
        cache=dspy_prod.Cache(ttl=3_600),
    )  # fmt: skip
    provider.hold()
    task = left(lambda: lm.acall("same"), provider)()
    provider.release()
    with call_context(deadline=30):
        assert isinstance(Caller(lambda: other("same")).outcome(10), list)
    until(lambda: claims(lm) == 0)
    assert not task.done()
    other.close()


@pytest.mark.parametrize("follow", [0, 1])
def test_who_is_cancelled_as_the_lead_is_passed_to_him_leaves_none_behind(
    lm: Any, provider: Provider, follow: int
) -> None:
    """The next one leads, if there is one."""
    provider.hold()
    close = left(lambda: lm.acall("same"), provider)
    loop = asyncio.new_event_loop()

    async def begin() -> Any:
        task = asyncio.ensure_future(lm.acall("same"))
        while following(lm) < 1:  # noqa: ASYNC110  (nobody announces it)
            await asyncio.sleep(0)
        return task

    follower = loop.run_until_complete(begin())
    others = [Caller(lambda: lm("same")) for _ in range(follow)]
    until(lambda: following(lm) == 1 + follow)
    task = close()
    flights = lm.pipeline.flights
    for key in list(flights._flights):
        flights.look_after(key)
    assert following(lm) == follow
    follower.cancel()
    with suppress(asyncio.CancelledError):
        loop.run_until_complete(follower)
    loop.close()
    assert follower.cancelled()
    provider.release()
    assert all(isinstance(other.outcome(10), list) for other in others)
    assert len(flights) == 0
    until(lambda: claims(lm) == 0)  # an answer of the other's is written first
    assert isinstance(Caller(lambda: lm("same")).outcome(10), list)
    assert not task.done()


@pytest.mark.parametrize("kind", [KeyboardInterrupt, MemoryError, RunStoppedError])
def test_who_is_interrupted_as_the_lead_is_passed_to_him_leaves_none_behind(
    lm: Any, provider: Provider, monkeypatch: pytest.MonkeyPatch, kind: type[BaseException]
) -> None:
    provider.hold()
    close = left(lambda: lm.acall("same"), provider)
    flights = lm.pipeline.flights
    look_after = flights.look_after
    closed = threading.Event()

    def interrupted(key: Any) -> None:
        look_after(key)
        if closed.is_set():
            raise kind("now")

    monkeypatch.setattr(flow, "LOOK", 0.02)
    monkeypatch.setattr(flights, "look_after", interrupted)
    follower = Caller(lambda: lm("same"))
    until(lambda: following(lm) == 1)
    task = close()
    closed.set()
    assert isinstance(follower.outcome(10), BaseException)
    assert (len(flights), claims(lm)) == (0, 0)
    monkeypatch.undo()
    provider.release()
    assert isinstance(Caller(lambda: lm("same")).outcome(10), list)
    assert not task.done()


@pytest.mark.parametrize("ending", ["answer", "fail"])
def test_who_is_interrupted_as_his_flight_ends_leaves_none_behind(
    lm: Any, provider: Provider, monkeypatch: pytest.MonkeyPatch, ending: str
) -> None:
    """Nobody would lead after him: the next one who asked the same followed for ever."""

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    flights = lm.pipeline.flights
    if ending == "fail":
        monkeypatch.setattr(flow, "_send", failing)
    with monkeypatch.context() as patched:
        patched.setattr(flights, ending, interrupted)
        with pytest.raises(KeyboardInterrupt):
            lm("same")
    assert len(flights) == 0
    monkeypatch.undo()
    with call_context(cache="refresh"):
        assert isinstance(lm("same"), list)


def failing(_: Any) -> Any:
    raise LMServerError("down", model="m")
    yield


@pytest.mark.parametrize("ending", ["answer", "fail"])
def test_who_is_interrupted_as_the_vectors_are_shared_leaves_none_behind(
    monkeypatch: pytest.MonkeyPatch, ending: str
) -> None:
    with Provider(faults=[Status(500)] if ending == "fail" else []) as provider:
        embedder = dspy_prod.Embedder(
            "openai/text-embedding-3-small", api_base=provider.url, api_key="k", retry=False,
            caching=dspy_prod.Cache(persist=False),
        )  # fmt: skip
        flights = embedder.pipeline.flights

        def interrupted(*_: Any) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patched:
            patched.setattr(flights, ending, interrupted)
            with pytest.raises(KeyboardInterrupt):
                embedder(["a", "b"])
        assert len(flights) == 0
        assert embedder(["a", "b"]).shape[0] == 2


def test_a_leader_that_is_collected_ends_nothing_of_who_leads_in_his_place(
    lm: Any, provider: Provider, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the lead passes just as he is about to end what he began: two processes would ask."""
    if lm.pipeline.store.flights is None:
        pytest.skip("one process has this store")
    provider.hold()
    close = left(lambda: lm.acall("same"), provider)
    cache = lm.pipeline.cache
    lead, leave = cache.lead, cache.leave
    leads, ending = threading.Event(), threading.Lock()

    def leading(*arguments: Any, **more: Any) -> Any:
        found = lead(*arguments, **more)
        if found is True:
            leads.set()
        return found

    def leaving(*arguments: Any, **more: Any) -> None:
        if ending.acquire(blocking=False):
            leads.wait(0.5)  # for the next one to come
        leave(*arguments, **more)

    monkeypatch.setattr(cache, "lead", leading)
    monkeypatch.setattr(cache, "leave", leaving)
    close().get_coro().close()  # as the garbage collector does
    until(ending.locked)
    follower = Caller(lambda: lm("same"))
    assert leads.wait(10)
    assert REAPER.flush()
    assert claims(lm) == 1
    provider.release()
    assert isinstance(follower.outcome(10), list)
    until(lambda: claims(lm) == 0)


def test_texts_passed_to_who_has_no_time_left_are_asked_by_the_next() -> None:
    with Provider() as provider:
        embedder = dspy_prod.Embedder(
            "openai/text-embedding-3-small", api_base=provider.url, api_key="k", caching=dspy_prod.Cache(persist=False)
        )
        provider.hold()
        task = left(lambda: embedder.acall(["a", "b"]), provider)()
        with call_context(deadline=1e-6), pytest.raises(DeadlineExceededError):
            embedder(["b", "a"])
        assert len(embedder.pipeline.flights) == 0
        provider.release()
        assert Caller(lambda: embedder(["a", "b"]).shape[0]).outcome(10) == 2
        assert not task.done()


# -- Ctrl-C at every point -------------------------------------------------------------------------------------------
FLOW = (
    "pipeline/flow.py",
    "pipeline/cut_off.py",
    "pipeline/leading.py",
    "policies/singleflight.py",
    "runtime/brief.py",
)


class Crowd:
    """An LM, what all ask it, and what its first leader does before he asks upstream."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, ending: str) -> None:
        self.lm = dspy_prod.LM("m", engine=ScriptedEngine(), store=f"memory://leads-{next(NUMBERS)}", retry=False)
        self.flights = self.lm.pipeline.flights
        self.prompt = ""
        self.leads: Callable[[], None] | None = None
        send = flow._send

        def sending(call: Any) -> Any:
            first, self.leads = self.leads, None
            if first is not None:
                first()
                if ending == "refused":
                    raise RunStoppedError("now")
                if ending == "fail":
                    yield from failing(call)
                if ending == "own":  # nobody else is to have its answer
                    call.own_fate().was_short(0.0, 0.0)
            return (yield from send(call))

        monkeypatch.setattr(flow, "_send", sending)

    def ask(self) -> Any:
        with call_context(deadline=5.0):
            return self.lm(self.prompt)

    def is_free(self) -> None:
        """Nobody leads what nobody asks any more, and who asks the same is answered."""
        assert REAPER.flush()
        assert len(self.flights) == 0
        assert isinstance(self.ask(), list)


@pytest.mark.parametrize("ending", ["answer", "fail", "refused", "own"])
def test_a_leader_interrupted_anywhere_leaves_no_lead_behind(monkeypatch: pytest.MonkeyPatch, ending: str) -> None:
    """As `join` gave its lock back, the next one who asked the same followed nobody, for ever."""
    crowd = Crowd(monkeypatch, ending)
    for point in itertools.count():
        others: list[Caller] = []

        def follow(others: list[Caller] = others) -> None:
            for number in (1, 2):
                others.append(Caller(crowd.ask))
                until(lambda number=number: crowd.flights.following() == number)  # type: ignore[misc]

        crowd.prompt, crowd.leads = f"leads {point}", follow
        hit, _ = interrupted(crowd.ask, point, *FLOW)
        crowd.leads = None
        for other in others:
            outcome = other.outcome(10)
            assert isinstance(outcome, (list, LMServerError)), (point, outcome)
            assert not isinstance(outcome, DeadlineExceededError), point
        crowd.is_free()
        if not hit:
            break
    assert point > 15


def test_a_follower_interrupted_anywhere_leaves_no_lead_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one who is passed the lead just then."""
    crowd = Crowd(monkeypatch, "refused")
    for point in itertools.count():
        leads, over = threading.Event(), threading.Event()

        def wait(leads: threading.Event = leads, over: threading.Event = over) -> None:
            leads.set()
            until(lambda: crowd.flights.following() > 0 or over.is_set())

        crowd.prompt, crowd.leads = f"follows {point}", wait
        leader = Caller(crowd.ask)
        assert leads.wait(5)
        hit, _ = interrupted(crowd.ask, point, *FLOW)
        over.set()
        assert isinstance(leader.outcome(10), RunStoppedError)
        crowd.is_free()
        if not hit:
            break
    assert point > 15


@pytest.mark.parametrize("ending", ["answer", "fail", "refused"])
def test_an_embedder_interrupted_anywhere_leaves_no_lead_behind(monkeypatch: pytest.MonkeyPatch, ending: str) -> None:
    refused = False
    ask = embedding._batch

    def asking(*of: Any) -> Any:
        if refused:
            raise RunStoppedError("now")
        return (yield from ask(*of))

    monkeypatch.setattr(embedding, "_batch", asking)
    with Provider() as provider:
        embedder = dspy_prod.Embedder(
            "openai/text-embedding-3-small", api_base=provider.url, api_key="k", retry=False, breaker=False,
            caching=dspy_prod.Cache(persist=False),
        )  # fmt: skip
        for point in itertools.count():
            provider.faults = [Status(500)] if ending == "fail" else None  # type: ignore[assignment]
            texts, refused = [f"a {point}", f"b {point}"], ending == "refused"
            hit, _ = interrupted(
                lambda texts=texts: embedder(texts),
                point,
                "pipeline/embedding.py",
                "pipeline/cut_off.py",
                "policies/singleflight.py",
            )
            assert REAPER.flush()
            assert len(embedder.pipeline.flights) == 0, point
            provider.faults, refused = None, False  # type: ignore[assignment]
            assert embedder(texts).shape[0] == 2
            if not hit:
                break
        assert point > 15

"""A `Production` that follows an alias: promotions arrive by themselves, whole, and never in a call's way."""

from __future__ import annotations

import asyncio
import copy
import gc
import itertools
import os
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dspy
import pytest
from dspy.utils.callback import BaseCallback

import dspy_prod
from dspy_prod import ConfigError, Production, registry
from dspy_prod.registry.published import follow
from dspy_prod.testing import ScriptedEngine
from tests.registry.processes import Door, MlflowServer, forget, wait_until
from tests.stopwatch import Stopwatch

_stores = itertools.count()


class Pair(dspy.Module):  # type: ignore[misc]
    """Two predictors that must be of one version."""

    def __init__(self) -> None:
        super().__init__()
        self.first = dspy.Predict("question -> answer")
        self.second = dspy.Predict("question -> answer")

    def forward(self, question: str) -> dspy.Prediction:
        first = self.first(question=question).answer
        return dspy.Prediction(answer=first, second=self.second(question=question).answer)

    async def aforward(self, question: str) -> dspy.Prediction:
        first = (await self.first.acall(question=question)).answer
        return dspy.Prediction(answer=first, second=(await self.second.acall(question=question)).answer)


def versioned(number: int) -> Pair:
    """A program whose predictors both say its number in their instructions."""
    program = Pair()
    for predictor in program.predictors():
        predictor.signature = predictor.signature.with_instructions(f"This is version {number}.")
    return program


def publish(*numbers: int, alias: bool = True) -> None:
    """Publish and promote versions."""
    for number in numbers:
        version = registry.publish(versioned(number), "pair")
        if alias:
            registry.promote("pair", version)


def spoken(request: Any) -> str:
    """An answer that says which version was asked."""
    number = str(request).split("This is version ")[1].split(".")[0] if "This is version " in str(request) else "0"
    return f"[[ ## answer ## ]]\n{number}\n\n[[ ## completed ## ]]"


def make_lm(**more: Any) -> dspy_prod.LM:
    engine = ScriptedEngine([spoken], **more)
    return dspy_prod.LM(
        "any/model",
        engine=engine,
        async_engine=engine.asynchronous,
        store=f"memory://follow-{next(_stores)}",
        cache=False,
    )


@pytest.fixture
def following(store: str) -> Any:
    """Makes a `Production` that follows, and closes it in the end."""
    made: list[Production] = []

    def make(**more: Any) -> Production:
        prod = Production(Pair(), name="pair", follow="pair@production", **{"refresh": 0.05, **more})
        made.append(prod)
        return prod

    yield make
    for prod in made:
        prod.close()


def runs(prod: Production) -> str:
    """The version a program's instructions tell."""
    return "".join(predictor.signature.instructions[-2] for predictor in prod.program.predictors())


def test_a_promotion_and_a_rollback_arrive_without_a_restart(
    following: Callable[..., Production], events: list[dspy_prod.Event]
) -> None:
    """Each is picked up within the refresh time, and told."""
    publish(1)
    prod = following()
    assert runs(prod) == "11"
    publish(2)
    wait_until(lambda: runs(prod) == "22")
    registry.rollback("pair")
    wait_until(lambda: runs(prod) == "11")
    changes = [event.data for event in events if event.name == "program_changed"]
    wait_until(lambda: len([event for event in events if event.name == "program_changed"]) == 3)
    assert changes[0]["previous"] is None
    assert [event.data["version"] for event in events if event.name == "program_changed"] == [
        "pair/1", "pair/2", "pair/1",
    ]  # fmt: skip


@pytest.mark.parametrize("asynchronous", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_no_call_sees_a_half_loaded_program(following: Callable[..., Production], asynchronous: bool) -> None:
    """Under load and constant promotions, both predictors of every answer are of one version."""
    publish(1, 2)
    prod, lm = following(), make_lm(latency=0.01)
    over = threading.Event()
    seen: set[str] = set()
    torn: list[tuple[str, str]] = []
    failures: list[BaseException] = []

    def ask() -> None:
        try:
            with dspy.context(lm=lm):
                while not over.is_set():
                    pred = asyncio.run(prod.acall(question="q")) if asynchronous else prod(question="q")
                    seen.add(pred.answer)
                    if pred.answer != pred.second:
                        torn.append((pred.answer, pred.second))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for number in (1, 2, 1, 2):
        registry.promote("pair", number)
        wait_until(lambda: runs(prod) == str(number) * 2)  # noqa: B023
    over.set()
    for thread in threads:
        thread.join(30)
    assert (failures, torn) == ([], [])
    assert seen == {"1", "2"}


def test_a_call_in_flight_finishes_on_its_version(following: Callable[..., Production]) -> None:
    """A promotion between the two predictors of a call changes nothing for that call."""
    publish(1)
    prod, reached, go_on = following(), threading.Event(), threading.Event()

    def answer(request: Any) -> str:
        if not reached.is_set():
            reached.set()
            assert go_on.wait(30)
        return spoken(request)

    engine = ScriptedEngine([answer])
    lm = dspy_prod.LM("any/model", engine=engine, store=f"memory://follow-{next(_stores)}", cache=False)
    said: list[Any] = []

    def ask() -> None:
        with dspy.context(lm=lm):
            said.append(prod(question="q"))

    thread = threading.Thread(target=ask)
    thread.start()
    assert reached.wait(30)
    publish(2)
    wait_until(lambda: runs(prod) == "22")
    go_on.set()
    thread.join(30)
    assert (said[0].answer, said[0].second) == ("1", "1")
    assert [record.prompt_version for record in lm.ledger.records()] == ["pair/1", "pair/1"]


def test_records_say_which_version_answered(following: Callable[..., Production]) -> None:
    """The mark of the followed version, unless the caller said one."""
    publish(1)
    prod, lm = following(), make_lm()
    with dspy.context(lm=lm):
        prod(question="q")
        with dspy_prod.call_context(prompt_version="mine"):
            prod(question="q")
        copied = copy.deepcopy(prod)
        copied(question="q")
    versions = [record.prompt_version for record in reversed(lm.ledger.records())]
    assert versions == ["pair/1"] * 2 + ["mine"] * 2 + [None] * 2


def test_a_loaded_program_is_known_without_a_production(store: str) -> None:
    """A bare program that was loaded marks its calls too, also in threads; its copies do not."""
    publish(1, alias=False)
    program, lm = registry.load("pair/1", Pair()), make_lm()
    with dspy.context(lm=lm):
        program(question="q")
        program.batch(
            [dspy.Example(question="q").with_inputs("question")] * 2, num_threads=2, disable_progress_bar=True
        )
        with dspy_prod.call_context(prompt_version="mine"):
            program(question="q")
        program.deepcopy()(question="q")
        Pair()(question="q")
    versions = [record.prompt_version for record in reversed(lm.ledger.records())]
    assert versions == ["pair/1"] * 6 + ["mine"] * 2 + [None] * 4


def test_the_innermost_version_is_recorded(store: str) -> None:
    """A published program inside a published program answers for its own calls."""
    publish(1, alias=False)

    class Outer(dspy.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.own = dspy.Predict("question -> answer")
            self.inner = registry.load("pair/1", Pair())

        def forward(self, question: str) -> dspy.Prediction:
            self.inner(question=question)
            return self.own(question=question)

    registry.publish(Outer(), "outer")
    program, lm = registry.load("outer/1", Outer()), make_lm()
    with dspy.context(lm=lm):
        Production(program)(question="q")
    assert [record.prompt_version for record in reversed(lm.ledger.records())] == ["pair/1", "pair/1", "outer/1"]


def test_a_changed_signature_is_refused_and_the_last_good_version_goes_on(
    following: Callable[..., Production], events: list[dspy_prod.Event]
) -> None:
    """The event names predictor and field, and is emitted once; a version that fits is taken again."""
    publish(1)
    prod = following()
    other = versioned(2)
    other.second.signature = other.second.signature.append("more", dspy.OutputField())
    registry.promote("pair", registry.publish(other, "pair"))
    wait_until(lambda: [event for event in events if event.name == "signature_refused"])
    publish(3)
    wait_until(lambda: runs(prod) == "33")
    (refused,) = [event for event in events if event.name == "signature_refused"]
    assert (refused.data["predictor"], refused.data["field"], refused.data["version"]) == ("second", "more", "pair/1")


def test_until_there_is_a_version_the_program_runs_as_in_code(
    following: Callable[..., Production], events: list[dspy_prod.Event]
) -> None:
    """A first deployment starts before the first promotion."""
    publish(1, alias=False)
    prod = following()
    assert prod.program.first.signature.instructions == Pair().first.signature.instructions
    assert "follow_failed" in [event.name for event in events]
    registry.promote("pair", 1)
    wait_until(lambda: runs(prod) == "11")


class Slow(BaseCallback):  # type: ignore[misc]
    """Counts module calls."""

    def __init__(self) -> None:
        self.calls = 0

    def on_module_start(self, call_id: str, instance: Any, inputs: dict[str, Any]) -> None:
        self.calls += 1


def test_lms_and_callbacks_stay_with_the_program(store: str) -> None:
    """A new version is called through the same LM object and the same callbacks."""
    publish(1)
    lm, callback = make_lm(), Slow()
    program = Pair()
    program.set_lm(lm)
    program.first.callbacks = [callback]
    prod = Production(program, name="pair", follow="pair@production", refresh=0.05)
    try:
        assert prod.program is not program
        assert prod(question="q").answer == "1"
        other = make_lm()
        prod.set_lm(other)
        publish(2)
        wait_until(lambda: runs(prod) == "22")
        assert prod(question="q").answer == "2"
        assert prod.get_lm() is other
        assert callback.calls == 2
        assert program.first.signature.instructions == Pair().first.signature.instructions
    finally:
        prod.close()


def test_it_stays_put_while_it_is_evaluated_or_compiled(following: Callable[..., Production]) -> None:
    """A promotion meanwhile waits until the end, also for a `Production` inside another program."""
    publish(1)
    prod, lm = following(), make_lm()

    class Around(dspy.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.inside = prod

        def forward(self, question: str) -> Any:
            return self.inside(question=question)

    looks = threading.Semaphore(0)
    original = prod._follower.look  # type: ignore[union-attr]

    def look() -> None:
        original()
        looks.release()

    prod._follower.look = look  # type: ignore[union-attr, method-assign]
    seen: list[str] = []

    def metric(example: Any, prediction: Any, trace: Any = None) -> float:
        if not seen:
            publish(2)
            for _ in range(100):  # looks that were under way, and at least two that began after the promotion
                if looks._value == 0:
                    break
                looks.acquire()
            for _ in range(3):
                assert looks.acquire(timeout=20)
        seen.append(prediction.answer)
        return 1.0

    examples = [dspy.Example(question=f"q{n}", answer="1").with_inputs("question") for n in range(3)]
    with dspy.context(lm=lm):
        dspy.Evaluate(devset=examples, metric=metric, num_threads=1, display_progress=False)(Around())
    assert seen == ["1", "1", "1"]
    wait_until(lambda: runs(prod) == "22")
    seen.clear()
    with dspy.context(lm=lm):
        compiled = dspy.LabeledFewShot(k=1).compile(prod, trainset=examples)
    assert compiled._follower is None
    assert runs(compiled) == "22"
    publish(1)
    wait_until(lambda: runs(prod) == "11")
    assert runs(compiled) == "22"


def test_copies_do_not_follow(following: Callable[..., Production]) -> None:
    """An optimizer works on copies, which must not change under its hands."""
    publish(1)
    prod = following()
    copies = [copy.deepcopy(prod), prod.deepcopy(), prod.reset_copy()]
    assert [each._follower for each in copies] == [None] * 3


def test_closing_ends_the_thread_and_so_does_forgetting(store: str) -> None:
    """No thread is left behind, and a closed `Production` still answers."""
    publish(1)

    def threads() -> list[threading.Thread]:
        return [thread for thread in threading.enumerate() if thread.name == "dspy_prod-follow"]

    prod = Production(Pair(), follow="pair@production", refresh=0.05)
    assert len(threads()) == 1
    prod.close()
    prod.close()
    assert threads() == []
    with dspy.context(lm=make_lm()):
        assert prod(question="q").answer == "1"
    assert threads() == []
    other = Production(Pair(), follow="pair@production", refresh=0.05)
    gone = weakref.ref(other)
    del other
    gc.collect()
    assert gone() is None
    wait_until(lambda: threads() == [])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_a_forked_child_follows_by_itself(
    server: MlflowServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker forked from a loaded application picks up promotions."""
    import mlflow

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(registry.published.loading, "AGAIN_AFTER", 0.0)
    mlflow.set_tracking_uri(server.uri)
    prod = None
    try:
        publish(1)
        prod = Production(Pair(), name="pair", follow="pair@production", refresh=0.05)
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                prod._snapshot((), {})
                os.write(write, b"!")
                deadline = time.monotonic() + 30
                while runs(prod) != "22" and time.monotonic() < deadline:
                    time.sleep(0.02)
                code = 0 if runs(prod) == "22" else 2
            finally:
                os._exit(code)
        os.close(write)  # else nobody would hear of a child that ends before it speaks
        assert os.read(read, 1) == b"!"
        publish(2)
        _, status = os.waitpid(pid, 0)
        assert os.waitstatus_to_exitcode(status) == 0
    finally:
        if prod is not None:
            prod.close()


def test_no_call_waits_for_a_server_that_is_down(
    server: MlflowServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, events: list[dspy_prod.Event]
) -> None:
    """With the server mute or gone calls are as fast as before, and a new process starts within seconds."""
    import mlflow

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("dspy_prod.registry.server.READ_TIMEOUT", 1.5)
    door = Door(server.port)
    mlflow.set_tracking_uri(door.uri)
    made: list[Production] = []
    try:
        publish(1)
        made.append(Production(Pair(), name="pair", follow="pair@production", refresh=0.05))
        server.freeze()
        with dspy.context(lm=make_lm()):
            for _ in range(20):
                with Stopwatch() as took:
                    assert made[0](question="q").answer == "1"
                assert took.seconds < 0.5
        door.shut()
        server.thaw()
        wait_until(lambda: [event for event in events if event.name == "registry_stale"], 30)
        forget()
        with Stopwatch() as took:
            made.append(Production(Pair(), name="pair", follow="pair@production"))
        assert took.seconds < 5
        assert runs(made[1]) == "11"
        door.open()
        registry.promote("pair", registry.publish(versioned(2), "pair"))
        wait_until(lambda: runs(made[0]) == "22", 30)
    finally:
        for prod in made:
            prod.close()
        door.shut()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"follow": "pair"}, "names no version"),
        ({"follow": "pair@production", "refresh": 0}, "refresh"),
        ({"follow": "pair@production", "refresh": float("nan")}, "refresh"),
    ],
)
def test_impossible_arguments_are_refused(store: str, arguments: dict[str, Any], words: str) -> None:
    """At construction, by name."""
    with pytest.raises(ConfigError, match=words):
        Production(Pair(), **arguments)


def test_an_unforeseen_error_does_not_end_the_thread(
    following: Callable[..., Production], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is logged, and the next look works again."""
    publish(1)
    prod = following()
    failed = threading.Event()

    def broken(*_: Any) -> Any:
        failed.set()
        raise ZeroDivisionError

    monkeypatch.setattr(follow, "renewed", broken)
    assert failed.wait(20)
    monkeypatch.setattr(follow, "renewed", registry.published.loading.renewed)
    publish(2)
    wait_until(lambda: runs(prod) == "22")


def test_what_this_process_moves_it_runs_at_once(following: Callable[..., Production]) -> None:
    """A rollback was followed up to `refresh` seconds later, also where it had been called."""
    publish(1)
    prod = following(refresh=3600)
    assert runs(prod) == "11"
    publish(2)
    assert runs(prod) == "22"
    registry.rollback("pair")
    assert runs(prod) == "11"
    with prod._follower.held():
        registry.promote("pair", 2)
        assert runs(prod) == "11"

"""While a run goes on DSPy, GEPA and Optuna say nothing, everybody else does, and afterwards all is as before."""

from __future__ import annotations

import gc
import io
import logging
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from types import ModuleType
from typing import Any

import dspy
import pytest

import dspy_prod
import dspy_prod.compat.silence  # so that what it makes is there before anything is compared
from benchmarks.subjects import optimizers
from benchmarks.world import World
from dspy_prod.optimize.live import quiet

NAMES = ("dspy", "dspy.evaluate.evaluate", "dspy.teleprompt.gepa.gepa", "optuna", "optuna.study.study")


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with World(3, train=24, val=24, test=4, latency=0.0) as made:
        yield made


@pytest.fixture(autouse=True)
def memory_only() -> Iterator[None]:
    """DSPy's own cache on disk would answer instead of the provider, and keep files."""
    before = dspy.cache
    dspy.configure_cache(enable_disk_cache=False, enable_memory_cache=True)
    yield
    dspy.cache = before
    dspy.clients.DSPY_CACHE = before


def snapshot() -> list[Any]:
    """All that could be changed in order to silence something."""
    import gepa.core.engine  # noqa: F401 (so that it is among the modules)
    import tqdm

    found: list[Any] = []
    for name in NAMES:
        logger = logging.getLogger(name)
        handlers = [(handler, handler.level, list(handler.filters)) for handler in logger.handlers]
        found.append((name, logger.level, logger.propagate, logger.disabled, list(logger.filters), handlers))
    for name, module in sorted(sys.modules.items()):
        if name.startswith(("dspy", "gepa")) and isinstance(module, ModuleType):
            found.append((name, vars(module).get("print"), vars(module).get("tqdm")))
    return [*found, logging.root.manager.disable, sys.stdout, sys.stderr, print, tqdm.tqdm, vars(tqdm.tqdm)["__init__"]]


def evaluate(world: World, metric: Any = None) -> Any:
    with dspy.context(lm=world.lm(plain=True)):
        evaluation = dspy.Evaluate(
            devset=world.valset[:8], metric=metric or world.metric, num_threads=3, display_progress=True
        )
        return evaluation(world.program())


@pytest.mark.parametrize(
    "name", ["BootstrapFewShotWithRandomSearch", "BootstrapFewShotWithOptuna", "MIPROv2", "GEPA", "SIMBA", "COPRO"]
)
def test_an_optimizer_says_nothing(world: World, name: str, capfd: pytest.CaptureFixture[str]) -> None:
    lm, proposer = world.lm(plain=True), world.prompt_lm(plain=True)
    with dspy.context(lm=lm):
        subject = optimizers(world, lm=lm, prompt_lm=proposer)[name]
        logger = logging.getLogger("optuna")
        before, level = snapshot(), logger.level
        capfd.readouterr()
        with quiet():
            subject.optimizer.compile(subject.student, **{**subject.arguments, **small(name)})
        said = capfd.readouterr()
        logger.setLevel(level)  # MIPROv2 itself changes it
    assert said.out == ""
    assert [line for line in said.err.splitlines() if "WARNING" not in line and line.startswith(("20", "[I"))] == []
    assert "it/s" not in said.err
    assert snapshot()[:3] == before[:3]


def small(name: str) -> dict[str, Any]:
    """Arguments for so few examples."""
    return {"minibatch_size": 10, "num_trials": 2} if name == "MIPROv2" else {}


def test_afterwards_dspy_speaks_as_before(world: World, capfd: pytest.CaptureFixture[str]) -> None:
    with quiet():
        evaluate(world)
    assert capfd.readouterr() == ("", "")
    evaluate(world)
    said = capfd.readouterr()
    assert "Average Metric" in said.err  # the log line
    assert "8/8" in said.out  # the bar


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt, SystemExit])
def test_everything_is_exactly_as_before_on_every_way_out(error: type[BaseException] | None) -> None:
    before = snapshot()
    with suppress(ValueError, KeyboardInterrupt, SystemExit), quiet():
        assert snapshot() != before
        if error is not None:
            raise error
    assert snapshot() == before


def test_one_that_cannot_begin_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    before = snapshot()
    inherited = logging.Logger.addFilter

    def fail(self: logging.Logger, filter: Any) -> None:
        if self.name == "optuna.trial._trial":
            raise MemoryError
        inherited(self, filter)

    monkeypatch.setattr(logging.Logger, "addFilter", fail)
    with pytest.raises(MemoryError), quiet():
        pass
    monkeypatch.undo()
    assert snapshot() == before
    with quiet():
        assert snapshot() != before
    assert snapshot() == before


class _Importing:
    """Garbage that imports a module when it is collected, as what a finalizer calls does."""

    def __init__(self, name: str) -> None:
        self.own, self.name = self, name

    def __del__(self) -> None:
        sys.modules[self.name] = ModuleType(self.name)


def test_it_begins_while_a_module_is_imported() -> None:
    """Python 3.11 collects garbage, and so may run anything, in the middle of a copy made by `list(x.items())`."""
    names = [f"imported_meanwhile_{n}" for n in range(20)]
    enabled, threshold = gc.isenabled(), gc.get_threshold()
    try:
        for name in names:
            gc.collect()
            _Importing(name)
            gc.set_threshold(1, 1, 1)
            with quiet():
                pass
            gc.set_threshold(*threshold)
        gc.collect()
        assert set(names) <= set(sys.modules)
    finally:
        gc.set_threshold(*threshold)
        gc.enable() if enabled else gc.disable()
        for name in names:
            sys.modules.pop(name, None)


def test_blocks_within_blocks_and_side_by_side_end_in_any_order() -> None:
    before = snapshot()
    begun, go = threading.Event(), threading.Event()

    def other() -> None:
        with quiet():
            begun.set()
            go.wait(20)

    thread = threading.Thread(target=other)
    with quiet():
        with quiet():
            thread.start()
            assert begun.wait(20)
        assert snapshot() != before
    assert snapshot() != before  # the other one goes on
    go.set()
    thread.join(20)
    assert snapshot() == before


def test_a_run_beside_it_that_is_not_quiet_is_heard(world: World, capfd: pytest.CaptureFixture[str]) -> None:
    begun, go = threading.Event(), threading.Event()

    def other() -> None:
        with quiet():
            begun.set()
            go.wait(60)
            evaluate(world)

    thread = threading.Thread(target=other)
    thread.start()
    assert begun.wait(20)
    evaluate(world)
    assert "Average Metric" in capfd.readouterr().err
    go.set()
    thread.join(60)
    assert capfd.readouterr() == ("", "")


def test_what_a_metric_prints_and_logs_is_heard(world: World, capfd: pytest.CaptureFixture[str]) -> None:
    mine = logging.getLogger("my.program")
    handler = logging.StreamHandler()
    mine.addHandler(handler)
    mine.setLevel(logging.INFO)

    def metric(example: Any, prediction: Any, trace: Any = None) -> float:
        print("printed by the metric")
        mine.info("logged by the metric")
        return 1.0

    try:
        with quiet():
            evaluate(world, metric)
    finally:
        mine.removeHandler(handler)
    said = capfd.readouterr()
    assert said.out.count("printed by the metric") == 8
    assert said.out.replace("printed by the metric", "").strip() == ""
    assert said.err.splitlines() == ["logged by the metric"] * 8


def test_a_history_that_a_program_asks_for_is_shown(world: World, capfd: pytest.CaptureFixture[str]) -> None:
    lm = world.lm(plain=True)
    with quiet(), dspy.context(lm=lm):
        world.program()(message=world.trainset[0].message)
        lm.inspect_history(n=1)
    assert world.trainset[0].message in capfd.readouterr().out


def test_the_users_own_handler_on_dspys_logger_gets_every_line(world: World) -> None:
    text = io.StringIO()
    handler = logging.StreamHandler(text)
    logging.getLogger("dspy").addHandler(handler)
    try:
        with quiet():
            evaluate(world)
    finally:
        logging.getLogger("dspy").removeHandler(handler)
    assert "Average Metric" in text.getvalue()


def test_warnings_are_heard(capfd: pytest.CaptureFixture[str]) -> None:
    with quiet():
        logging.getLogger("dspy.evaluate.evaluate").warning("a warning")
    assert "a warning" in capfd.readouterr().err


def test_that_the_run_has_ended_is_no_error_of_each_example(world: World, capfd: pytest.CaptureFixture[str]) -> None:
    lm = world.lm(store="memory://", namespace="quiet end")
    run = dspy_prod.Run("quiet end", calls=3, store="memory://")
    evaluation = dspy.Evaluate(devset=world.trainset, metric=world.metric, num_threads=3)
    for capped in (run, dspy_prod.Run("stopped", store="memory://")):
        capped.stop() if capped is not run else None
        with quiet(), dspy.context(lm=lm), dspy_prod.call_context(run=capped), pytest.raises(dspy_prod.RejectedError):
            evaluation(world.program())
    assert capfd.readouterr() == ("", "")


def test_an_error_of_the_program_is_one(world: World, capfd: pytest.CaptureFixture[str]) -> None:
    def metric(*_: Any) -> float:
        raise ValueError("the metric is broken")

    with quiet(), suppress(Exception):
        evaluate(world, metric)
    assert "the metric is broken" in capfd.readouterr().err


def test_what_somebody_else_puts_there_meanwhile_stays() -> None:
    import dspy.utils.parallelizer as module

    before = module.tqdm
    mine = object()
    with quiet():
        vars(module)["tqdm"] = mine
    try:
        assert module.tqdm is mine
    finally:
        vars(module)["tqdm"] = before

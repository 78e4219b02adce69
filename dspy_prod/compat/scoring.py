"""How DSPy scores programs: what a metric may tell; its executor of many examples, and its optimizers, made to end
with an error of ours."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from functools import wraps
from math import isfinite
from typing import Any, Final

from dspy.teleprompt.teleprompt import Teleprompter

from dspy_prod.compat.dspy import thread_local_overrides
from dspy_prod.compat.foreign import names

ENDER: Final = "dspy_prod_ender"
"""Name of a DSPy setting: takes what ends an executor's work at once, whatever is in flight, and gives a context in
which it may be called."""


def end_parallel_work_with(ends: Callable[[BaseException], bool]) -> None:
    """Have DSPy's executor of many examples end with an error of the kind that `ends` names, as it is.

    By itself it counts errors, leaves a hole or a score of 0 for each, and at last says "cancelled".
    """
    [executor, *_] = names(
        "dspy.utils.parallelizer",
        "ParallelExecutor",
        "ParallelExecutor.execute",
        "ParallelExecutor._wrap_function",
    )
    if getattr(executor.execute, "_dspy_prod", False):
        return
    execute, wrap_function = executor.execute, executor._wrap_function

    @wraps(execute)
    def execute_or_end(self: Any, function: Any, data: Any) -> Any:
        found: BaseException | None
        ender = thread_local_overrides.get().get(ENDER)
        try:
            if ender is None:
                return execute(self, function, data)
            with ender(self.cancel_jobs.set):
                return execute(self, function, data)
        except BaseException as error:
            found = getattr(self, "_dspy_prod_end", None)
            if found is None or not (isinstance(error, Exception) or ends(error)):
                raise
        raise found

    @wraps(wrap_function)
    def wrap_watched(self: Any, function: Any) -> Any:
        def watched(item: Any) -> Any:
            try:
                return function(item)
            except BaseException as error:
                if ends(error):
                    self._dspy_prod_end = error
                    self.cancel_jobs.set()
                raise

        return wrap_function(self, watched)

    execute_or_end._dspy_prod = True  # type: ignore[attr-defined]
    executor.execute, executor._wrap_function = execute_or_end, wrap_watched


def wrap_compile(wrap: Callable[[Any], Any], wrap_async: Callable[[Any], Any]) -> None:
    """Put something around the `compile` of every optimizer, also of those defined later.

    It stands outside the callbacks that DSPy puts there, when a class is made.
    """
    if getattr(Teleprompter, "_dspy_prod", False):
        return
    made: Any = Teleprompter.__init_subclass__

    def wrapped(kind: Any) -> None:
        compile = kind.__dict__.get("compile")
        if inspect.isfunction(compile):
            kind.compile = (wrap_async if inspect.iscoroutinefunction(compile) else wrap)(compile)

    def init_subclass(kind: Any, /, **kwargs: Any) -> None:
        made.__func__(kind, **kwargs)
        wrapped(kind)

    optimizer: Any = Teleprompter
    optimizer.__init_subclass__ = classmethod(init_subclass)
    for kind in _beneath(Teleprompter):
        wrapped(kind)
    optimizer._dspy_prod = True


def number(told: Any) -> float | None:
    """The score that a metric told: a number, a bool, or what has one as `score`; None when it told none."""
    if not isinstance(told, (bool, int, float)):
        score = told.get("score") if isinstance(told, (dict, Mapping)) else getattr(told, "score", None)
        told = score if isinstance(score, (bool, int, float)) else told
    try:
        found = float(told)
    except (TypeError, ValueError):
        return None
    return found if isfinite(found) else None


def _beneath(kind: type[Any]) -> Iterator[type[Any]]:
    seen: set[type[Any]] = set()
    found: list[type[Any]] = [kind]
    while found:
        for each in found.pop().__subclasses__():
            if each not in seen:
                seen.add(each)
                found.append(each)
                yield each

"""Where a canned answer must never be given: inside `dspy.Evaluate` and an optimizer's `compile`.

There a `Production` raises instead of answering with its fallback, admission waits as long as it takes, and a refusal
of this library ends the evaluation, or the compile, as itself: a score is never about who was busy or out of money.

DSPy tells its callbacks when an evaluation or a compile begins and ends, and runs callbacks that stand on the component
itself beside the configured ones. One callback on the two base classes therefore sees every evaluation and every
optimizer, also those defined later, without replacing a method. It sets a DSPy setting, because settings (unlike a
`ContextVar`) follow DSPy into worker threads.

Optimizers take any `Exception` for a program's failure: they score it 0, look for another demonstration, or stop early
with half of their work. So a refusal that leaves a program goes up through them as something that is no `Exception`,
and becomes itself again where the outermost `compile` ends. What a program handles within is its own affair.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import wraps
from typing import Any, Final

import dspy
from dspy.teleprompt.teleprompt import Teleprompter
from dspy.utils.callback import BaseCallback

from dspy_prod.compat.dspy import thread_local_overrides
from dspy_prod.compat.scoring import end_parallel_work_with, wrap_compile
from dspy_prod.errors import ConfigError, DeadlineExceededError, RejectedError

_SETTING: Final = "dspy_prod_raising"
_COMPILING: Final = "dspy_prod_compiling"

_scored = False  # something has been scored in this process


def is_raising() -> bool:
    """Whether errors are raised here instead of being answered by a fallback."""
    return _scored and bool(thread_local_overrides.get().get(_SETTING, False))


@contextmanager
def raising() -> Iterator[None]:
    """Make every `Production` inside raise instead of answering with its fallback.

    `dspy.Evaluate` and DSPy's optimizers do this by themselves. Use it around a scoring loop of your own, or around
    `mlflow.genai.evaluate`.
    """
    global _scored
    _scored = True
    with dspy.context(**{_SETTING: True}):
        yield


@contextmanager
def compiling() -> Iterator[None]:
    """`raising()`, for whoever runs an optimizer and looks at refusals himself: they do not end its compile.

    They go to the optimizer as the errors they are.
    """
    global _scored
    _scored = True
    callbacks = [each for each in dspy.settings.callbacks or () if not isinstance(each, _Leaving)]
    with dspy.context(**{_SETTING: True, _COMPILING: True, "callbacks": callbacks}):
        yield


class Ended(BaseException):
    """A refusal on its way out of an optimizer; no caller of ours ever sees it.

    Attributes:
        refusal: what it stands for.
    """

    def __init__(self, refusal: Exception) -> None:
        super().__init__(str(refusal))
        self.refusal = refusal


def _ends_scoring(error: BaseException) -> bool:
    """Whether an error says nothing about the program that is scored. How long it may take does."""
    if isinstance(error, Ended):
        return True
    return isinstance(error, RejectedError) and not isinstance(error, DeadlineExceededError) and is_raising()


def _is_compiling() -> bool:
    return bool(thread_local_overrides.get().get(_COMPILING, False))


class _Leaving(BaseCallback):
    """Lets a refusal that leaves the outermost module, or an LM that no module has called, end the compile."""

    def _end(self, call_id: str, outputs: Any, exception: BaseException | None = None) -> None:
        if isinstance(exception, Exception) and _ends_scoring(exception) and not dspy.settings.caller_modules:
            raise Ended(exception)

    on_module_end = on_lm_end = _end


_LEAVING: Final = _Leaving()


@contextmanager
def _as_itself() -> Iterator[None]:
    try:
        yield
    except Ended as end:
        if _is_compiling():
            raise  # an optimizer within another one
        refusal = end.refusal
    else:
        return
    raise refusal from refusal.__cause__


def _ending(compile: Any) -> Any:
    @wraps(compile)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        _refuse_uncompilable(*args, *kwargs.values())
        with _as_itself():
            return compile(*args, **kwargs)

    return wrapper


def _aending(compile: Any) -> Any:
    @wraps(compile)
    async def wrapper(*args: Any, **kwargs: Any) -> Any:
        _refuse_uncompilable(*args, *kwargs.values())
        with _as_itself():
            return await compile(*args, **kwargs)

    return wrapper


def _modules(values: Iterable[Any]) -> list[Any]:
    """The modules among some arguments, and those inside of them."""
    programs = [value for value in values if isinstance(value, dspy.Module)]
    return [module for program in programs for _, module in program.named_sub_modules()]


def _refuse_uncompilable(*arguments: Any) -> None:
    """Refuse a module that says it is none to compile.

    Raises:
        ConfigError: with what it says.
    """
    for module in _modules(arguments):
        why = getattr(module, "_uncompilable", None)
        if isinstance(why, str):
            raise ConfigError(why)


def _followers(inputs: dict[str, Any]) -> list[Any]:
    """What keeps a `Production` among the arguments, or inside one, at a published version."""
    modules = _modules(inputs.values())
    return [follower for module in modules if (follower := getattr(module, "_follower", None)) is not None]


class _Raising(BaseCallback):
    """Keeps `raising()` in force while an evaluation or a compile runs, and what follows a version at that version."""

    def __init__(self) -> None:
        self._open: dict[str, AbstractContextManager[Any]] = {}

    def _start(self, call_id: str, instance: Any, inputs: dict[str, Any]) -> None:
        scope = self._open[call_id] = ExitStack()
        scope.enter_context(raising())
        if isinstance(instance, Teleprompter) and not _is_compiling():
            callbacks = [*(dspy.settings.callbacks or ()), _LEAVING]
            scope.enter_context(dspy.context(**{_COMPILING: True, "callbacks": callbacks}))
        for follower in _followers(inputs):
            scope.enter_context(follower.held())
        scope.__enter__()  # ended by the matching end, which DSPy promises, in the same thread and task

    def _end(self, call_id: str, outputs: Any, exception: BaseException | None = None) -> None:
        scope = self._open.pop(call_id, None)
        if scope is not None:
            scope.__exit__(None, None, None)

    on_evaluate_start = on_compile_start = _start
    on_evaluate_end = on_compile_end = _end


def _install() -> None:
    for component in (dspy.Evaluate, Teleprompter):
        callbacks = list(getattr(component, "callbacks", []))
        if not any(type(callback).__qualname__ == _Raising.__qualname__ for callback in callbacks):
            component.callbacks = [*callbacks, _Raising()]
    end_parallel_work_with(_ends_scoring)
    wrap_compile(_ending, _aending)


_install()

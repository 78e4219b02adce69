"""What DSPy, GEPA and Optuna show of an optimization, silenced where it runs and nowhere else.

Nothing of the process is replaced: not `sys.stdout`, no level, no handler. A filter on DSPy's own log handler, a
`print` and a progress bar of their modules' own look whether the caller is inside a quiet block, and are as before
elsewhere: in other threads, in a metric, in the user's own handlers and programs.
"""

from __future__ import annotations

import builtins
import logging
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, ModuleType
from typing import Any, Final

import dspy

from dspy_prod.compat.dspy import thread_local_overrides

SETTING: Final = "dspy_prod_quiet"
"""The DSPy setting that says so: it follows DSPy into its threads."""

_PRINTING: Final = ("dspy.teleprompt.", "dspy.propose.", "dspy.evaluate.", "gepa.")
"""Packages whose modules print, or log through a function that does."""

_FOR_OPTIMIZERS: Final = "dspy.utils.inspect_history"
"""It prints for whoever asks; COPRO asks in order to log it."""

_BARS: Final = ("dspy.utils.parallelizer", "dspy.evaluate.evaluate", "dspy.teleprompt.bootstrap", "gepa.core.engine")
"""Modules that draw progress bars."""

_LOGGERS: Final = ("optuna.study.study", "optuna.storages._in_memory", "optuna.trial._trial")
"""Loggers of Optuna, whose handler comes only when it is imported."""


Expected = Callable[[BaseException], bool]


def is_quiet() -> bool:
    """Whether the caller is inside a quiet block."""
    return thread_local_overrides.get().get(SETTING) is not None


@contextmanager
def silenced(expected: Expected = lambda error: False) -> Iterator[None]:
    """Silence what is called inside. Blocks may be nested, and several may be open at once in several threads.

    Args:
        expected: whether an error belongs to the block's ordinary end, so that DSPy need not log it.
    """
    _INSTALLED.enter()
    try:
        with dspy.context(**{SETTING: expected}):
            yield
    finally:
        _INSTALLED.leave()


class _Filter(logging.Filter):
    """Drops what is less than a warning, and what DSPy says of errors that are expected."""

    def filter(self, record: logging.LogRecord) -> bool:
        expected: Expected | None = thread_local_overrides.get().get(SETTING)
        if expected is None:
            return True
        if record.levelno < logging.WARNING:
            return False
        error = sys.exc_info()[1]  # DSPy logs it where it has caught it
        if error is not None and expected(error):
            return False
        if record.name == "dspy.utils.parallelizer" and str(record.msg).startswith("Execution cancelled"):
            return False
        return not (record.name == "dspy.predict.predict" and _by_a_proposer(sys._getframe(1)))


def _by_a_proposer(frame: FrameType | None) -> bool:
    """Whether one of DSPy's proposers, whose values do not fit their own signatures, is the one who calls."""
    while frame is not None:
        name = str(frame.f_globals.get("__name__"))
        if name.startswith("dspy.propose.") or frame.f_code.co_name == "append_a_rule":
            return True
        if not name.startswith(("dspy.", "dspy_prod.", "logging")):
            return False
        frame = frame.f_back
    return False


def _print(*values: Any, **more: Any) -> None:
    if more.get("file") not in (None, sys.stdout) or not is_quiet() or not _for_an_optimizer(sys._getframe(1)):
        builtins.print(*values, **more)  # noqa: T201 (it stands for the built-in one)


def _for_an_optimizer(frame: FrameType | None) -> bool:
    """Whether a module that prints does so of itself, or because an optimizer asked it to."""
    if frame is not None and frame.f_globals.get("__name__") != _FOR_OPTIMIZERS:
        return True
    while frame is not None and not str(frame.f_globals.get("__name__")).startswith(_PRINTING):
        if not str(frame.f_globals.get("__name__")).startswith(("dspy.", "dspy_prod.")):
            return False
        frame = frame.f_back
    return frame is not None


def _bar(kind: Any) -> Any:
    """A class of progress bars that draws none inside a quiet block."""

    def __init__(self: Any, *given: Any, **more: Any) -> None:
        if is_quiet():
            more["disable"] = True
        kind.__init__(self, *given, **more)

    return type(kind.__name__, (kind,), {"__init__": __init__, "__doc__": kind.__doc__})


class _Bars:
    """Stands for the module `tqdm` in modules that draw with `tqdm.tqdm`."""

    def __init__(self, module: ModuleType) -> None:
        self._module = module
        self.tqdm = _bar(module.tqdm)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


class _Installed:
    """Keeps the silencers in place while any block is open, and takes back exactly what it put."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open = 0
        self._filter = _Filter()
        self._filtered: list[logging.Filterer] = []
        self._printing: list[ModuleType] = []
        self._drawing: list[tuple[ModuleType, Any, Any]] = []

    def enter(self) -> None:
        with self._lock:
            if self._open == 0:
                self._put()
            self._open += 1

    def leave(self) -> None:
        with self._lock:
            self._open -= 1
            if self._open == 0:
                self._take_back()

    def _put(self) -> None:
        try:
            self._silence()
        except BaseException:  # what was put stays nobody's otherwise, and the next block finds it half done
            self._take_back()
            raise

    def _silence(self) -> None:
        own = [each for each in logging.getLogger("dspy").handlers if each.get_name() == "dspy_handler"]
        for place in (*own, *map(logging.getLogger, _LOGGERS)):
            self._filtered.append(place)
            place.addFilter(self._filter)
        for name, module in sys.modules.copy().items():
            if (
                name.startswith((*_PRINTING, _FOR_OPTIMIZERS))
                and isinstance(module, ModuleType)
                and "print" not in vars(module)
            ):
                self._printing.append(module)
                vars(module)["print"] = _print
        for name in _BARS:
            found = sys.modules.get(name)
            drawn = vars(found).get("tqdm") if found is not None else None
            if found is not None and drawn is not None:
                quiet = _Bars(drawn) if isinstance(drawn, ModuleType) else _bar(drawn)
                self._drawing.append((found, drawn, quiet))
                vars(found)["tqdm"] = quiet

    def _take_back(self) -> None:
        for place in self._filtered:
            place.removeFilter(self._filter)
        for module in self._printing:
            if vars(module).get("print") is _print:
                del vars(module)["print"]
        for module, drawn, quiet in self._drawing:
            if vars(module).get("tqdm") is quiet:  # else somebody has put another one meanwhile
                vars(module)["tqdm"] = drawn
        self._filtered, self._printing, self._drawing = [], [], []


_INSTALLED: Final = _Installed()

"""What ends a run: a gate before every module, evaluation and LM call, which stays open until a reason closes it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final, NoReturn

import dspy
from dspy.utils.callback import BaseCallback

from dspy_prod.compat.dspy import InForce, thread_local_overrides
from dspy_prod.compat.scoring import ENDER
from dspy_prod.context.current import SETTING, CallContext
from dspy_prod.errors import ConfigError
from dspy_prod.lm.lm import LM
from dspy_prod.optimize.candidates import StoppedBy

_SETTING: Final = "dspy_prod_gate"
_ANSWERING: Final = "dspy_prod_answering"


class Closed(BaseException):
    """Goes up through an optimizer after the gate was closed. No `Exception`: optimizers take those for a bad program.

    Nobody outside of a run ever sees it.
    """


class Answering(InForce):
    """The answer that a program is about to give; it follows DSPy into the program's threads until its `end()`.

    Args:
        context: the conditions of its calls.

    Attributes:
        refused: the run has refused a call of it, so that it is no answer of the program, whatever that makes of it.
    """

    __slots__ = ("refused",)

    def __init__(self, context: CallContext) -> None:
        self.refused = False
        super().__init__(**{SETTING: context, _ANSWERING: self})

    @staticmethod
    def spoil() -> None:
        """A call that was made for the answer of here was refused."""
        answering: Answering | None = thread_local_overrides.get().get(_ANSWERING)
        if answering is not None:
            answering.refused = True


class Gate(BaseCallback):
    """A callback of DSPy that lets everything pass until it is closed, and then nothing.

    It has to be the first callback: what an end handler of another one needs, its start handler must not have begun.
    Each phase of a run has one of its own, so that what an optimizer leaves behind in its threads stays shut out while
    finalists are evaluated.

    Args:
        on_close: called once, in the thread that closes it, with nothing held.
        foreign: whether LMs that no cap can hold may pass.
    """

    def __init__(self, on_close: Callable[[str], None], foreign: bool = False) -> None:
        self._lock = threading.RLock()  # a signal handler may close it
        self._on_close = on_close
        self._foreign = foreign
        self._ends: list[Callable[[], None]] = []
        self.reason: StoppedBy | None = None
        self.detail = ""
        self.error: Exception | None = None
        self.wrong: ConfigError | None = None

    @contextmanager
    def in_force(self, *others: BaseCallback) -> Iterator[None]:
        """Stand before everything inside, and before other callbacks."""
        rest = [each for each in dspy.settings.callbacks or () if not isinstance(each, Gate) and each not in others]
        with dspy.context(**{_SETTING: self, ENDER: self._ender, "callbacks": [self, *others, *rest]}):
            yield

    @contextmanager
    def _ender(self, end: Callable[[], None]) -> Iterator[None]:
        """Keep what ends an executor of DSPy's, which else waits for every call in flight, also for those that hang."""
        with self._lock:
            self._ends.append(end)
        try:
            yield
        finally:
            with self._lock:
                self._ends.remove(end)

    def let_go(self) -> None:
        """Wait for nothing that is in flight."""
        with self._lock:
            ends = list(self._ends)
        for end in ends:
            end()

    @property
    def closed(self) -> bool:
        """Whether nothing passes any more."""
        return self.reason is not None

    def close(self, reason: StoppedBy, detail: str, error: Exception | None = None) -> None:
        """Let nothing pass from now on. The first reason stays."""
        with self._lock:
            if self.reason is not None:
                return
            self.reason, self.detail, self.error = reason, detail, error
        self._on_close(detail)

    def check(self) -> None:
        """Go on, unless it is closed.

        Raises:
            Closed
        """
        if self.reason is not None:
            raise Closed(self.detail)

    def on_module_start(self, call_id: str, instance: Any, inputs: dict[str, Any]) -> None:
        if self.reason is not None:
            self._refuse()

    on_evaluate_start = on_compile_start = on_module_start

    def on_lm_start(self, call_id: str, instance: Any, inputs: dict[str, Any]) -> None:
        if self.reason is not None:
            self._refuse()
        if not self._foreign and isinstance(instance, dspy.BaseLM) and not isinstance(instance, LM):
            self.wrong = ConfigError(
                f"An LM that no cap of this run holds was about to be called: {type(instance).__name__}"
                f"({getattr(instance, 'model', '?')!r}). A metric, a tool or a proposer keeps it to itself: make it a "
                "dspy_prod.LM (or dspy_prod.wrap it), or leave it uncapped with foreign='allow'"
            )
            self.close("failed", str(self.wrong), self.wrong)
            self._refuse()

    def _refuse(self) -> NoReturn:
        Answering.spoil()
        raise Closed(self.detail)


def gate_here() -> Gate | None:
    """The gate in force here, in this thread or task."""
    found: Gate | None = dspy.settings.get(_SETTING, None)
    return found

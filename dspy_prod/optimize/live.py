"""A run to look at while it goes on: one bar at a terminal, a table and a chart in a notebook, else plain lines.

DSPy's own bars and lines are silenced meanwhile, see `quiet`.
"""

from __future__ import annotations

import os
import sys
import time
from contextlib import AbstractContextManager
from typing import Any, Final

from dspy_prod.context.current import current
from dspy_prod.errors import BudgetExceededError, DeadlineExceededError, OutageError, RunStoppedError
from dspy_prod.optimize.candidates import Progress, Watcher
from dspy_prod.optimize.telling import sentence, used
from dspy_prod.runtime.clock import SYSTEM_CLOCK, moment_on
from dspy_prod.views.cells import told

LINE_EVERY: Final = 10.0
"""Seconds after which there is another line, unless a better candidate came before."""

_STEPS: Final = 1000
"""Steps of the bar."""


def quiet() -> AbstractContextManager[None]:
    """Silence what DSPy, GEPA and Optuna show of the work inside, and nothing else.

    Their progress bars, their prints, what they log below a warning, and errors that only say that the run has ended;
    not what a metric or a program prints, nor handlers that you have put on DSPy's loggers. Everything is as before
    afterwards.

    Example:
        ```python
        with quiet():
            optimizer.compile(program, trainset=train)
        ```
    """
    from dspy_prod.compat.silence import silenced

    return silenced(_says_that_it_ends)


def watcher(view: str | None) -> Watcher:
    """Who shows a run.

    Args:
        view: `"auto"`: a table in a notebook, a bar at a terminal, else lines; `"bar"`; `"table"`, which is what
            `"auto"` is where there is no notebook; `"log"`: lines; None shows nothing.
    """
    if view is None:
        return Silent()
    if view in ("auto", "table") and in_notebook():
        from dspy_prod.optimize.live_page import LivePage

        return LivePage()
    if view == "bar" or (view != "log" and at_terminal()):
        return Bar()
    return Lines()


def in_notebook() -> bool:
    """Whether a kernel of IPython runs this code. Nothing is imported to find out."""
    module = sys.modules.get("IPython")
    shell = module.get_ipython() if module is not None else None
    return getattr(shell, "kernel", None) is not None


class Silent:
    """Shows nothing."""

    def begin(self, progress: Progress) -> None:
        """Nothing."""

    def update(self, progress: Progress) -> None:
        """Nothing."""

    def end(self, progress: Progress, report: Any) -> None:
        """Nothing."""


class Lines:
    """A line when it begins and ends, for each better candidate, each wait and each phase, else every ten seconds."""

    def __init__(self) -> None:
        self._shown: tuple[Any, ...] = ()
        self._next = 0.0

    def begin(self, progress: Progress) -> None:
        """A line."""
        self._say(progress)

    def update(self, progress: Progress) -> None:
        """A line, if there is news."""
        if _news(progress) != self._shown or time.monotonic() >= self._next:
            self._say(progress)

    def end(self, progress: Progress, report: Any) -> None:
        """A line."""
        self._say(progress)

    def _say(self, progress: Progress) -> None:
        self._shown, self._next = _news(progress), time.monotonic() + LINE_EVERY
        print(told(f"{progress.run}: {sentence(progress)}"), file=sys.stderr, flush=True)  # noqa: T201 (the view)


class Bar:
    """One bar: how much of the cap that is used most, and in words the rest."""

    def __init__(self) -> None:
        self._bar: Any = None

    def begin(self, progress: Progress) -> None:
        """Draw it."""
        from tqdm import tqdm  # not `tqdm.auto`: in a kernel that warns where ipywidgets is missing

        size = {"dynamic_ncols": True} if has_size() else {"ncols": 120, "nrows": 24}
        self._bar = tqdm(
            total=_STEPS, file=sys.stderr, leave=True, mininterval=0, miniters=0, delay=1e-9,
            bar_format="{desc} {percentage:3.0f}%|{bar:12}| {unit}", **size,
        )  # fmt: skip
        self.update(progress)

    def update(self, progress: Progress) -> None:
        """Draw it anew."""
        bar = self._bar
        if bar is not None:
            bar.n = max(bar.n, round(used(progress) * _STEPS))
            bar.set_description_str(told(progress.run), refresh=False)
            bar.unit = told(sentence(progress))  # a postfix would begin with a comma
            bar.refresh()

    def end(self, progress: Progress, report: Any) -> None:
        """Draw it a last time, and leave it there."""
        self.update(progress)
        bar, self._bar = self._bar, None
        if bar is not None:
            bar.close()


def _news(progress: Progress) -> tuple[Any, ...]:
    best = progress.best
    return (None if best is None else (best.key, best.score), progress.phase, progress.waiting, progress.stopped_by)


def _says_that_it_ends(error: BaseException) -> bool:
    """Whether a run refused a call because it ends; its report tells that."""
    if isinstance(error, DeadlineExceededError):
        # Where DSPy logs, the run's own is in force; a wait may end a moment before it.
        return SYSTEM_CLOCK.monotonic() >= moment_on(SYSTEM_CLOCK, current().deadline) - 0.05
    if isinstance(error, BudgetExceededError):
        return any(error.budget.startswith(f"run {guard.name}: ") for guard in current().guards)
    return isinstance(error, (RunStoppedError, OutageError))


def at_terminal() -> bool:
    isatty = getattr(sys.stderr, "isatty", None)
    return bool(isatty is not None and isatty())


def has_size() -> bool:
    """Whether the terminal knows its size; tqdm draws nothing on one of no columns, as containers have."""
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns > 0
    except (AttributeError, OSError, ValueError):
        return True

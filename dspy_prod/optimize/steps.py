"""How far something is that is done before a run: a pilot, a rehearsal."""

from __future__ import annotations

import contextvars
import html
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

from dspy_prod.optimize.live import at_terminal, has_size, in_notebook
from dspy_prod.views.cells import told

_EVERY: Final = 0.2
"""Seconds between two changes of a notebook's output."""


@contextmanager
def step_by_step(view: str | None, text: str, *, total: int | None, unit: str) -> Iterator[Callable[[], None]]:
    """Show how far it is; that is gone afterwards, whatever ended it.

    Args:
        view: as for `BudgetedOptimizer`: a bar at a terminal and in a notebook, else a line; None shows nothing.
        text: what is done. total: how many steps it has, None where nobody knows. unit: of the steps.

    Returns:
        What to call after each step, from any thread.
    """
    if view is None:
        yield _nothing
    elif view not in ("bar", "log") and in_notebook():
        with _InNotebook(told(text), total, unit) as shown:
            yield shown.step
    elif view == "bar" or (view != "log" and at_terminal()):
        from tqdm import tqdm  # not `tqdm.auto`: in a kernel that warns where ipywidgets is missing

        size: dict[str, Any] = {"dynamic_ncols": True} if has_size() else {"ncols": 120, "nrows": 24}
        with tqdm(total=total, desc=told(text), unit=unit, file=sys.stderr, leave=False, **size) as bar:
            yield lambda: _update(bar)
    else:
        print(told(text), file=sys.stderr, flush=True)  # noqa: T201 (the view)
        yield _nothing


class _InNotebook:
    """A bar below the cell, which needs no extension of the notebook."""

    def __init__(self, text: str, total: int | None, unit: str) -> None:
        self._text, self._total, self._unit = text, total, unit
        self._steps = 0
        self._next = 0.0
        self._lock = threading.Lock()

    def __enter__(self) -> _InNotebook:
        from IPython.display import display

        # The kernel tells by the context which cell a display belongs to; other threads have none.
        self._context = contextvars.copy_context()
        self._handle = display(self._both(), raw=True, display_id=True)
        return self

    def __exit__(self, *_: object) -> None:
        self._show({"text/plain": "", "text/html": ""})

    def step(self) -> None:
        """One more is done."""
        with self._lock:
            self._steps += 1
            due = time.monotonic() >= self._next
        if due:
            self._show(self._both())

    def _show(self, both: dict[str, str]) -> None:
        with self._lock:
            self._context.run(self._handle.update, both, raw=True)
            self._next = time.monotonic() + _EVERY

    def _both(self) -> dict[str, str]:
        known = f" of {self._total:,}" if self._total is not None else ""
        words = f"{self._text}: {self._steps:,}{known} {self._unit}s"
        at = "" if self._total is None else f' value="{self._steps}" max="{self._total}"'
        return {"text/plain": words, "text/html": f"<progress{at}></progress> {html.escape(words)}"}


def _update(bar: Any) -> None:
    bar.update()


def _nothing() -> None:
    return None

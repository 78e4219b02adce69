"""Whose call a trace was, and what MLflow shows of it: so that what is known of an answer needs no user's name."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import Any, Final, Literal

from dspy_prod.context.assignments import TAG
from dspy_prod.errors import ConfigError
from dspy_prod.runtime.forking import reset_after_fork
from dspy_prod.runtime.reaper import REAPER
from dspy_prod.stores.base import Store
from dspy_prod.tracking.run_messages import RunMessages

MOST_KNOWN: Final = 20_000
"""Traces of which a process remembers who called; of others the ledger is asked."""

_PATIENCE: Final = 1.0
"""Seconds to wait for calls to be seen, and then for the ledger to be written."""

_CALLS: Final = 100
"""Calls of programs in a trace that are looked at: nested ones may belong to other experiments."""


class Traced:
    """Finds the unit of a trace, for one experiment. Thread-safe.

    Args:
        experiment: its name. store: whose ledger is asked.
    """

    def __init__(self, experiment: str, store: Store) -> None:
        self._experiment, self._store = experiment, store
        self._units: OrderedDict[str, str] = OrderedDict()
        self._after_fork()
        reset_after_fork(self)

    def see(self, trace: str, unit: str) -> None:
        """A unit's call had this trace."""
        with self._lock:
            self._units[bare(trace)] = unit
            if len(self._units) > MOST_KNOWN:
                self._units.popitem(last=False)

    def unit_of(self, trace: str, kind: str) -> str:
        """The unit whose call it was, as the ledger names it.

        Args:
            trace: with or without MLflow's `tr-`. kind: `"user"`, `"session"` or `"tenant"`.

        Raises:
            ConfigError: no call of the experiment has that trace.
            StoreUnavailableError: the ledger cannot be read.
        """
        if not isinstance(trace, str) or not trace:
            raise ConfigError(f"Experiment({self._experiment!r}).record: trace={trace!r} is the id of a trace")
        known = self._seen(trace)
        if known is None:
            REAPER.flush(_PATIENCE)  # a call whose caller has left is seen there
            known = self._seen(trace)
        if known is not None:
            return known
        outer = f"{TAG}{self._experiment}"
        self._store.flush(_PATIENCE)
        for name in dict.fromkeys((trace, f"tr-{bare(trace)}", bare(trace))):
            for call in self._store.programs.calls(trace_id=name, limit=_CALLS):
                unit: str | None = getattr(call, kind)
                if unit is not None and (call.experiment == self._experiment or outer in dict(call.tags)):
                    self.see(trace, unit)
                    return unit
        raise ConfigError(
            f"Experiment({self._experiment!r}).record: no call of it has the trace {trace!r}, as far as the ledger "
            "of its store goes. Take the trace_id of a CallReport, or name the unit"
        )

    def _seen(self, trace: str) -> str | None:
        with self._lock:
            return self._units.get(bare(trace))

    def _after_fork(self) -> None:
        self._lock = threading.Lock()


def bare(trace: str) -> str:
    """A trace's id without MLflow's prefix."""
    return trace.removeprefix("tr-")


def shown_as(said: Any, value: float) -> bool | float:
    """A value as MLflow shows it: a boolean of what was said as one, or as the `int` 0 or 1; else the number."""
    return bool(value) if isinstance(said, int) and value in (0.0, 1.0) else value


def assessed(
    trace: str, metric: str, value: bool | float, source: Literal["code", "llm_judge"], who: str | None
) -> None:
    """Have MLflow show a value on its trace, while tracking is on; never waits.

    Args:
        trace: its id. metric: what was assessed. value: see `shown_as`.
        source: of whom it comes. who: by which name.
    """
    RunMessages().feedback(f"tr-{bare(trace)}", metric, value, source=source, who=who)

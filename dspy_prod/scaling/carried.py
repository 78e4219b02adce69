"""What is in force here and has to be in a worker too: DSPy's settings, the call context, its runs, tracking."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import inf
from typing import Any, Final, NamedTuple

import dspy

from dspy_prod.compat.dspy import settings as settings_here
from dspy_prod.context.current import SETTING, CallContext, current, use
from dspy_prod.context.scoring import raising
from dspy_prod.errors import ConfigError
from dspy_prod.policies.run import Run
from dspy_prod.privacy.names import bare_url
from dspy_prod.runtime.clock import SYSTEM_CLOCK, moment_on
from dspy_prod.scaling.parcel import Parcel
from dspy_prod.stores.addresses import with_password
from dspy_prod.stores.base import Store
from dspy_prod.stores.opening import open_store
from dspy_prod.tracking.setup import enable, given

_log = logging.getLogger("dspy_prod")

NOTE: Final = "evaluation"
"""Name of the note by which a worker finds that it has the very store that it should have."""

_OF_THE_MOMENT: Final = frozenset(
    {"trace", "callbacks", "usage_tracker", "caller_predict", "caller_modules", "send_stream", "stream_listeners"}
)
"""Settings that are about calls under way here."""


class Place(NamedTuple):
    """Where a store is."""

    url: str
    namespace: str

    @classmethod
    def of(cls, store: Store) -> Place:
        """The place of a store, without a password."""
        return cls(store.url, store.namespace)

    def opened(self) -> Store:
        """The store, in this process."""
        return open_store(with_password(self.url), self.namespace)


class RunTerms(NamedTuple):
    """What a run is made of anew from."""

    name: str
    caps: Mapping[str, Any]
    outage: float
    place: Place
    keeps: bool

    @classmethod
    def of(cls, run: Run) -> RunTerms:
        """The terms of a run, as they are now."""
        return cls(run.name, dict(run.caps), run.outages.patience, Place.of(run.store), run.answers is not None)

    def opened(self) -> Run:
        """The run, in this process: its answers are those that are kept by now."""
        store = self.place.opened()
        return Run(self.name, **self.caps, outage=self.outage, store=store, keep_answers=self.keeps)


@dataclass(frozen=True)
class Carried:
    """What was in force where the evaluation began.

    Attributes:
        settings: DSPy's. context: without what is of that process alone. ends_at: the deadline, in seconds since the
            epoch. runs: the outermost first. tracking: the arguments of `tracking.enable`, None when it is off.
    """

    settings: Mapping[str, Any]
    context: CallContext
    ends_at: float
    runs: tuple[RunTerms, ...]
    tracking: Mapping[str, Any] | None

    @classmethod
    def from_here(cls) -> Carried:
        """Take up what is in force.

        Raises:
            ConfigError: that cannot hold elsewhere.
        """
        context = current()
        for guard in context.guards:
            if not isinstance(guard, Run):
                raise ConfigError("evaluate: engine='ray' does not go within an optimization: use engine='threads'")
            if not guard.store.durable:
                raise ConfigError(
                    f"evaluate: {guard!r} is counted in {guard.store.url}, which no other process sees: give it "
                    "store='sqlite:///runs.db' on one machine"
                )
        left = moment_on(SYSTEM_CLOCK, context.deadline) - SYSTEM_CLOCK.monotonic()
        overrides, configured = settings_here()
        told = {**configured, **overrides}
        callbacks = told.get("callbacks") or []
        kept = {name: value for name, value in told.items() if _travels(name, value)}
        autolog = any(type(each).__module__.startswith("mlflow.") for each in callbacks)
        return cls(
            {**kept, "callbacks": _that_travel(callbacks)},
            context._replace(guards=(), records=None, node=None, deadline=inf),
            time.time() + left if left < inf else inf,
            tuple([RunTerms.of(guard) for guard in context.guards]),
            given(autolog=autolog),
        )

    def track(self) -> None:
        """Turn tracking on in this process, as it was there."""
        if self.tracking is None:
            return
        here = os.environ.get("MLFLOW_TRACKING_URI", "")
        uri = self.tracking["tracking_uri"]
        try:
            enable(**{**self.tracking, "tracking_uri": here if here and bare_url(here) == uri else uri})
        except Exception as error:  # an evaluation is worth something without its traces
            _log.warning("A worker goes on without tracking (%s: %s)", type(error).__name__, error)

    @contextmanager
    def in_force(self, runs: Sequence[Run], records: list[Any]) -> Iterator[None]:
        """What was in force there, here.

        Args:
            runs: made from `runs`. records: gets what the calls inside did.
        """
        deadline = inf if self.ends_at == inf else SYSTEM_CLOCK.monotonic() + (self.ends_at - time.time())
        with dspy.context(**self.settings), raising():
            with use(self.context._replace(guards=tuple(runs), records=records, deadline=deadline)):
                yield


def _travels(name: str, value: Any) -> bool:
    return value is not None and name != SETTING and name not in _OF_THE_MOMENT and not name.startswith("dspy_prod")


def _that_travel(callbacks: Sequence[Any]) -> list[Any]:
    """The callbacks that can go to another process. MLflow's and ours are made there anew."""
    kept = []
    for each in callbacks:
        if type(each).__module__.partition(".")[0] in ("mlflow", "dspy_prod"):
            continue
        try:
            Parcel({"callback": each})
        except ConfigError as error:
            _log.warning("The callback %s hears nothing of an evaluation on Ray: %s", type(each).__name__, error)
        else:
            kept.append(each)
    return kept

"""`dspy-prod experiment run`: a controller in a process of its own, until the experiment or a signal ends it."""

from __future__ import annotations

import json
import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Any

from dspy_prod.cli.printing import show
from dspy_prod.errors import StoreUnavailableError
from dspy_prod.registry.errors import RegistryUnavailableError

if TYPE_CHECKING:
    from dspy_prod.experiments.opened import Opened

_log = logging.getLogger("dspy_prod")


def running(opened: Opened, every: float, as_json: bool, line: Callable[[Opened], str]) -> int:
    """Look until it is over, and print how it stands whenever that changes; returns the exit code."""
    from dspy_prod.experiments.attending import attend, checked

    every = checked(every)
    check_registry(opened)
    told: list[object] = []

    def looked() -> None:
        try:
            trial = opened.trials.trial(opened.name)
            now = None if trial is None else trial.revision
            if trial is None or told == [now]:
                return
            if as_json:
                print(json.dumps(opened.to_dict()), flush=True)
            else:
                show(line(opened))
            told[:] = [now]
        except StoreUnavailableError:
            return  # the look itself has said so, and the next one tells

    with _ending() as stop:
        over = attend(opened, every, stop, looked)
    if not as_json:
        show(f"{opened.name}: {'it is over.' if over else 'no longer looked at from here.'}")
    return 0


@contextmanager
def tracking_into(opened: Opened, experiment: str | None, uri: str | None) -> Iterator[None]:
    """While this lasts, the runs of the variants are written to MLflow; what is told by then is waited for at the end.

    Args:
        opened: whose variants. experiment: MLflow's; None: nothing is written.
        uri: of MLflow; default: `$MLFLOW_TRACKING_URI`, else where the runs of the variants are already.

    Raises:
        ConfigError: MLflow is not installed, or the URI is none that it writes to.
    """
    if experiment is None:
        yield
        return
    from dspy_prod import tracking
    from dspy_prod.experiments.variants_in_mlflow import tracked

    known = tracked(opened.trials.decisions(opened.name)) or {}
    end = tracking.enable(experiment, uri or os.environ.get("MLFLOW_TRACKING_URI") or known.get("uri"))
    try:
        yield
    finally:
        end()


def check_registry(opened: Opened) -> None:
    """Refuse an MLflow store that has not the experiment's versions. One that is down keeps nobody from looking.

    Raises:
        UnknownVersionError: names the version, and the remedy.
    """
    if opened.aliases is not None:
        try:
            opened.aliases.check()
        except RegistryUnavailableError as error:
            _log.warning("Aliases of the experiment %s are moved when MLflow is back: %s", opened.name, error)


@contextmanager
def _ending() -> Iterator[threading.Event]:
    """An event that SIGTERM and Ctrl-C set. A second one ends the process as it always does."""
    stop = threading.Event()
    before: dict[signal.Signals, Any] = {}

    def end(number: int, _: FrameType | None) -> None:
        stop.set()
        for each, handler in before.items():
            signal.signal(each, handler)

    for each in (signal.SIGTERM, signal.SIGINT):
        before[each] = signal.signal(each, end)
    try:
        yield stop
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)

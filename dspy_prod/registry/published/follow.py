"""Following an alias: a `Production` runs what `triage@production` points to, and picks up a promotion by itself.

A thread in the background looks at MLflow every `refresh` seconds, and whoever moves the alias in this very process
looks at once (`look_at`). When the alias has moved, a fresh copy of the program gets the published state and takes the
place of the `Production`'s program in one assignment. A call takes the program once, so it runs on one version from
begin to end, and calls in flight finish on theirs. No call waits for MLflow; only the constructor does, for some
seconds at most.

- While the version cannot be had (MLflow is down and no copy is at hand; the alias does not exist yet; the version was
  published from code with other predictors or fields, or tampered with), the last good program goes on, at first the
  copy of an earlier process, else the one from the code.
- A `Production` that is being compiled or evaluated stays at its version until that ends. Its copies, which optimizers
  work on, do not follow at all.
- In a forked child the thread starts again with the first call.

Events: `program_changed`, `registry_stale` (MLflow is down), `signature_refused`, `follow_failed`.
"""

from __future__ import annotations

import datetime as dt
import logging
import random
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, Final

from dspy_prod.errors import ConfigError
from dspy_prod.registry.errors import RegistryError, RegistryUnavailableError, SignatureMismatchError
from dspy_prod.registry.names import Reference
from dspy_prod.registry.published import copies
from dspy_prod.registry.published.copies import Release
from dspy_prod.registry.published.loading import obtain, put_into, renewed
from dspy_prod.registry.server import server_at
from dspy_prod.runtime.forking import reset_after_fork
from dspy_prod.runtime.threads import begin
from dspy_prod.telemetry.events import BUS

SHORTEST: Final = 0.05
JITTER: Final = 0.1
"""Share by which a pause is randomly changed, so that many processes do not ask at once."""

CLOSING: Final = 1.0
"""Seconds that `close` waits for a look that is under way."""

_log = logging.getLogger("dspy_prod")
_FOLLOWERS: Final[dict[weakref.ref[Follower], None]] = {}


class Follower:
    """Keeps the program of a `Production` at the version that a reference means.

    Args:
        production: whose `program` is replaced; it is not kept alive.
        reference: `"triage@production"`.
        refresh: seconds between two looks.

    Raises:
        ConfigError: the reference or `refresh` is impossible, or MLflow is not installed.
    """

    def __init__(self, production: Any, reference: str, refresh: float | dt.timedelta) -> None:
        seconds = refresh.total_seconds() if isinstance(refresh, dt.timedelta) else float(refresh)
        if not SHORTEST <= seconds < threading.TIMEOUT_MAX:
            raise ConfigError(f"refresh={refresh!r} is a number of seconds, at least {SHORTEST}")
        self.reference = Reference.of(reference)
        self._refresh = seconds
        self._server = server_at()
        self._name = production.name
        self._production = weakref.ref(production)
        self._template = production.program.deepcopy()
        self._callbacks = {path: module.callbacks for path, module in _modules(production.program)}
        self._release: Release | None = None
        self._trouble: tuple[str, str] | None = None
        self._held = 0
        self._closed = False
        self._lock = threading.Lock()
        self._looking = threading.RLock()  # one after the other, so that what was seen last is what runs
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        reset_after_fork(self)
        _FOLLOWERS[weakref.ref(self, lambda gone: _FOLLOWERS.pop(gone, None))] = None
        with self._looking:
            self._look(first=True)
        self.keep_going()

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None  # a copy does not follow

    def __reduce__(self) -> tuple[Any, tuple[()]]:
        return type(None), ()

    def keep_going(self) -> None:
        """Start the thread unless it runs: at first, and in a forked child."""
        if self._thread is not None or self._closed:
            return
        with self._lock:
            if self._thread is None:
                self._thread = begin("dspy_prod-follow", _run, weakref.ref(self), self._stop, self._refresh)
                if self._thread is not None:  # else the next call tries again
                    weakref.finalize(self, self._stop.set)  # when it is forgotten, and when the interpreter ends

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep the program what it is meanwhile."""
        with self._lock:
            self._held += 1
        try:
            yield
        finally:
            with self._lock:
                self._held -= 1

    def close(self) -> None:
        """Stop following. The program stays what it is."""
        self._closed = True
        self._stop.set()
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join(CLOSING)

    def look(self) -> None:
        """Look at MLflow once, and take over what is new there. Never raises an `Exception`."""
        try:
            with self._looking:
                if not self._held and not self._closed:
                    self._look()
        except Exception:
            _log.exception("Following %s failed; the program stays as it is", self.reference)

    def _look(self, first: bool = False) -> None:
        try:
            release = obtain(self._server, self.reference, 0.0) if first else renewed(self._server, self.reference)
            if self._release is None or release.version != self._release.version:
                self._take(release)
        except SignatureMismatchError as error:
            self._troubled("signature_refused", str(error), predictor=error.predictor, field=error.field)
        except RegistryUnavailableError as error:
            self._troubled("registry_stale", str(error), same="MLflow is down")
        except (RegistryError, ConfigError) as error:
            if first and type(error) is RegistryError:  # what is in MLflow was tampered with
                self._take_copy()
            self._troubled("follow_failed", str(error))
        else:
            self._trouble = None

    def _take_copy(self) -> None:
        """Begin with the last good copy of an earlier process, where there is one that can be used."""
        copy = copies.saved((self._server.uri, str(self.reference)), None)
        if copy is not None:
            with suppress(RegistryError, ConfigError):
                self._take(copy.release)

    def _take(self, release: Release) -> None:
        production = self._production()
        if production is None:
            return
        fresh = self._template.deepcopy()
        for path, module in _modules(fresh):
            module.callbacks = self._callbacks.get(path, [])
        lms = {name: predictor.lm for name, predictor in production.program.named_predictors()}
        for name, predictor in fresh.named_predictors():
            predictor.lm = lms.get(name, predictor.lm)  # the same object, not a copy, also after `set_lm`
        put_into(fresh, release)
        with self._lock:
            if self._held or self._closed:
                return
            before, self._release = self._release, release
            production.program = fresh
        _log.info("%s runs %s now", self._name, release)
        BUS.emit(
            "program_changed", time.time(), program=self._name, reference=str(self.reference), version=str(release),
            previous=None if before is None else str(before),
        )  # fmt: skip

    def _troubled(self, event: str, text: str, same: str | None = None, **data: Any) -> None:
        """Tell of trouble once, not with each look."""
        trouble = (event, same or text)
        if trouble == self._trouble:
            return
        self._trouble = trouble
        serving = None if self._release is None else str(self._release)
        _log.warning("%s cannot follow %s and runs %s: %s", self._name, self.reference, serving or "as in code", text)
        BUS.emit(
            event, time.time(), program=self._name, reference=str(self.reference), version=serving, error=text, **data
        )

    def _after_fork(self) -> None:
        self._lock = threading.Lock()
        self._looking = threading.RLock()
        self._stop = threading.Event()
        self._thread = None
        self._held = 0


def look_at(reference: str) -> None:
    """Have whoever follows an alias look now: this process has just moved it."""
    for known in list(_FOLLOWERS):
        follower = known()
        if follower is not None and str(follower.reference) == reference:
            follower.look()


def _modules(program: Any) -> list[tuple[str, Any]]:
    return [(path, module) for path, module in program.named_sub_modules() if hasattr(module, "callbacks")]


def _run(follower: weakref.ref[Follower], stop: threading.Event, refresh: float) -> None:
    """The thread. It keeps the follower alive only while it looks."""
    while not stop.wait(refresh * random.uniform(1 - JITTER, 1.0)):
        one = follower()
        if one is None:
            return
        one.look()
        del one

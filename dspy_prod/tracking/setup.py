"""Turning tracking on and off, and asking how it goes."""

from __future__ import annotations

import atexit
import logging
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from math import inf
from multiprocessing import parent_process
from multiprocessing.util import Finalize, register_after_fork
from typing import Any, Final, Literal

from dspy_prod.compat.mlflow import absolute
from dspy_prod.errors import ConfigError
from dspy_prod.privacy.names import bare_url
from dspy_prod.privacy.redactor import Redactor
from dspy_prod.privacy.redactor import install as install_redactor
from dspy_prod.privacy.unshown import unshown
from dspy_prod.runtime.forking import RegistryLock, Stage, reset_after_fork
from dspy_prod.runtime.reaper import REAPER
from dspy_prod.telemetry.tap import TAP, TrackingHealth
from dspy_prod.tracking.bridge import install as install_bridge
from dspy_prod.tracking.content import Content
from dspy_prod.tracking.courier import Courier
from dspy_prod.tracking.delivery import STALLED
from dspy_prod.tracking.nodes import Recorder
from dspy_prod.tracking.process import Exporter
from dspy_prod.tracking.sampling import Sampler
from dspy_prod.tracking.tally import Tally
from dspy_prod.tracking.traces import Traces

DEFAULT_URI: Final = "sqlite:///mlflow.db"
REQUEST_TIMEOUT: Final = 5
"""Seconds the exporter process waits for MLflow's server, unless MLFLOW_HTTP_REQUEST_TIMEOUT says otherwise."""

_SCHEMES: Final = ("sqlite://", "http://", "https://", "postgresql", "mysql", "mssql", "databricks")
_lock: Final = RegistryLock()
_log: Final = logging.getLogger("dspy_prod")


@dataclass(frozen=True, eq=False)
class _Tracking:
    """What is on."""

    uri: str
    experiment: str
    courier: Courier
    exit_timeout: float
    content: Literal["full", "redacted", "off"] = "redacted"
    rest: Mapping[str, Any] = field(default_factory=dict)  # what else was given
    undo: list[Callable[[], None]] = field(default_factory=list)

    def __post_init__(self) -> None:
        reset_after_fork(self, Stage.THREADS)
        register_after_fork(self, _end_with_worker)  # later than the above: finalizers of before are forgotten between
        if parent_process() is not None:
            _end_with_worker()

    def _after_fork(self) -> None:
        if _active is not self:
            return  # switched off: somebody still has its `undo`, and nothing of it may start again
        self.courier.after_fork()


def _end_with_worker(_: _Tracking | None = None) -> None:
    """A process that `multiprocessing` has forked leaves without `atexit`, but not without its finalizers."""
    Finalize(None, disable, exitpriority=10)


_active: _Tracking | None = None


def enable(
    experiment_name: str | None = None,
    tracking_uri: str | None = None,
    sample: float = 1.0,
    content: Literal["full", "redacted", "off"] = "redacted",
    *,
    redact: Mapping[str, Any] | Redactor | None = None,
    autolog: bool = False,
    queue_size: int = 20_000,
    exit_timeout: float = 30.0,
) -> Callable[[], None]:
    """Write a trace with the cost of every attempt to MLflow, for every call of `dspy_prod.LM` and `Production`.

    Nothing on a call's path waits for MLflow: calls post what they did to a queue, a thread renders and redacts it, and
    a process of its own writes it. MLflow need not be imported here. With `mlflow.dspy.autolog()`, before or by
    `autolog=True`, attempts and costs appear inside the traces that MLflow records. Calling it again replaces the
    settings.

    Args:
        experiment_name: MLflow experiment, made when there is none; default: `$MLFLOW_EXPERIMENT_NAME`, else "Default".
        tracking_uri: `"sqlite:///mlflow.db"`, `"http://host:5000"`, ...; default: `$MLFLOW_TRACKING_URI`, else
            `sqlite:///mlflow.db` in the working directory.
        sample: share of the traces that are kept, 0 to 1. Those with an error, a retry or a fallback, and those dearer
            than 99 % of the recent ones, are always kept.
        content: `"redacted"`: prompts and answers without secrets and personal data; `"full"`; `"off"`: none. Unless
            it is `"full"`, users, tenants, sessions and tags that are personal data become pseudonyms everywhere, in
            the ledger and logs too.
        redact: further patterns `{"name": regex}`, or a `Redactor` in place of the built-in one.
        autolog: also call `mlflow.dspy.autolog()`, which records the modules around each LM call.
        queue_size: traces that may wait for MLflow; more are turned away and counted as lost.
        exit_timeout: seconds the end of the program, or `LM.close`, may wait for what is left; it gives up sooner when
            a server says nothing, or MLflow cannot be reached. A program that is killed waits for nothing: what it
            has handed over is still written, and how many traces are missing is told to its `stderr`.

    Returns:
        A function that turns tracking off again, as `disable`.

    Raises:
        ConfigError: an impossible argument; the message names it and the remedy. An MLflow that cannot be reached is
            no error: see `status()`.

    Example:
        ```python
        tracking.enable("support", tracking_uri="sqlite:///mlflow.db", sample=0.1)
        ```
    """
    global _active
    tracking_uri = unshown(tracking_uri)
    check(sample, content, redact=redact, queue_size=queue_size, exit_timeout=exit_timeout)
    uri = _checked(unshown(tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or DEFAULT_URI))
    experiment = experiment_name or os.environ.get("MLFLOW_EXPERIMENT_NAME") or "Default"
    redactor = redact if isinstance(redact, Redactor) else Redactor(patterns=dict(redact or {}))
    with _lock:
        _disable()
        if autolog:
            import mlflow.dspy

            mlflow.dspy.autolog()
        traces = Traces(Content(content, redactor), Sampler(sample), bridged=False)
        tally = Tally()
        exporter = partial(_exporter, uri, experiment, exit_timeout, tally)
        silence = inf if uri.startswith("sqlite:") else STALLED  # a file may be slow, but is not gone
        courier = Courier(traces, exporter, int(queue_size), tally, silence)
        rest = {"sample": sample, "redact": None if content == "full" else redactor, "queue_size": int(queue_size)}
        tracking = _Tracking(uri, experiment, courier, float(exit_timeout), content, rest)
        if "mlflow" in sys.modules:  # the program has imported it
            remove = install_bridge(courier, uri)
            if remove is not None:
                traces.bridged = True
                tracking.undo.append(remove)
        if content != "full":
            tracking.undo.append(install_redactor(redactor))
        courier.begin()
        TAP.active = Recorder(courier, float(exit_timeout), uri)
        _active = tracking

    def disable_this() -> None:
        with _lock:
            if _active is tracking:
                _disable()

    return disable_this


def check(
    sample: float = 1.0,
    content: str = "redacted",
    *,
    redact: Mapping[str, Any] | Redactor | None = None,
    queue_size: int = 20_000,
    exit_timeout: float = 30.0,
    **_: Any,
) -> None:
    """Look at the arguments of `enable`.

    Raises:
        ConfigError: see `enable`.
    """
    if not isinstance(sample, (int, float)) or isinstance(sample, bool) or not 0 <= sample <= 1:
        raise ConfigError(f"tracking.enable(sample={sample!r}): a share from 0 to 1")
    if content not in ("full", "redacted", "off"):
        raise ConfigError(f"tracking.enable(content={content!r}): use 'full', 'redacted' or 'off'")
    for name, number in (("queue_size", queue_size), ("exit_timeout", exit_timeout)):
        if not isinstance(number, (int, float)) or isinstance(number, bool) or number <= 0:
            raise ConfigError(f"tracking.enable({name}={number!r}): a positive number")
    if find_spec("mlflow") is None:
        raise ConfigError("tracking.enable() needs MLflow: pip install 'dspy-prod[mlflow]'")
    if redact is not None and content == "full":
        raise ConfigError("tracking.enable(redact=...): has no effect with content='full'; use content='redacted'")


def disable() -> None:
    """Turn tracking off, once what has ended is delivered, within the exit timeout.

    Example:
        ```python
        tracking.disable()  # what waits is written first, in bounded time
        ```
    """
    with _lock:
        _disable()


def flush_traces(timeout: float) -> bool:
    """Wait until every trace that has ended is in MLflow, or known to be lost; False when that took longer (see
    `waiting.flush`), or tracking is off."""
    tracking = _active
    if tracking is None:
        return False
    REAPER.flush(timeout)
    return tracking.courier.flush(timeout)


def courier() -> Courier | None:
    """What ships, None when tracking is off."""
    tracking = _active
    return None if tracking is None else tracking.courier


def status() -> TrackingHealth | None:
    """How it goes, None when tracking is off. Never waits.

    Example:
        ```python
        print(tracking.status())
        ```
    """
    tracking = _active
    if tracking is None:
        return None
    return tracking.courier.health(bare_url(tracking.uri), tracking.experiment)


def given(autolog: bool = False) -> dict[str, Any] | None:
    """The arguments by which `enable` does the same in another process, None when tracking is off.

    The URI is without a password, which the environment of that process has to know.
    """
    tracking = _active
    if tracking is None:
        return None
    where = {"tracking_uri": bare_url(tracking.uri), "experiment_name": tracking.experiment}
    how = {"content": tracking.content, "exit_timeout": tracking.exit_timeout, "autolog": autolog}
    return {**where, **how, **tracking.rest}


@dataclass(frozen=True)
class Place:
    """Where tracking writes, and how much of what is said.

    Attributes:
        uri: MLflow's; may hold a password. experiment: its name. content: see `enable`.
        exit_timeout: seconds the end of the program may wait for what is left.
    """

    uri: str
    experiment: str
    content: Literal["full", "redacted", "off"] = "redacted"
    exit_timeout: float = 30.0


def place(tracking_uri: str | None = None, experiment: str | None = None) -> Place | None:
    """Where something else than traces is to be written: as given, else where tracking writes; None when it is off.

    Raises:
        ConfigError: the URI is none that MLflow writes to.
    """
    tracking = _active
    uri = tracking.uri if tracking_uri is None and tracking is not None else tracking_uri
    if uri is None:
        return None
    if tracking is None:
        return Place(_checked(unshown(uri)), experiment or os.environ.get("MLFLOW_EXPERIMENT_NAME") or "Default")
    return Place(_checked(unshown(uri)), experiment or tracking.experiment, tracking.content, tracking.exit_timeout)


def _disable() -> None:
    global _active
    tracking, _active = _active, None
    if tracking is None:
        return
    TAP.active = None
    REAPER.flush(2.0)
    for undo in reversed(tracking.undo):
        undo()
    messages = tracking.courier.messages
    before = messages.lost
    lost = tracking.courier.close(tracking.exit_timeout)
    place, why = bare_url(tracking.uri), tracking.courier.delivery.failing or "not in time"
    if lost:
        _log.warning("%d traces did not reach MLflow at %s (%s). The ledger has their costs", lost, place, why)
    if messages.lost > before:
        _log.warning("%d messages about runs, or feedback, did not reach MLflow at %s (%s)",
                     messages.lost - before, place, messages.refusal)  # fmt: skip


def _checked(uri: str) -> str:
    """The URI, `absolute`.

    Raises:
        ConfigError: a folder, which MLflow no longer writes to, or an unknown scheme.
    """
    if not uri.startswith(_SCHEMES):
        raise ConfigError(
            f"tracking_uri={bare_url(uri)!r}: MLflow writes traces to a database or a server, no longer to a folder; "
            "use 'sqlite:///mlflow.db', or 'http://host:5000'"
        )
    return unshown(absolute(uri))


def _exporter(uri: str, experiment: str, patience: float, tally: Tally, heard: Callable[..., None]) -> Exporter:
    """Start an exporter process."""
    config = {"uri": uri, "experiment": experiment, "patience": patience}
    return Exporter(config, heard, environment_of(uri), tally.shared())


def environment_of(uri: str) -> dict[str, str]:
    """The variables of a process that writes to MLflow at this URI, on top of this one's."""
    return {
        "MLFLOW_TRACKING_URI": uri,
        "MLFLOW_HTTP_REQUEST_TIMEOUT": os.environ.get("MLFLOW_HTTP_REQUEST_TIMEOUT", str(REQUEST_TIMEOUT)),
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",  # the exporter tries again by itself
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "GIT_PYTHON_REFRESH": "quiet",
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",  # MLflow may import it; offline, fetching prices can hang
    }


atexit.register(disable)

__all__ = ["TrackingHealth", "disable", "enable", "status"]

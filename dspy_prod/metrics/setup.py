"""Metrics on and off: `dspy_prod.metrics.enable()`."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Final

from dspy_prod.errors import ConfigError
from dspy_prod.metrics.instruments import RUNNING, Instruments
from dspy_prod.runtime.forking import RegistryLock

if TYPE_CHECKING:
    from opentelemetry.metrics import MeterProvider

REMEDY: Final = "pip install 'dspy-prod[metrics]'"
MOST_VALUES: Final = 100

_LOCK: Final = RegistryLock()
_DEFAULT: Final[dict[str, Instruments]] = {}
"""Those at the global provider: OpenTelemetry has a stand-in for it until it is set."""
_MADE: Final[weakref.WeakKeyDictionary[Any, Instruments]] = weakref.WeakKeyDictionary()


def enable(
    meter_provider: MeterProvider | None = None, *, attributes: Iterable[str] = (), most_values: int = MOST_VALUES
) -> Callable[[], None]:
    """Show what happens to calls, and what they cost, as metrics of OpenTelemetry.

        import dspy_prod
        from opentelemetry.sdk.metrics import MeterProvider
        from opentelemetry.sdk.metrics.export import ConsoleMetricExporter, PeriodicExportingMetricReader

        provider = MeterProvider([PeriodicExportingMetricReader(ConsoleMetricExporter())])
        dspy_prod.metrics.enable(provider)

    The duration and the tokens of requests are `gen_ai.client.operation.duration` and `gen_ai.client.token.usage`, as
    OpenTelemetry's conventions have them; `dspy_prod.metrics.catalogue.CATALOGUE` lists all others. Money is in USD;
    an unknown cost is in no sum, but counted in `dspy_prod.cost.unknown`.

    A call puts its record into a queue, which costs it about a microsecond; it never waits for a metric and never fails
    by one. Whoever collects waits at most 0.25 s for a slow store, and then gets what it answered last.

    Call it in each worker process, after it was forked. Calling it again for the same provider changes nothing.

    Args:
        meter_provider: where the instruments are made; default: OpenTelemetry's global one.
        attributes: what else to tell the calls' metrics apart by: `"program"`, `"experiment"`, `"variant"`,
            `"prompt_version"`, `"run"`, `"priority"`, `"tag:<key>"`, and `"tenant"`, `"user"` or `"session"`, which may
            be personal data. Each multiplies the number of time series.
        most_values: values of each attribute that are told apart; all further ones are `"(other)"`.

    Returns:
        A function that ends it.

    Raises:
        ConfigError: OpenTelemetry's API is missing; an attribute that there is not; the provider has metrics with other
            attributes already.

    Example:
        ```python
        from opentelemetry.sdk.metrics import MeterProvider

        stop = metrics.enable(MeterProvider(), attributes=["program"])
        stop()
        ```
    """
    api: Any
    try:
        from opentelemetry import metrics as api
    except ImportError as error:
        raise ConfigError(f"dspy_prod.metrics needs opentelemetry-api: {REMEDY}") from error
    provider = api.get_meter_provider() if meter_provider is None else meter_provider
    if not callable(getattr(provider, "get_meter", None)):
        kind = type(provider).__name__
        raise ConfigError(f"enable(meter_provider=...): expected an OpenTelemetry MeterProvider, got {kind}")
    asked = checked(attributes, most_values)
    with _LOCK:
        made = _DEFAULT.get("made") if meter_provider is None else _MADE.get(provider)
        if made is None:
            made = _MADE[provider] = Instruments(provider, *asked)
            if meter_provider is None:
                _DEFAULT["made"] = made
        elif made.asked != asked:
            raise ConfigError(
                f"This MeterProvider has metrics with attributes={made.asked[0]!r}, most_values={made.asked[1]} "
                "already, and OpenTelemetry removes none: use the same, or another MeterProvider"
            )
        made.start()
    return made.stop


def disable() -> None:
    """Count no more, for whatever provider, server or application. What was counted is still told.

    Example:
        ```python
        metrics.enable()
        metrics.disable()
        ```
    """
    with _LOCK:
        for made in list(RUNNING):
            made.stop()


def checked(attributes: Iterable[str], most_values: int) -> tuple[tuple[str, ...], int]:
    if isinstance(attributes, str):
        raise ConfigError(f"attributes={attributes!r}: use a list of names, such as [{attributes!r}]")
    if isinstance(most_values, bool) or not isinstance(most_values, int) or most_values < 1:
        raise ConfigError(f"most_values={most_values!r} must be a positive integer")
    return tuple(dict.fromkeys(attributes)), most_values

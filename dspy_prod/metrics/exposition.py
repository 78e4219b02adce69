"""From OpenTelemetry's metrics to what Prometheus reads: names, types, units, buckets."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, Final

from dspy_prod.metrics.instruments import Instruments
from dspy_prod.runtime.forking import Stage, reset_after_fork

if TYPE_CHECKING:
    from prometheus_client import Metric

_UNFIT: Final = re.compile(r"[^a-zA-Z0-9_]")
_UNITS: Final = {"s": "seconds", "By": "bytes", "USD": "usd"}


def name_of(name: str, unit: str) -> str:
    """What Prometheus calls a metric; of a counter without its `_total`.

    `gen_ai.client.operation.duration` in `s` is `gen_ai_client_operation_duration_seconds`. A unit in braces says what
    is counted, and is left out.
    """
    found = _UNFIT.sub("_", name)
    suffix = _UNITS.get(unit, "")
    return f"{found}_{suffix}" if suffix and not found.endswith(f"_{suffix}") else found


class Collected:
    """A collector of `prometheus_client`, with a provider of meters of its own. In a forked child it begins anew.

    Args:
        attributes, most: see `enable`.

    Raises:
        ConfigError: an attribute that there is not.
    """

    def __init__(self, attributes: tuple[str, ...], most: int) -> None:
        self._asked = (attributes, most)
        self._begin()
        self.instruments.start()
        reset_after_fork(self, Stage.THREADS)

    def _begin(self) -> None:
        from opentelemetry.sdk.metrics import AlwaysOffExemplarFilter, MeterProvider
        from opentelemetry.sdk.metrics.export import InMemoryMetricReader
        from opentelemetry.sdk.resources import Resource

        self._lock = threading.Lock()
        self._reader = InMemoryMetricReader()
        provider = MeterProvider(
            [self._reader], Resource({}), shutdown_on_exit=False, exemplar_filter=AlwaysOffExemplarFilter()
        )
        self._provider = provider
        self.instruments = Instruments(provider, *self._asked)

    def describe(self) -> Iterable[Metric]:
        """Nothing: whoever registers it need not collect."""
        return ()

    def collect(self) -> Iterator[Metric]:
        """Everything as it is now."""
        with self._lock:  # of two scrapes at once one would get the other's
            data = self._reader.get_metrics_data()
        for resource in () if data is None else data.resource_metrics:
            for scope in resource.scope_metrics:
                for metric in scope.metrics:
                    yield _family(metric)

    def close(self) -> None:
        """Count no more."""
        self.instruments.stop()
        self._provider.shutdown()

    def _after_fork(self) -> None:
        """What the parent has counted is the parent's, and so are locks that its threads hold."""
        on = self.instruments.on
        self.instruments.stop()
        self._begin()
        if on:
            self.instruments.start()


def _family(metric: Any) -> Metric:
    from opentelemetry.sdk.metrics.export import Histogram, Sum
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

    name, data = name_of(metric.name, metric.unit or ""), metric.data
    points = list(data.data_points)
    keys = sorted({key for point in points for key in point.attributes})
    labels = [_UNFIT.sub("_", key) for key in keys]
    family: Any
    if isinstance(data, Histogram):
        family = HistogramMetricFamily(name, metric.description, labels=labels)
        for point in points:
            family.add_metric(_values(point, keys), _buckets(point), point.sum)
        return family  # type: ignore[no-any-return]
    family = (CounterMetricFamily if isinstance(data, Sum) and data.is_monotonic else GaugeMetricFamily)(
        name, metric.description, labels=labels
    )
    for point in points:
        family.add_metric(_values(point, keys), point.value)
    return family  # type: ignore[no-any-return]


def _values(point: Any, keys: list[str]) -> list[str]:
    return [str(point.attributes.get(key, "")) for key in keys]


def _buckets(point: Any) -> list[tuple[str, float]]:
    """(upper bound, how many are not above it); OpenTelemetry counts each bucket by itself."""
    from prometheus_client.utils import floatToGoString

    written: Any = floatToGoString
    found, sum_ = [], 0
    for bound, count in zip((*point.explicit_bounds, float("inf")), point.bucket_counts, strict=True):
        sum_ += count
        found.append((written(bound), sum_))
    return found

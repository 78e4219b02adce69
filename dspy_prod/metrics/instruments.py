"""The metrics as OpenTelemetry's instruments.

Counters and gauges are observable: the sums are ours, exact, and read when somebody collects. Histograms are recorded
when a record is taken out of the inbox, which is never on the thread of a call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, Final

from dspy_prod.metrics import catalogue
from dspy_prod.metrics.catalogue import CATALOGUE
from dspy_prod.metrics.inbox import Inbox
from dspy_prod.metrics.standing import Gauge, Standing
from dspy_prod.metrics.sums import Attributes, Sums
from dspy_prod.telemetry.events import BUS

if TYPE_CHECKING:
    from opentelemetry.metrics import CallbackOptions, MeterProvider, Observation

_AT_ONCE: Final = frozenset({
    catalogue.BREAKER, catalogue.ENTRIES, catalogue.TRACES_WAITING, catalogue.TRACES_LOST, catalogue.AGE,
})  # fmt: skip
"""Gauges that no store has to be asked for."""


class Instruments:
    """All metrics at one provider of meters, for as long as it lives: OpenTelemetry removes no instrument.

    Args:
        provider: where they are made.
        attributes: see `enable`.
        most: see `enable`.

    Raises:
        ConfigError: an attribute that there is not.
    """

    def __init__(self, provider: MeterProvider, attributes: tuple[str, ...], most: int) -> None:
        self.sums = Sums(attributes, most, self._observe)
        self.inbox = Inbox(self.sums.take)
        self.standing = Standing(self.sums.model)
        self.asked = (attributes, most)
        self._listening: tuple[Callable[[], None], ...] = ()
        self._histograms: dict[str, Any] = {}
        self._make(provider)

    def _make(self, provider: MeterProvider) -> None:
        meter = provider.get_meter("dspy_prod")
        for name, metric in CATALOGUE.items():
            if metric.shape == "histogram":
                self._histograms[name] = meter.create_histogram(
                    name, metric.unit, metric.meaning, explicit_bucket_boundaries_advisory=metric.buckets
                )
            elif metric.shape == "counter":
                meter.create_observable_counter(name, [self._counter(name)], metric.unit, metric.meaning)
            else:
                meter.create_observable_gauge(name, [self._gauge(name)], metric.unit, metric.meaning)

    @property
    def on(self) -> bool:
        """Whether it counts."""
        return bool(self._listening)

    def start(self) -> None:
        """Count from now on."""
        if not self._listening:
            put = self.inbox.put
            self._listening = (BUS.measure(put), BUS.add(put, calls=False))
            RUNNING.append(self)

    def stop(self) -> None:
        """Count no more. What was counted is still told."""
        listening, self._listening = self._listening, ()
        for remove in listening:
            remove()
        if listening:
            RUNNING.remove(self)

    def _observe(self, name: str, value: float, attributes: Attributes) -> None:
        self._histograms[name].record(value, dict(attributes))

    def _counter(self, name: str) -> Callable[[CallbackOptions], Iterable[Observation]]:
        def read(_: CallbackOptions) -> Iterable[Observation]:
            inbox, sums = self.inbox, self.sums
            inbox.empty(name)
            if name == catalogue.LOST:
                told: list[tuple[float, Attributes]] = [(inbox.lost, ())]
            else:
                with inbox.taking:
                    if name == catalogue.MISSES and self.on and (misses := self.standing.misses()):
                        sums.add(name, misses)
                    told = list(sums.told(name))
            return _observed(told)

        return read

    def _gauge(self, name: str) -> Callable[[CallbackOptions], Iterable[Observation]]:
        def read(_: CallbackOptions) -> Iterable[Observation]:
            if not self.on:
                return []
            gauges: Iterable[Gauge] = self.standing.now() if name in _AT_ONCE else self.standing.found()
            return _observed((value, attributes) for each, value, attributes in gauges if each == name)

        return read


RUNNING: Final[list[Instruments]] = []
"""Those that count, at whatever provider."""


def _observed(told: Iterable[tuple[float, Attributes]]) -> Iterator[Observation]:
    from opentelemetry.metrics import Observation

    for value, attributes in told:
        yield Observation(value, dict(attributes))

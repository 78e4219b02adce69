"""What became of a unit: `exp.record(...)`."""

from __future__ import annotations

import sys
from collections.abc import Mapping

from dspy_prod.errors import ConfigError
from dspy_prod.experiments.declaration import BUILT_IN, source_of
from dspy_prod.experiments.inside import Inside
from dspy_prod.experiments.traced import assessed, shown_as
from dspy_prod.privacy.redactor import claimed
from dspy_prod.stores.trials import Outcome


class Recording(Inside):
    """The part of an `Experiment` that is told what became of units."""

    def record(
        self,
        unit: str | None = None,
        *,
        trace: str | None = None,
        at: float | None = None,
        id: str | None = None,
        **values: float,
    ) -> None:
        """Tell what became of a unit, or of one call of it: now, or as long after as the metric's window is.

        Of a unit it never waits for the store. Of a trace it reads the ledger, unless the call was made here lately;
        and while tracking is on, the trace shows it in MLflow as feedback: a boolean, or an `int` of a score between 0
        and 1, as right or wrong, else a number.

        Args:
            unit: as in `call_context`. trace: or the id of the trace of a call of it, as `call_report` and MLflow
                have it; each trace of a unit is a value of its own.
            at: when, in seconds since the epoch; default: now.
            id: what it is the value of, as an answer's; said again under the same id it is a correction, until the
                unit is counted: when the window is over, or without a window with the next look of a controller.
                Values of several ids are averaged, of a metric with a window; without one the first alone counts.
                None: the trace, else the unit as a whole, of which without a window the first value counts.
            values: by metric.

        Raises:
            ConfigError: no value is given; there is no such metric, calls or a judge tell it, or it cannot have this
                value; both a unit and a trace are named, or none; the ledger has no call of this experiment with that
                trace.
            StoreUnavailableError: the ledger cannot be read.

        Example:
            ```python
            report = dspy_prod.call_report(exp(message="I was charged twice."))
            exp.record(trace=report.trace_id, resolved=True)
            ```
        """
        if (unit is None) == (trace is None):
            raise ConfigError(f"Experiment({self.name!r}).record: say whose values they are, by a unit or by trace=")
        for what, given in (("unit", unit), ("trace", trace), ("id", id)):
            if given is not None and not isinstance(given, str):
                raise ConfigError(f"Experiment({self.name!r}).record: {what}={given!r} must be text, as str({given!r})")
        known = isinstance(at, int | float | None) and not isinstance(at, bool)
        if not known or (at is not None and not abs(at) <= sys.float_info.max):
            raise ConfigError(f"Experiment({self.name!r}).record: at={at!r} must be seconds since the epoch")
        checked = self._checked(values)
        if not checked:
            raise ConfigError(f"Experiment({self.name!r}).record: say what became of it, by metric, as resolved=1")
        if trace is not None:
            unit, id = self._works.traced.unit_of(trace, self._unit), id or trace
        assert unit is not None
        whose = claimed(unit) if trace is None else unit
        moment = self._works.trials.now() if at is None else at
        made = self._works.exposing.made
        for metric, value in checked.items():
            self._works.trials.outcome(Outcome(self.name, whose, metric, value, moment, id, made))
            if trace is not None:
                assessed(trace, metric, shown_as(values[metric], value), "code", None)

    def _checked(self, values: Mapping[str, float]) -> dict[str, float]:
        judged = self._works.sample.shares
        known = {each.name: each for each in self.metrics if source_of(each) is not None and each.name not in judged}
        checked = {}
        for metric, value in values.items():
            if metric not in known:
                own = ", which calls tell by themselves: leave it out or give it another name"
                own = own if metric in BUILT_IN else ", for its judge tells it" if metric in judged else ""
                raise ConfigError(
                    f"Experiment({self.name!r}).record: {metric!r} is no metric of it{own}; it has "
                    f"{', '.join(known) or 'none'}"
                )
            try:
                checked[metric] = known[metric].checked(value)
            except (TypeError, ValueError, OverflowError) as error:
                raise ConfigError(f"Experiment({self.name!r}).record: {metric}={value!r}: {error}") from None
        return checked

"""A call of a `Run` that outlasts an outage: it goes through its routes again instead of failing.

Only what tells that nobody answers is waited for, see `outcome.is_outage`: a request that is wrong, a key that is
refused or a model that does not exist would fail for ever, and a budget or a deadline is a decision.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Hashable
from dataclasses import dataclass
from math import inf
from typing import Any

from dspy.utils.exceptions import LMError

from dspy_prod.errors import CircuitOpenError, OutageError, RateLimitedError, RejectedError
from dspy_prod.pipeline.call import Call
from dspy_prod.pipeline.effects import Steps, Wait
from dspy_prod.pipeline.failures import Failures
from dspy_prod.pipeline.outcome import is_outage
from dspy_prod.pipeline.refusals import too_late
from dspy_prod.pipeline.routes import Route
from dspy_prod.policies.outage import ROUNDS, Outage, pause
from dspy_prod.policies.run import Run

Round = Callable[[Call, Failures], Steps]


def outlasting(call: Call, once: Round) -> Steps:
    """Go through the routes (`once`) until one answers, or until the run has had enough of an outage.

    Raises:
        OutageError: nothing answered for as long as the run is patient.
        DeadlineExceededError, RunStoppedError
    """
    runs = [run for run in call.context.guards if run.outages.patience > 0]
    monotonic = call.pipeline.clock.monotonic
    patience = _patience(runs)
    began, number, alone = inf, 0, 0
    heard = _heard(runs)
    while True:
        failures = Failures()
        try:
            return (yield from once(call, failures))
        except LMError as error:
            routes = _silent(failures, error) if runs and not call.visible else {}
            if not routes:
                raise
            now = monotonic()
            began, number = min(began, now), number + 1
            upstreams = {route.limit_key: route.model for route in routes}
            outages = [(run, run.outages.failed(upstreams, now)) for run in runs]
            run, outage = min(outages, key=lambda each: each[1].until)
            before, heard = heard, _heard(runs)
            others = any(heard.get(each, 0) > before.get(each, 0) for each in upstreams)
            itself = others and failures.upstream is not None
            alone += itself
            if others and not itself:  # the upstream is back, and the circuit lets nobody in but its probes
                number = 1
            if now >= outage.until:
                raise failures.mark(_gives_up(run, outage, call, error, now)) from error
            if alone >= ROUNDS or now - began >= patience:
                raise
            for each, found in outages:
                if found.news:
                    _tell(call, each, found, error)
            hints = [_hint(route, each) for route, each in routes.items()]
            until = min(now + pause(number, hints, call.pipeline.rand), outage.until, began + patience, call.deadline)
        lead = call.lead
        if lead is not None:
            lead.end()  # who belongs to no run does not wait for this one's outage
        yield from _wait(call, [] if itself else runs, upstreams, until)
        if call.late():
            raise failures.mark(too_late(call, f"during an outage of {', '.join(outage.models)}"))
        entry = None if lead is None else (yield from lead.wait(call))
        if entry is not None:
            return call.hit(entry)


def flight_of(key: Hashable, runs: tuple[Run, ...], scored: bool) -> Hashable:
    """The flight that calls of these runs share: with those that outlast an outage as long, and who does not with none
    of them. Nor does what is scored with what is not, which leaves a busy route early.
    """
    patience = _patience([run for run in runs if run.outages.patience > 0]) if runs else 0.0
    return (key, patience, scored) if patience or scored else key


def _patience(runs: list[Run]) -> float:
    return min([run.outages.patience for run in runs], default=0.0)


def answered(runs: tuple[Run, ...], call: Call, route: Route) -> None:
    """Tell the runs that a route has answered: whoever waits for it goes on."""
    now = call.pipeline.clock.monotonic()
    for run in runs:
        seconds = run.outages.answered(route.limit_key, now) if run.outages.patience else None
        if seconds is not None:
            wall = call.pipeline.clock.time()
            call.pipeline.bus.emit("outage_over", wall, run=run.name, model=route.model, seconds=seconds)


def _wait(call: Call, runs: list[Run], upstreams: dict[str, str], until: float) -> Generator[Wait, Any, None]:
    """Until then, or until somebody else of a run is answered. Stopping a run ends it too, see `stoppable`."""
    monotonic = call.pipeline.clock.monotonic
    started = monotonic()
    waiting = _Silences(runs, upstreams)
    try:
        yield Wait(waiting if runs else None, until)
    finally:
        now = monotonic()
        waiting.leave(now)
        call.waited += now - started


@dataclass(eq=False)
class _Silences:
    """Decided when one of the upstreams has answered a call of the run."""

    runs: list[Run]
    upstreams: dict[str, str]
    wake: Callable[[], None] | None = None

    def attach(self, wake: Callable[[], None]) -> bool:
        self.wake = wake
        lasts = True
        for run in self.runs:
            lasts = run.outages.enter(self.upstreams, self) and lasts
        return lasts

    def tell(self) -> None:
        if self.wake is not None:
            self.wake()

    def leave(self, now: float) -> None:
        for run in self.runs:
            run.outages.leave(self.upstreams, self, now)


def _silent(failures: Failures, raised: LMError) -> dict[Route, Exception]:
    """The routes that are silent, and what they said; none when something else is the matter.

    A fallback that a budget of its own keeps away says nothing of the others.
    """
    if isinstance(raised, RejectedError) and not isinstance(raised, (CircuitOpenError, RateLimitedError)):
        return {}
    said = failures.said
    if any(not is_outage(error) for error in said.values() if not isinstance(error, RejectedError)):
        return {}
    return {route: error for route, error in said.items() if is_outage(error)}


def _hint(route: Route, error: Exception) -> float | None:
    """Seconds until a route may be tried again, as far as it told.

    A circuit that probes already tells when its probes are written off: they will have answered long before.
    """
    if isinstance(error, CircuitOpenError) and route.breaker is not None and route.breaker.state != "open":
        return None
    return getattr(error, "retry_after", None)


def _heard(runs: list[Run]) -> dict[str, int]:
    return dict(runs[0].outages.answers) if runs else {}


def _tell(call: Call, run: Run, outage: Outage, error: LMError) -> None:
    pipeline = call.pipeline
    reason = error.reason if isinstance(error, RejectedError) else type(error).__name__
    pipeline.bus.emit(
        "outage_waiting", pipeline.clock.time(), run=run.name, models=list(outage.models), error=reason,
        patience=run.outages.patience,
    )  # fmt: skip


def _gives_up(run: Run, outage: Outage, call: Call, error: LMError, now: float) -> OutageError:
    seconds = now - outage.began
    models = ", ".join(outage.models)
    status = getattr(error, "status", None)
    said = type(error).__name__ if status is None else f"{type(error).__name__} {status}"
    return OutageError(
        f"Nothing has answered the run {run.name!r} for {seconds:.0f} s: {models} (lately {said}). No answer of the "
        "run is lost. Look at the upstream, then go on with the run; or be more patient, Run(outage=...)",
        model=call.request.model,
        run=run.name,
        models=outage.models,
        since=call.pipeline.clock.time() - seconds,
        seconds=seconds,
    )

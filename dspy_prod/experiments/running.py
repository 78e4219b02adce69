"""An experiment as it runs: start, look, decide, end."""

from __future__ import annotations

from typing import Any

from dspy_prod.errors import ConfigError
from dspy_prod.experiments.attending import EVERY, Attending
from dspy_prod.experiments.inside import Inside
from dspy_prod.experiments.offline import OfflineReport
from dspy_prod.experiments.opened import Opened, stage_of
from dspy_prod.experiments.operating import promote, remove, stop
from dspy_prod.experiments.scorecard import Scorecard
from dspy_prod.experiments.variants_in_mlflow import tracked


class Running(Inside):
    """The part of an `Experiment` that a person, or a controller, goes by."""

    @property
    def state(self) -> str:
        """`created`, `running`, `paused`, `stopped` or `decided`, as the store says now."""
        trial = self._works.standing.look()
        return "removed" if trial is None else trial.state

    @property
    def stage(self) -> str:
        """The stage in force here, as `"5 %"`."""
        return stage_of(self.rollout, self._works.exposing.stage)

    def start(self, *, gate: OfflineReport | None = None, auto: bool = False, every: float = EVERY) -> None:
        """Begin the rollout: its first stage holds from now on. Does nothing where it has begun.

        Args:
            gate: what `evaluate` returned: begin only if it passed. The audit keeps what it said.
            auto: have a thread of this process call `step()` until the experiment is decided or stopped. Any number of
                processes may: one looks at a time, and another goes on where one was killed.
            every: seconds between two of its looks.

        Raises:
            ConfigError: `every` is impossible; the gate did not pass, or is of other variants.
        """
        if gate is not None and not isinstance(gate, OfflineReport):
            raise ConfigError(
                f"Experiment({self.name!r}).start: gate={gate!r}: give what evaluate returned, as "
                "gate=exp.evaluate(devset, metric)"
            )
        if gate is not None:
            gate.refuse_unless_passed(self.name, {each.name: each.exact for each in self.variants.values()})
        if auto:
            self._attending = Attending(Opened(self._works.store, self.name, self._tracking_uri), every)
        self._put("start", None if gate is None else f"by hand; {gate.summary}")
        if self._attending is not None:
            self._attending.keep_going()

    def pause(self, reason: str | None = None) -> None:
        """Let nobody new into a candidate, and decide nothing, until `resume`. Who is in one stays."""
        self._put("pause", reason)
        self._works.opened.controller.tell()

    def resume(self, reason: str | None = None) -> None:
        """Go on after a pause."""
        self._put("resume", reason)
        self._works.opened.controller.tell()

    def stop(self, reason: str | None = None) -> None:
        """End it: everybody gets control, and the candidates' aliases its version. What was measured stays."""
        stop(self._works.opened, reason)
        self._works.standing.look()

    def promote(
        self, variant: str | None = None, *, force: bool = False, reason: str | None = None, by: str | None = None
    ) -> None:
        """Give a candidate to everybody, and its version control's alias. Arguments and errors as of
        `operating.promote`: without `force` only what the evidence says."""
        promote(self._works.opened, variant, force=force, reason=reason, by=by)
        self._works.standing.look()

    def remove(self, *, force: bool = False) -> None:
        """Forget it, with all that was measured; everybody gets control.

        Raises:
            ConfigError: it is running or paused, and `force` is not given.
            StoreUnavailableError: the store cannot be used.
        """
        kept = tracked(self._works.trials.decisions(self.name))
        remove(self._works.trials, self.name, force=force)
        self._works.opened.controller.removed(kept)
        self._works.standing.look()

    def step(self) -> Scorecard:
        """One look of the controller: take in what has come, decide, act; as `scorecard()`.

        Call it now and then, from one place or from many, as a cron job does; or `start(auto=True)`. While tracking is
        on, or `tracking_uri` is given, it also reads feedback from MLflow, for the next look: for five seconds at most
        in the first look of a process, then for half a second every ten seconds.

        Raises:
            StoreUnavailableError: the store cannot be read or written; look again later.
        """
        self._works.opened.controller.step()
        self._works.standing.look()
        return self.scorecard()

    def scorecard(self) -> Scorecard:
        """What is known now, and what follows from it. Looking is free: look whenever you like.

        Raises:
            StoreUnavailableError: the store cannot be read.
            ConfigError: the experiment was removed.
        """
        card = self._works.opened.scorecard()
        self._works.standing.look()
        return card

    def to_dict(self) -> dict[str, Any]:
        """The scorecard, what is compared, and the audit, as JSON has them; raises as `scorecard`."""
        return self._works.opened.to_dict()

"""`Experiment`: variants of a program compared on live traffic, looked at whenever you like, decided by evidence."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from typing import TYPE_CHECKING, Any, Literal

import dspy
from dspy.utils.callback import BaseCallback

from dspy_prod.compat.dspy import CompiledAsProgram
from dspy_prod.context.assignments import Assignment as Place
from dspy_prod.context.current import current
from dspy_prod.context.scoring import is_raising
from dspy_prod.errors import ConfigError, StoreUnavailableError
from dspy_prod.experiments.assignment import ELSEWHERE, HASH, KEPT, Assignment, Design
from dspy_prod.experiments.attending import EVERY, Attending
from dspy_prod.experiments.beforehand import Beforehand
from dspy_prod.experiments.declaration import BUILT_IN, Declaration, registry_of, source_of
from dspy_prod.experiments.evidence import Evidence
from dspy_prod.experiments.exposing import Exposing
from dspy_prod.experiments.judging import Judge, Judges, checked_judges
from dspy_prod.experiments.opened import Opened, stage_of
from dspy_prod.experiments.operating import promote, put, remove
from dspy_prod.experiments.pairs import SUFFIX
from dspy_prod.experiments.sample import Sample
from dspy_prod.experiments.scorecard import Scorecard
from dspy_prod.experiments.shadow import Shadow, refuse_side_effects
from dspy_prod.experiments.standing import REFRESH, Standing
from dspy_prod.experiments.traced import Traced, assessed, shown_as
from dspy_prod.experiments.turn import Turn
from dspy_prod.experiments.variants import Variant, resolved
from dspy_prod.options.experiments import Rollout
from dspy_prod.options.metrics import Metric, guardrails
from dspy_prod.privacy.redactor import claimed
from dspy_prod.privacy.unshown import unshown
from dspy_prod.runtime.threads import begin
from dspy_prod.stores.base import Store
from dspy_prod.stores.opening import default_namespace, default_store_url, open_store
from dspy_prod.stores.trials import RUNNING, Outcome, Trials
from dspy_prod.tracking.variant_runs import variant_runs

if TYPE_CHECKING:
    from dspy_prod.experiments.offline import OfflineReport

Unit = Literal["user", "session", "tenant"]

_log = logging.getLogger("dspy_prod")


@dataclass(frozen=True, eq=False)
class _Works:
    """What an experiment and all copies of it share."""

    store: Store
    trials: Trials
    design: Design
    exposing: Exposing
    standing: Standing
    opened: Opened
    shadow: Shadow | None
    judges: Judges | None
    sample: Sample
    traced: Traced
    unpriced: list[str] = field(default_factory=list)  # the variant that could not be priced, while it is told

    def __deepcopy__(self, memo: dict[int, Any]) -> _Works:
        return self


class Experiment(Beforehand, CompiledAsProgram, dspy.Module):
    """Variants of a program, compared on live traffic.

    It is a `dspy.Module`: call it, `await exp.acall(...)`, `dspy.streamify(exp)`, run it in `dspy.Parallel`. Each user
    (`unit=`) of `call_context(user=...)` gets one variant, always the same, in every process; calls of nobody get
    control and count for nothing. Within `dspy.Evaluate` everybody gets control and nothing is counted, and optimizers
    refuse it: compile the program, then compare it.

    Args:
        name: of the experiment; the same in every process that takes part.
        program: the code that versions and LMs among the variants are put into; a `Production` keeps its fallback.
        variants: by name, at most eight: published versions (`"triage@production"`, looked up once and pinned),
            programs, or LMs. Control is the one of that name, else the first.
        metrics: what they are compared by, beside the guardrails that calls tell by themselves: `error_rate`,
            `fallback_rate`, `cost` and `latency`, of which one of the same name takes the place.
        judges: by metric, who scores a sample of the answers for it, see `Judge`.
        guardrails: those; `()` for none.
        rollout: stages in which candidates get more and more of the traffic. Without one the experiment runs at once,
            by `weights`.
        unit: whose variant stays the same: `"user"`, `"session"` or `"tenant"`.
        weights: of the variants, any positive numbers; equal by default.
        holdout: share of the units that no experiment of the program may use.
        overrides: variants of units that are not left to chance, as `{"qa@acme": "cot"}`; they count for nothing.
        assign: decides who gets what elsewhere, with the declared weights: takes a unit, returns a variant's name.
        alpha: how probable a wrong decision may be, over all looks.
        on_sample_ratio: what happens when units do not arrive as they are assigned: `"hold"` pauses the experiment,
            `"rollback"` gives control to everybody.
        store: a URL as `LM(store=...)` takes it; the same for all who take part. namespace: as there.
        refresh: seconds within which a process notices a new stage or a decision, with its next call.
        tracking_uri: the MLflow store of the versions; default: MLflow's current one.
        callbacks: DSPy callbacks of this module.

    Raises:
        ConfigError: an argument is impossible, or there is an experiment of this name that is another one.
        SignatureMismatchError, UnknownVersionError, RegistryUnavailableError: as `registry.load`.
        StoreUnavailableError: the store cannot be used.

    Example:
        ```python
        exp = dspy_prod.Experiment(
            "triage-cot",
            program=Triage(),
            variants={"control": "triage@production", "cot": "triage@canary"},
            metrics=[dspy_prod.Metric("resolved", margin=0.02, window="3d")],
        )
        with dspy_prod.call_context(user="u1"):
            prediction = exp(message="I was charged twice.")
        exp.record("u1", resolved=1)
        print(exp.scorecard().reason)
        ```
    """

    def __init__(
        self,
        name: str,
        program: dspy.Module | None = None,
        variants: Mapping[str, Any] | None = None,
        metrics: Sequence[Metric] = (),
        *,
        guardrails: Sequence[Metric] | None = None,
        judges: Mapping[str, Judge] | None = None,
        rollout: Rollout | None = None,
        unit: Unit = "user",
        weights: Mapping[str, float] | None = None,
        holdout: float = 0.0,
        overrides: Mapping[str, str] | None = None,
        assign: Callable[[str], str] | None = None,
        alpha: float = 0.05,
        on_sample_ratio: Literal["hold", "rollback"] = "hold",
        store: str | Store | None = None,
        namespace: str | None = None,
        refresh: float = REFRESH,
        tracking_uri: str | None = None,
        callbacks: list[BaseCallback] | None = None,
    ) -> None:
        super().__init__(callbacks=callbacks)
        where = f"Experiment({name!r})"
        if not isinstance(name, str) or not name or name.endswith(SUFFIX):
            raise ConfigError(f"Experiment: name= is a text that does not end in {SUFFIX!r}, got {name!r}")
        overrides = {claimed(each): variant for each, variant in (overrides or {}).items()}  # as contexts have them
        if unit not in ("user", "session", "tenant"):
            raise ConfigError(f"{where}: unit={unit!r}: use 'user', 'session' or 'tenant'")
        if on_sample_ratio not in ("hold", "rollback"):
            raise ConfigError(f"{where}: on_sample_ratio={on_sample_ratio!r}: use 'hold' or 'rollback'")
        self.name = name
        self.metrics = _measured(where, metrics, guardrails)
        judging = checked_judges(where, judges, self.metrics)
        self._unit: Unit = unit
        self._tracking_uri = tracking_uri = unshown(tracking_uri)
        opened = open_store(store or default_store_url(), default_namespace(namespace))
        trials = opened.trials
        known = trials.trial(name)
        stored = None if known is None else Declaration.from_json(known.declaration)
        found = resolved(name, variants or {}, program, tracking_uri, {} if stored is None else stored.pinned)
        self.variants = {each.name: each for each in found}
        names = tuple(self.variants)
        declared = Declaration.of(
            found, self.metrics, unit=unit, weights=_weighed(where, names, weights),
            rollout=None if rollout is None else rollout.model_dump(mode="json"), holdout=holdout,
            overrides=overrides, elsewhere=assign is not None, alpha=alpha,
            judged={metric: each.share for metric, each in judging.items()},
            hold=on_sample_ratio == "hold", registry=registry_of(found, tracking_uri),
        )  # fmt: skip
        windows = declared.windows(self.metrics)
        self._calls_last = windows[None] > 0  # beyond a unit's first one
        if rollout is not None:
            refuse_side_effects(where, found, rollout)

        def designed(salt: str) -> Design:
            return Design(
                salt, names, weights=declared.weights, shares=None if rollout is None else rollout.shares,
                holdout=holdout, program=_program_of(found), overrides=overrides, assign=assign,
            )  # fmt: skip

        designed(declared.salt)  # nothing is kept of an experiment that cannot be
        Evidence(self.metrics, names[1:], control=names[0], alpha=alpha)
        if stored is None:
            trial = trials.create(name, declared.to_json(), windows)
            stored = Declaration.from_json(trial.declaration)
            if stored.pinned != declared.pinned:  # another process was first, and an alias moved in between
                found = resolved(name, variants or {}, program, tracking_uri, stored.pinned)
                self.variants = {each.name: each for each in found}
        declared.check_same(name, stored)
        _check_versions(where, found, stored)
        design = designed(stored.salt)
        self.rollout = rollout
        exposing = Exposing(name, design, trials)
        most = (None,) if rollout is None else tuple(map(rollout.most_users, range(len(rollout.stages))))
        sample = Sample.of(stored)
        variant_runs(name, stored.salt, names)
        self._works = _Works(
            opened, trials, design, exposing, Standing(name, trials, design, exposing, most, refresh),
            Opened(opened, name, tracking_uri),
            None if rollout is None or not rollout.shadow else Shadow(name, opened, found[1:], rollout),
            Judges(name, opened, judging, self.metrics, sample, assessed) if judging else None,
            sample, Traced(name, opened),
        )  # fmt: skip
        self._attending: Attending | None = None
        if rollout is None:
            self._put("start", "it has no rollout, so it runs at once")
        self._works.standing.look()

    _uncompilable = (
        "an Experiment is no program to compile: what was found would be no variant of it. Compile the program, "
        "publish it, and compare that version in an experiment"
    )

    # -- calling -------------------------------------------------------------------------------------------------------
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the caller's variant; called through `exp(...)`."""
        turn = self._turn()
        try:
            with turn:
                return turn.answered(turn.variant.program(*args, **kwargs))
        finally:
            self._after(turn, args, kwargs)

    async def aforward(self, *args: Any, **kwargs: Any) -> Any:
        """Asynchronous `forward`; called through `await exp.acall(...)`."""
        turn = self._turn()
        try:
            with turn:
                return turn.answered(await turn.variant.program.acall(*args, **kwargs))
        finally:
            self._after(turn, args, kwargs)

    def assign(self, unit: str) -> str:
        """The variant of a unit, as it is now. It counts as no exposure."""
        serves = self._serves()
        if serves is not None:
            return serves
        exposing = self._works.exposing
        variant = self._works.design.assign(
            claimed(unit), exposing.stage, exposing.full, lambda: self._works.trials.seen(self.name, claimed(unit))
        ).variant
        return self._control if variant in self._works.standing.dropped else variant

    def _turn(self) -> Turn:
        outer, control = current(), self._control
        if is_raising():
            return Turn(self.variants[control], None, None, outer)
        unit: str | None = getattr(outer, self._unit)
        serves = self._serves()
        if unit is None or serves is not None:
            return Turn(self.variants[serves or control], Place(self.name, serves or control, unit=unit), None, outer)
        try:
            got = self._works.exposing(unit)
        except Exception as error:  # of `assign=`: whoever calls has no part in it
            _log.error("Experiment(%r): %r gets control, for assign= failed", self.name, unit, exc_info=error)
            return Turn(self.variants[control], Place(self.name, control, unit=unit), None, outer)
        if got.variant in self._works.standing.dropped:
            return Turn(self.variants[control], Place(self.name, control, unit=unit), None, outer)
        place = Place(self.name, got.variant, stage_of(self.rollout, got.stage), unit, got.propensity)
        return Turn(self.variants[got.variant], place, self._works.trials if self._counts(got) else None, outer)

    def _counts(self, got: Assignment) -> bool:
        """Whether a call counts for its unit: it is exposed now, or may have been before its candidate was full."""
        return got.random or got.how == KEPT or (self._calls_last and got.full != 0 and got.how in (HASH, ELSEWHERE))

    def _after(self, turn: Turn, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Have an answer judged, perhaps; and in a shadow stage, have the candidates asked once more, unseen."""
        shadow, judges, counted = self._works.shadow, self._works.judges, turn.counted
        if counted is not None and counted[2] is not None:
            self._works.traced.see(counted[2], counted[0])
        if counted is not None and turn.unpriced:
            self._cannot_compare_costs(turn)
        if judges is not None and counted is not None and not turn.failed:
            judges.offer(*counted, args, kwargs, turn.prediction)
        if shadow is not None and turn.shadowed:
            shadow.offer(args, kwargs, turn.outcome, current())

    def _cannot_compare_costs(self, turn: Turn) -> None:
        """Pause it: calls that nobody knows the price of would count as free, and no harm would ever be seen."""
        works, trial = self._works, self._works.standing.trial
        running = trial is not None and trial.state == RUNNING
        if works.unpriced or not running or not any(metric.name == "cost" for metric in self.metrics):
            return
        works.unpriced.append(turn.variant.name)
        reason = (
            f"costs cannot be compared: a call of {turn.variant.name} has no known price. Give its LM prices=, or "
            "leave the guardrail cost out (guardrails=)"
        )
        _log.warning("Experiment(%r) pauses: %s", self.name, reason)

        def pause() -> None:
            try:
                put(works.trials, self.name, "pause", reason, "dspy_prod")
                works.standing.look()
            except StoreUnavailableError as error:
                _log.warning("Experiment(%r) pauses with another call, for its store is away: %s", self.name, error)
            finally:
                works.unpriced.clear()  # should it be resumed unmended, it pauses again

        if begin("dspy_prod-experiment", pause) is None:  # no call waits for the store
            works.unpriced.clear()

    def _serves(self) -> str | None:
        """The variant that everybody gets now; None: units are assigned."""
        self._works.standing.keep_up()
        if self._attending is not None:
            self._attending.keep_going()
        return self._works.standing.serves

    # -- what becomes of units -----------------------------------------------------------------------------------------
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
            id: what it is the value of, as an answer's; said again under the same id it is a correction. Values of
                several ids are averaged. None: the trace, else the unit as a whole.
            values: by metric.

        Raises:
            ConfigError: there is no such metric, calls or a judge tell it, or it cannot have this value; both a unit
                and a trace are named, or none; the ledger has no call of this experiment with that trace.
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
        if at is not None and (isinstance(at, bool) or not isinstance(at, int | float) or not isfinite(at)):
            raise ConfigError(f"Experiment({self.name!r}).record: at={at!r} must be seconds since the epoch")
        checked = self._checked(values)
        if trace is not None:
            unit, id = self._works.traced.unit_of(trace, self._unit), id or trace
        assert unit is not None
        whose = claimed(unit) if trace is None else unit
        moment = self._works.trials.now() if at is None else at
        for metric, value in checked.items():
            self._works.trials.outcome(Outcome(self.name, whose, metric, value, moment, id))
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
            except (TypeError, ValueError) as error:
                raise ConfigError(f"Experiment({self.name!r}).record: {metric}={value!r}: {error}") from None
        return checked

    # -- the rollout ---------------------------------------------------------------------------------------------------
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

    def resume(self, reason: str | None = None) -> None:
        """Go on after a pause."""
        self._put("resume", reason)

    def stop(self, reason: str | None = None) -> None:
        """End it: everybody gets control. What was measured stays."""
        self._put("stop", reason)

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
        remove(self._works.trials, self.name, force=force)
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

    def _put(self, what: str, reason: str | None = None) -> None:
        put(self._works.trials, self.name, what, reason)
        self._works.standing.look()

    def _known(self) -> tuple[Design, float, Store]:
        return self._works.design, self._works.opened.declaration.alpha, self._works.store

    @property
    def _control(self) -> str:
        return next(iter(self.variants))

    # -- the program's own ---------------------------------------------------------------------------------------------
    @property
    def program(self) -> Any:
        """Control's program."""
        return self.variants[self._control].program

    def named_parameters(self) -> list[tuple[str, Any]]:
        """Control's."""
        return list(self.program.named_parameters())

    def named_predictors(self) -> list[tuple[str, Any]]:
        """Control's."""
        return list(self.program.named_predictors())

    def set_lm(self, lm: Any) -> None:
        """Set the LM of every variant that is no LM itself."""
        for each in self.variants.values():
            if each.kind != "lm":
                each.program.set_lm(lm)

    def get_lm(self) -> Any:
        """That of control."""
        return self.program.get_lm()

    def dump_state(self, json_mode: bool = True) -> dict[str, Any]:
        """Control's state."""
        state: dict[str, Any] = self.program.dump_state(json_mode=json_mode)
        return state

    def load_state(self, state: dict[str, Any], *, allow_unsafe_lm_state: bool = False) -> Any:
        """Refused: variants stay what they are while they are measured."""
        raise ConfigError(
            f"Experiment({self.name!r}): its variants are pinned. Load the state into a program of its own"
        )

    def __repr__(self) -> str:
        return f"Experiment({self.name!r}, {list(self.variants)})"


def _measured(where: str, metrics: Sequence[Metric], given: Sequence[Metric] | None) -> tuple[Metric, ...]:
    """The metrics, and the guardrails that they do not replace."""
    for each in (*metrics, *(given or ())):
        if not isinstance(each, Metric):
            raise ConfigError(f"{where}: metrics= takes dspy_prod.Metric objects, got {type(each).__name__}")
    own = {each.name for each in metrics}
    return (*metrics, *(each for each in (guardrails() if given is None else given) if each.name not in own))


def _weighed(where: str, names: Sequence[str], weights: Mapping[str, float] | None) -> list[float]:
    if weights is None:
        return [1.0] * len(names)
    if not isinstance(weights, Mapping) or set(weights) != set(names):
        raise ConfigError(f"{where}: weights= takes a number for each of {', '.join(map(repr, names))}")
    try:
        return [float(weights[name]) for name in names]
    except (TypeError, ValueError):
        raise ConfigError(f"{where}: weights={dict(weights)!r}: a weight is a positive number, such as 1") from None


def _check_versions(where: str, variants: Sequence[Variant], stored: Declaration) -> None:
    """Refuse a program that was loaded from another version than the one that is measured under its name."""
    for each in variants:
        measured = stored.pinned.get(each.name)
        if each.version != measured:
            raise ConfigError(
                f"{where}: variants[{each.name!r}] is {each.version or 'no published version'} here, but "
                f"{measured or 'no published version'} where it was made. What was measured would be mixed up: load "
                "the same version, or give this experiment a name of its own"
            )


def _program_of(variants: Sequence[Any]) -> str:
    """The program's name, whose holdout it is."""
    return str(variants[0].program.name)

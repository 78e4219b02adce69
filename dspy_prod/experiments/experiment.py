"""`Experiment`: variants of a program compared on live traffic, looked at whenever you like, decided by evidence."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any, Literal

import dspy
from dspy.utils.callback import BaseCallback

from dspy_prod.compat.dspy import CompiledAsProgram
from dspy_prod.errors import ConfigError
from dspy_prod.experiments.assignment import Design
from dspy_prod.experiments.attending import Attending
from dspy_prod.experiments.beforehand import Beforehand
from dspy_prod.experiments.calling import Calling
from dspy_prod.experiments.checking import check_options, check_versions, measured, program_of, weighed
from dspy_prod.experiments.declaration import Declaration, registry_of
from dspy_prod.experiments.evidence import Evidence
from dspy_prod.experiments.exposing import Exposing
from dspy_prod.experiments.flights import Flights
from dspy_prod.experiments.horizon import Horizon
from dspy_prod.experiments.inside import Unit, Works
from dspy_prod.experiments.judging import Judge, Judges, checked_judges
from dspy_prod.experiments.opened import Opened
from dspy_prod.experiments.pairs import SUFFIX
from dspy_prod.experiments.posing import Posing
from dspy_prod.experiments.recording import Recording
from dspy_prod.experiments.running import Running
from dspy_prod.experiments.sample import Sample
from dspy_prod.experiments.shadow import Shadow, refuse_side_effects
from dspy_prod.experiments.standing import REFRESH, Standing
from dspy_prod.experiments.traced import Traced, assessed
from dspy_prod.experiments.variants import resolved
from dspy_prod.options.experiments import Rollout
from dspy_prod.options.metrics import Metric
from dspy_prod.privacy.redactor import claimed
from dspy_prod.privacy.unshown import unshown
from dspy_prod.stores.addresses import default_store_url
from dspy_prod.stores.base import Store
from dspy_prod.stores.opening import default_namespace, open_store
from dspy_prod.tracking.variant_runs import variant_runs


class Experiment(Beforehand, Calling, Recording, Running, Posing, CompiledAsProgram, dspy.Module):
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
        guardrails: others in place of those four, which go by each user's first call, such as
            `[dspy_prod.guardrails.error_rate(window="1d")]`; `()` for none.
        rollout: stages in which candidates get more and more of the traffic. Without one the experiment runs at once,
            by `weights`.
        unit: whose variant stays the same: `"user"`, `"session"` or `"tenant"`.
        weights: of the variants, any positive numbers; equal by default.
        holdout: share of the units that no experiment of the program may use.
        overrides: variants of units that are not left to chance, as `{"qa@acme": "cot"}`; they count for nothing.
        assign: decides who gets what elsewhere, with the declared weights: takes a unit, returns a variant's name.
        alpha: how probable a wrong decision may be, over all looks.
        horizon: when an experiment that is still undecided pauses, once, for a person: after so many units (an int), or
            so long after its start (`"30d"`, a timedelta, or seconds as a float). Default: never.
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
        horizon: int | float | str | timedelta | None = None,
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
        check_options(where, variants, rollout, overrides, assign, judges, holdout, alpha, refresh)
        overrides = {claimed(each): variant for each, variant in (overrides or {}).items()}  # as contexts have them
        if unit not in ("user", "session", "tenant"):
            raise ConfigError(f"{where}: unit={unit!r}: use 'user', 'session' or 'tenant'")
        if on_sample_ratio not in ("hold", "rollback"):
            raise ConfigError(f"{where}: on_sample_ratio={on_sample_ratio!r}: use 'hold' or 'rollback'")
        self.name = name
        self.metrics = measured(where, metrics, guardrails)
        ends = Horizon.of(where, horizon)
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
            found, self.metrics, unit=unit, weights=weighed(where, names, weights),
            rollout=None if rollout is None else rollout.model_dump(mode="json"), holdout=holdout,
            overrides=overrides, elsewhere=assign is not None, alpha=alpha,
            judged={metric: each.share for metric, each in judging.items()},
            hold=on_sample_ratio == "hold", horizon=None if ends is None else ends.declared(),
            registry=registry_of(found, tracking_uri),
        )  # fmt: skip
        windows = declared.windows(self.metrics)
        self._calls_last = windows[None] > 0  # beyond a unit's first one
        if rollout is not None:
            refuse_side_effects(where, found, rollout)

        def designed(salt: str) -> Design:
            return Design(
                salt, names, weights=declared.weights, shares=None if rollout is None else rollout.shares,
                holdout=holdout, program=program_of(found), overrides=overrides, assign=assign,
            )  # fmt: skip

        designed(declared.salt)  # nothing is kept of an experiment that cannot be
        Evidence(self.metrics, names[1:], control=names[0], alpha=alpha)
        if known is None or stored is None:
            known = trials.create(name, declared.to_json(), windows)
            stored = Declaration.from_json(known.declaration)
            if stored.pinned != declared.pinned:  # another process was first, and an alias moved in between
                found = resolved(name, variants or {}, program, tracking_uri, stored.pinned)
                self.variants = {each.name: each for each in found}
        declared.check_same(name, stored)
        check_versions(where, found, stored)
        design = designed(stored.salt)
        self.rollout = rollout
        made = known.created
        exposing = Exposing(name, design, trials, made=made)
        most = (None,) if rollout is None else tuple(map(rollout.most_users, range(len(rollout.stages))))
        sample = Sample.of(stored)
        variant_runs(name, stored.salt, names)
        self._works = Works(
            opened, trials, design, exposing, Standing(name, trials, design, exposing, most, refresh),
            Opened(opened, name, tracking_uri),
            None if rollout is None or not rollout.shadow else Shadow(name, stored.salt, opened, found[1:], rollout),
            Judges(name, stored.salt, opened, judging, self.metrics, sample, assessed, made) if judging else None,
            sample, Traced(name, opened), Flights(name, trials, made=made),
        )  # fmt: skip
        if self._works.shadow is not None:
            self._works.opened.left_out = self._works.shadow.count_left_out
        self._attending: Attending | None = None
        if rollout is None:
            self._put("start", "it has no rollout, so it runs at once")
        self._works.standing.look()

    _uncompilable = (
        "an Experiment is no program to compile: what was found would be no variant of it. Compile the program, "
        "publish it, and compare that version in an experiment"
    )

    def __repr__(self) -> str:
        return f"Experiment({self.name!r}, {list(self.variants)})"

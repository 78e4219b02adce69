"""An experiment as the store has it, for whoever has not the code of its program: operators, and controllers."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

from dspy_prod.errors import ConfigError, StoreUnavailableError
from dspy_prod.experiments.aliases import Aliases, pinned
from dspy_prod.experiments.assignment import Design
from dspy_prod.experiments.controller import Controller
from dspy_prod.experiments.declaration import Declaration
from dspy_prod.experiments.horizon import Horizon, shown
from dspy_prod.experiments.pairs import SUFFIX
from dspy_prod.experiments.sample import Sample
from dspy_prod.experiments.scorecard import Scorecard, scorecard
from dspy_prod.experiments.shadow import SPENT, run_of
from dspy_prod.experiments.unseen import Unseen
from dspy_prod.options.experiments import Rollout
from dspy_prod.options.metrics import LARGEST, Metric
from dspy_prod.policies.run import accounts_of
from dspy_prod.records import NANO
from dspy_prod.stores.base import Store
from dspy_prod.stores.trials import Trial

if TYPE_CHECKING:
    from dspy_prod.experiments.planning import Plan

MOST_NAMES = 10
"""Names that an error tells."""


class Opened:
    """An experiment, read from its store.

    Args:
        store: that has it. name: the experiment's.
        tracking_uri: the MLflow store with its versions; default: the one in which they were found when the
            experiment was made, else MLflow's current one.

    Attributes:
        trials: of the store. declaration: what the experiment is, as of the moment it was opened.
        design, metrics, rollout: of it. aliases: those of its variants; None where no variant is a published version.
        controller: looks at it.
        left_out: tells of how many calls this process could not ask its candidates unseen.

    Raises:
        ConfigError: there is no experiment of this name; the message tells which there are.
        StoreUnavailableError: the store cannot be read.

    Example:
        ```python
        opened = Opened(open_store("sqlite:///state.db", "shop"), "triage-cot")
        opened.controller.step()
        print(opened.scorecard().reason)
        ```
    """

    def __init__(self, store: Store, name: str, tracking_uri: str | None = None) -> None:
        self.name, self.namespace, self.trials, self._store = name, store.namespace, store.trials, store
        self._tracking_uri = tracking_uri
        self.declaration: Any = None
        self.left_out: Callable[[], int] = lambda: 0
        text = self.trial().declaration
        try:
            self.declaration = declaration = Declaration.from_json(text)
            self.metrics = tuple([Metric.model_validate(each) for each in declaration.metrics])
            self.rollout = None if declaration.rollout is None else Rollout.model_validate(declaration.rollout)
        except (TypeError, ValueError) as error:  # written by somebody else, or by another release
            raise ConfigError(
                f"the experiment {name!r} cannot be read ({type(error).__name__}): it is of another release. Forget it "
                f"with `dspy-prod experiment rm {shlex.quote(name)} --force`"
            ) from error
        self.design = Design(
            declaration.salt, tuple(declaration.variants), weights=declaration.weights,
            shares=None if self.rollout is None else self.rollout.shares, holdout=declaration.holdout,
        )  # fmt: skip
        versions = pinned(declaration)
        where = tracking_uri or declaration.registry
        self.aliases = Aliases(name, self.control, versions, self.trials, where) if versions else None

    @cached_property
    def controller(self) -> Controller:
        """Looks at it."""
        declaration = self.declaration
        controller = Controller(
            self.name, self.trials, self.design, self.metrics, declaration.alpha, self.rollout, self.aliases,
            declaration.hold, Sample.of(declaration), self._tracking_uri or declaration.registry,
            Horizon.read(declaration.horizon),
        )  # fmt: skip
        controller.page = self.page
        return controller

    @property
    def control(self) -> str:
        """The variant that candidates are compared with."""
        return self.design.variants[0]

    def trial(self) -> Trial:
        """As the store has it now; raises as `Opened`."""
        trial = self.trials.trial(self.name)
        if trial is None:
            known = [each.name for each in self.trials.trials() if not each.name.endswith(SUFFIX)]
            told = ", ".join(map(repr, known[:MOST_NAMES])) or "none yet"
            more = f" and {len(known) - MOST_NAMES:,} more" if len(known) > MOST_NAMES else ""
            raise ConfigError(
                f"there is no experiment {self.name!r} in namespace {self.namespace!r}, only {told}{more}"
            )
        if self.declaration is not None and Declaration.from_json(trial.declaration).salt != self.declaration.salt:
            raise ConfigError(f"the experiment {self.name!r} was removed, and what has its name now is another one")
        return trial

    def scorecard(self) -> Scorecard:
        """What is known now, and what follows from it; raises as `Opened`.

        While the store can be read and not written, as on a full disk, it is what was known when that began, and says
        so.
        """
        self.trial()  # is it still there
        try:
            decision, unwritten = self.controller.read(), None
        except StoreUnavailableError as error:
            decision, unwritten = self.controller.known(), str(error)
        unwritten = unwritten or getattr(self._store, "problems", {}).get("failing")
        trial = self.trial()
        declaration = Declaration.from_json(trial.declaration)
        tally, audit = self.trials.tally(self.name), self.trials.decisions(self.name)
        return scorecard(
            trial, stage_of(self.rollout, trial.stage), decision, self.trials.counts(self.name),
            tally, self.design.variants, declaration.serves, declaration.dropped,
            metrics=self.metrics, stages=[stage_of(self.rollout, place) for place in range(len(self.design.shares))],
            audit=audit, history=self.controller.history(),
            waiting=self.trials.waiting(self.name), unwritten=None if unwritten is None else str(unwritten),
            calls=self.trials.ended(self.name),
            horizon=shown(Horizon.read(declaration.horizon), declaration.unit, tally.units, audit),
            impossible=self.controller.impossible, unseen=self._unseen(),
        )  # fmt: skip

    def _unseen(self) -> Unseen | None:
        """How its shadow stage stands."""
        rollout, pairs = self.rollout, self.controller.pairs
        if rollout is None or pairs is None:
            return None
        cap, account = rollout.shadow_usd, accounts_of(run_of(self.name, self.design.salt)) + "usd"
        return Unseen(
            dict(pairs.counts), rollout.shadow_calls, dict(pairs.failed), dict(pairs.refused), self.left_out(),
            None if cap is None else self._store.account(account).spent / NANO, cap,
            any(line.what == SPENT for line in self.trials.decisions(self.name)),
        )  # fmt: skip

    def page(self) -> str:
        """The scorecard as a page of its own; raises as `Opened`."""
        from dspy_prod.experiments.document import document

        return document(self.scorecard())

    def plan(
        self,
        users_per_day: float,
        *,
        baseline: Mapping[str, float | tuple[float, float]] | None = None,
        effect: float | Mapping[str, float] | None = None,
        power: float = 0.8,
    ) -> Plan:
        """How many users and days it takes to decide; as `Experiment.plan`."""
        from dspy_prod.experiments.planning import plan

        known = isinstance(users_per_day, int | float) and not isinstance(users_per_day, bool)
        if not known or not 0 < users_per_day <= LARGEST:
            raise ConfigError(f"plan: users_per_day={users_per_day!r} must be over 0: how many new ones come a day")
        design = self.design
        success = [each.name for each in self.metrics if each.role == "success"]
        return plan(
            self.metrics, units_per_day=users_per_day * (1.0 - design.holdout), baseline=baseline,
            effects=effect if effect is None or isinstance(effect, Mapping) else dict.fromkeys(success, effect),
            shares=dict(zip(design.variants, design.propensities(len(design.shares) - 1), strict=True)),
            control=design.variants[0], alpha=self.declaration.alpha, power=power,
            horizon=Horizon.read(self.declaration.horizon), unit=self.declaration.unit,
        )  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        """The scorecard, what is compared, and the audit, as JSON has them; raises as `Opened`."""
        from dspy_prod.registry.files import plain

        card = self.scorecard()
        audit = [
            {"number": each.number, "what": each.what, "by": each.by, "at": each.at, "reason": reason_of(each.evidence)}
            for each in self.trials.decisions(self.name)
        ]
        told = self.declaration
        found: dict[str, Any] = plain(
            {
                **card.to_dict(), "variants": told.variants, "versions": told.pinned, "unit": told.unit,
                "alpha": told.alpha, "rollout": told.rollout, "metrics": told.metrics, "audit": audit,
            }
        )  # fmt: skip
        return found


def stage_of(rollout: Rollout | None, stage: int) -> str:
    """A stage in words, as `"5 %"`."""
    if rollout is None:
        return "split"
    share = rollout.stages[stage]
    return share if isinstance(share, str) else f"{100 * share:g} %"


def reason_of(evidence: str) -> str:
    """Why, as a line of the audit says."""
    said = json.loads(evidence)
    return str(said.get("reason", ""))


def controller_of(store: Store, name: str, tracking_uri: str | None = None) -> Controller:
    """The controller of an experiment, from its store alone; arguments and errors as of `Opened`."""
    return Opened(store, name, tracking_uri).controller

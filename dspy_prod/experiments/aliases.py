"""The aliases that an experiment's variants were named by: watched while it runs, moved by what it decides.

An alias moves by compare-and-set on the version that was measured, with the decision as evidence in the audit. Doing it
again changes nothing, so it is done at each look until it is done.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from typing import Any, Final

from dspy_prod.experiments.declaration import Declaration
from dspy_prod.experiments.variants import Variant
from dspy_prod.stores.trials import DECIDED, Decision, Trial

BY: Final = "dspy-prod experiment"

_log = logging.getLogger("dspy_prod")


class Aliases:
    """Moves aliases in MLflow's registry.

    Args:
        experiment: its name, for the audit. variants: of it, control first. tracking_uri: of the MLflow store.
    """

    def __init__(self, experiment: str, variants: Sequence[Variant], tracking_uri: str | None = None) -> None:
        self._experiment, self._uri = experiment, tracking_uri
        self._control = variants[0]
        self._named = {each.name: each for each in variants if each.version is not None}
        self._done: tuple[str, int] | None = None

    def moved(self) -> list[str]:
        """Aliases that do not point to the version any more that is measured, in words; none while MLflow is down."""
        from dspy_prod.registry.aliases.projection import alias_version
        from dspy_prod.registry.errors import RegistryUnavailableError
        from dspy_prod.registry.server import server_at

        found = []
        try:
            for each in self._named.values():
                if each.alias is not None:
                    now = alias_version(server_at(self._uri), _program(each), each.alias)
                    if now != each.number:
                        found.append(f"{_program(each)}@{each.alias} from {each.number} to {now}")
        except RegistryUnavailableError as error:
            _log.warning("The aliases of the experiment %s cannot be looked at now: %s", self._experiment, error)
            return []
        return found

    def follow(self, trial: Trial, audit: Sequence[Decision]) -> None:
        """Do what was decided, unless it is done already."""
        from dspy_prod.registry.errors import PromotionConflictError, RegistryError

        decisions = [each for each in audit if each.what in ("promote", "rollback")]
        if trial.state != DECIDED or not decisions or self._done == (trial.name, trial.revision):
            return
        last = decisions[-1]
        evidence = json.loads(last.evidence)
        try:
            if last.what == "promote":
                self._promote(trial, evidence)
            else:
                self._roll_back(evidence)
        except PromotionConflictError as error:
            _log.warning("The experiment %s leaves an alias as it is: %s", self._experiment, error)
        except RegistryError as error:
            _log.warning("The experiment %s moves its alias with its next look: %s", self._experiment, error)
            return
        self._done = trial.name, trial.revision

    def _promote(self, trial: Trial, evidence: dict[str, Any]) -> None:
        from dspy_prod.registry.aliases.promotion import promote

        serves = Declaration.from_json(trial.declaration).serves
        winner = self._named.get(serves or "")
        if winner is None or self._control.alias is None or winner.number is None:
            return
        promote(
            _program(winner), winner.number, alias=self._control.alias, expected=self._control.number, by=BY,
            reason=evidence["reason"], evidence={"experiment": self._experiment, **evidence}, tracking_uri=self._uri,
        )  # fmt: skip

    def _roll_back(self, evidence: dict[str, Any]) -> None:
        from dspy_prod.registry.aliases.promotion import rollback

        for each in self._named.values():
            if each is not self._control and each.alias is not None and self._control.number is not None:
                rollback(
                    _program(each), alias=each.alias, to=self._control.number, expected=each.number, by=BY,
                    reason=evidence["reason"], evidence={"experiment": self._experiment, **evidence},
                    tracking_uri=self._uri,
                )  # fmt: skip


def _program(variant: Variant) -> str:
    assert variant.version is not None
    return variant.version.rpartition("/")[0]

"""The aliases that an experiment's variants were named by: watched while it runs, moved by what it decides.

What is promoted gets control's alias, and the aliases of candidates that were dropped before go to it too; where
control stays, or the experiment is stopped, those of the candidates go back to control's version. So no alias is left
at what lost.

An alias moves once for a decision, by compare-and-set on the version that was measured, with the decision as evidence
in the registry's journal. The journal is looked at first: a move that was made, and perhaps taken back since by a
person, is not made again, whoever looks. When it is done, the experiment's audit gets the line `alias`.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from dspy_prod.errors import ConfigError
from dspy_prod.experiments.declaration import Declaration
from dspy_prod.experiments.shortening import shortened
from dspy_prod.stores.trials import DECIDED, STOPPED, Decision, Trial, Trials

if TYPE_CHECKING:
    from dspy_prod.registry.errors import PromotionConflictError

BY: Final = "dspy-prod experiment"
ALIAS: Final = "alias"
"""What the line of the audit is called that says what became of the aliases."""

_log = logging.getLogger("dspy_prod")


class Pinned(NamedTuple):
    """A variant that is a published version.

    Attributes:
        name: as in `variants=`. program: the published program's name. number: of the version.
        alias: by which it was named; None when it was not by one.
    """

    name: str
    program: str
    number: int
    alias: str | None

    @property
    def version(self) -> str:
        """As the ledger has it."""
        return f"{self.program}/{self.number}"


def pinned(declaration: Declaration) -> list[Pinned]:
    """The variants of an experiment that are published versions, control first if it is one."""
    from dspy_prod.registry.names import Reference

    found = []
    for name, said in declaration.variants.items():
        if name not in declaration.pinned:
            continue
        program, _, number = declaration.pinned[name].rpartition("/")
        try:
            alias = Reference.of(said).alias
        except ConfigError:  # a program that was loaded, and given as it is
            alias = None
        found.append(Pinned(name, program, int(number), alias))
    return found


def _followed(trial: Trial, audit: Sequence[Decision]) -> Decision | None:
    """The line of the audit that says what everybody gets; None where aliases stay as they are."""
    whats = {DECIDED: ("promote", "rollback"), STOPPED: ("stop",)}.get(trial.state, ())
    if trial.state == STOPPED and not any(each.what == "start" for each in audit):
        return None  # nobody ever got a candidate
    return next((each for each in reversed(audit) if each.what in whats), None)


class Aliases:
    """Watches and moves the aliases of an experiment in MLflow's registry.

    Args:
        experiment: its name. control: the name of its control. variants: those that are published versions.
        trials: of the store that has the experiment. tracking_uri: of the MLflow store; default: MLflow's current one.
    """

    def __init__(
        self,
        experiment: str,
        control: str,
        variants: Sequence[Pinned],
        trials: Trials,
        tracking_uri: str | None = None,
    ) -> None:
        self._experiment, self._trials, self._uri = experiment, trials, tracking_uri
        self._variants = {each.name: each for each in variants}
        self._control = self._variants.get(control)
        self._done: int | None = None

    def check(self) -> None:
        """Make sure that this is the MLflow store in which the versions are.

        Raises:
            UnknownVersionError: it is not; names the version, and the remedy.
            RegistryUnavailableError: MLflow did not answer.
        """
        from dspy_prod.registry.errors import UnknownVersionError
        from dspy_prod.registry.names import Reference
        from dspy_prod.registry.server import server_at

        server = server_at(self._uri)
        for each in self._variants.values():
            try:
                server.prompt(Reference(each.program, each.number))
            except UnknownVersionError:
                raise UnknownVersionError(
                    f"the experiment {self._experiment!r} compares {each.version}, which is not in MLflow at "
                    f"{server.place}: name the store that has it, --tracking-uri or tracking_uri="
                ) from None

    def moved(self) -> list[str]:
        """Aliases that do not point to the version any more that is measured, in words.

        None where MLflow cannot be asked, or is another one than that with the versions: nothing is known then.
        """
        from dspy_prod.registry.errors import RegistryError

        found = []
        try:
            for each in self._variants.values():
                now = self._alias_of(each)
                if each.alias is not None and now != each.number:
                    self.check()
                    found.append(f"{each.program}@{each.alias} from {each.number} to {now}")
        except RegistryError as error:
            _log.warning("The aliases of the experiment %s cannot be looked at now: %s", self._experiment, error)
            return []
        return found

    def check_control(self) -> None:
        """Make sure that control's alias still has the version that candidates were compared with.

        Raises:
            PromotionConflictError: somebody moved it.
            UnknownVersionError, RegistryUnavailableError: as `check`.
        """
        from dspy_prod.registry.aliases.promotion import conflict_error

        control = self._control
        if control is not None and control.alias is not None:
            now = self._alias_of(control)
            if now != control.number:
                self.check()
                raise conflict_error(control.program, control.alias, control.number, now)

    def follow(self, trial: Trial, audit: Sequence[Decision]) -> bool:
        """Do what was decided, unless it is done already; whether nothing is left to do.

        Raises:
            StoreUnavailableError: that it is done cannot be noted.
        """
        from dspy_prod.registry.errors import PromotionConflictError, RegistryError

        last = _followed(trial, audit)
        if last is None or self._done == trial.revision:
            return True
        if not any(each.what == ALIAS and each.number > last.number for each in audit):
            done: list[dict[str, Any]] = []
            for variant, alias, to, expected in self._moves(trial, last.what):
                if self._control is not None and any(each["outcome"] == "conflict" for each in done):
                    to = self._control.number  # whoever has control's alias now: what won is not in its place
                told: dict[str, Any] = {"alias": f"{variant.program}@{alias}", "from": expected, "to": to}
                try:
                    told["outcome"] = self._move(trial, last, variant, alias, to, expected)
                except PromotionConflictError as error:
                    _log.warning("The experiment %s leaves an alias as it is: %s", self._experiment, error)
                    told |= {"outcome": "conflict", "reason": str(error), "actual": error.actual}
                except RegistryError as error:
                    _log.warning("The experiment %s moves its alias with its next look: %s", self._experiment, error)
                    return False
                done.append(told)
            if done:
                words = "; ".join(
                    f"{each['alias']} from {each['from']} to {each['to']}: {each['outcome']}" for each in done
                )
                line = json.dumps({"reason": words, "moves": done})
                self._trials.decide(trial.name, Decision(ALIAS, "controller", line))
        self._done = trial.revision
        return True

    def conflict(self, audit: Sequence[Decision]) -> PromotionConflictError | None:
        """Why an alias was left as it is, by the newest line of the audit about aliases; None where none was."""
        from dspy_prod.registry.errors import PromotionConflictError

        lines = [json.loads(each.evidence)["moves"] for each in audit if each.what == ALIAS]
        for each in lines[-1] if lines else ():
            if each["outcome"] == "conflict":
                return PromotionConflictError(
                    each["reason"], alias=each["alias"].rpartition("@")[2], expected=each["from"], actual=each["actual"]
                )
        return None

    def _moves(self, trial: Trial, what: str) -> list[tuple[Pinned, str, int, int]]:
        """What a decision asks for: (variant, alias, the version it shall have, the one it must have)."""
        control = self._control
        if control is None:
            return []
        declaration = Declaration.from_json(trial.declaration)
        lost = [
            (each, each.alias)
            for each in self._variants.values()
            if each is not control and each.alias not in (None, control.alias) and each.program == control.program
            and (what != "promote" or each.name in declaration.dropped)
        ]  # fmt: skip
        to, moves = control, []
        if what == "promote":
            winner = self._variants.get(declaration.serves or "")
            if winner is not None and control.alias is not None and winner.program == control.program:
                to, moves = winner, [(winner, control.alias, winner.number, control.number)]
        return moves + [(each, str(alias), to.number, each.number) for each, alias in lost]

    def _move(self, trial: Trial, decision: Decision, variant: Pinned, alias: str, to: int, expected: int) -> str:
        """Move an alias by a decision, once; what became of it."""
        from dspy_prod.registry.aliases.journal import Journal
        from dspy_prod.registry.aliases.projection import settled
        from dspy_prod.registry.aliases.promotion import promote, rollback
        from dspy_prod.registry.deployment.state import EVIDENCE, continued
        from dspy_prod.registry.server import server_at

        mark = {"name": trial.name, "created": trial.created, "decision": decision.number}
        server = server_at(self._uri)
        replay = settled(server, variant.program, alias, Journal(server, variant.program))
        if any(
            each.alias == alias and each.moved and each.evidence.get("experiment") == mark for each in replay.entries
        ):
            return "applied"
        said = json.loads(decision.evidence)
        evidence = {"experiment": mark, "scorecard": shortened(said)}
        more: dict[str, Any] = {
            "alias": alias, "expected": expected, "by": BY if decision.by == "controller" else decision.by,
            "reason": str(said.get("reason") or f"experiment {trial.name}"), "evidence": evidence,
            "tracking_uri": self._uri,
        }  # fmt: skip
        if decision.what != "promote" or self._control is None or alias != self._control.alias:
            return rollback(variant.program, to=to, **more).outcome
        deployment = continued(replay, alias, to)
        if deployment is not None:
            evidence[EVIDENCE] = dict(deployment)
        return promote(variant.program, to, **more).outcome

    def _alias_of(self, variant: Pinned) -> int | None:
        from dspy_prod.registry.aliases.projection import alias_version
        from dspy_prod.registry.server import server_at

        return None if variant.alias is None else alias_version(server_at(self._uri), variant.program, variant.alias)

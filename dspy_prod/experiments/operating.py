"""What a person does with an experiment: start, pause, resume, stop, promote, remove. In Python and from a shell alike.

Each is one compare-and-set in the store, with its line in the audit: who, and why.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Final

from dspy_prod.errors import ConfigError, StoreUnavailableError
from dspy_prod.experiments.decisions import CandidateDecision, Decision
from dspy_prod.experiments.declaration import Declaration, salt_of
from dspy_prod.experiments.opened import Opened
from dspy_prod.experiments.pairs import SUFFIX, owner_of
from dspy_prod.stores import trials as words
from dspy_prod.stores.trials import Trial, Trials
from dspy_prod.telemetry.events import BUS

OPERATOR: Final = "operator"
"""Who did something, where it is not said."""

BY_HAND: Final = "by hand"

_log = logging.getLogger("dspy_prod")

_CHANGES: Final[dict[str, tuple[Sequence[str], str]]] = {
    "start": ((words.CREATED,), words.RUNNING),
    "pause": ((words.RUNNING,), words.PAUSED),
    "resume": ((words.PAUSED,), words.RUNNING),
    "stop": ((words.CREATED, words.RUNNING, words.PAUSED), words.STOPPED),
}


def put(trials: Trials, name: str, what: str, reason: str | None = None, by: str | None = None) -> Trial | None:
    """Start, pause, resume or stop an experiment.

    Args:
        trials: of its store. name: the experiment's. what: `"start"`, `"pause"`, `"resume"` or `"stop"`.
        reason, by: why and who, for the audit.

    Returns:
        The experiment after it; None, and nothing done, where it is in a state in which there is nothing to do.
    """
    before, after = _CHANGES[what]
    line = words.Decision(what, by or OPERATOR, json.dumps({"reason": reason or BY_HAND}))
    while True:
        trial = trials.trial(name)
        if trial is None or trial.state not in before:
            return None
        changed = trials.change(name, trial.revision, state=after, decision=line)
        if changed is not None:
            _tell(what, changed, reason or BY_HAND)
            return changed


def stop(opened: Opened, reason: str | None = None, by: str | None = None) -> Trial | None:
    """End an experiment: everybody gets control, and the aliases of candidates go back to its version.

    Args and result as of `put`. Where MLflow does not answer, the next look of a controller moves the aliases.

    Raises:
        StoreUnavailableError: the store cannot be used.
    """
    stopped = put(opened.trials, opened.name, "stop", reason, by)
    if stopped is not None and opened.aliases is not None:
        opened.aliases.follow(stopped, opened.trials.decisions(opened.name))
    if stopped is not None:
        opened.controller.tell()
    return stopped


def promote(
    opened: Opened,
    variant: str | None = None,
    *,
    force: bool = False,
    reason: str | None = None,
    by: str | None = None,
) -> Trial:
    """Give a candidate to everybody, and its version control's alias; done already, nothing is done.

    Args:
        opened: the experiment. variant: the candidate; default: the one that is proven better.
        force: also where the evidence does not say so yet, or cannot be believed; needs a `reason`. A candidate that
            is proven worse is not promoted.
        reason, by: why and who, for the audit.

    Returns:
        The experiment after it. Its alias has been moved too, unless MLflow did not answer any more: then the next
        look of a controller moves it.

    Raises:
        PromotionRefusedError: the evidence does not say so; its `report` has what it says of each metric. Its result
            is `fail` for a candidate that is worse, else `inconclusive`.
        PromotionConflictError: somebody moved control's alias meanwhile.
        ConfigError: an argument is impossible, or the experiment was decided otherwise.
        UnknownVersionError, RegistryUnavailableError: MLflow has not the versions, or does not answer.
        StoreUnavailableError: the store cannot be used.
    """
    name, candidates = opened.name, opened.design.variants[1:]
    if variant is not None and variant not in candidates:
        raise ConfigError(
            f"experiment {name!r}: {variant!r} is no candidate of it, which are {', '.join(map(repr, candidates))}"
            + ("; stop it to give control to everybody" if variant == opened.control else "")
        )
    if force and not reason:
        raise ConfigError("promote(force=True) needs a reason=, which is kept in the audit")
    while True:
        trial = opened.trial()
        if trial.state == words.DECIDED:
            _check_same(name, Declaration.from_json(trial.declaration).serves, variant, opened.control)
            break
        decision = opened.controller.read()
        chosen = variant or decision.winner
        forced = _checked(name, decision, chosen, force)
        assert chosen is not None
        if opened.aliases is not None:
            opened.aliases.check_control()
        told = reason or decision.candidates[chosen].reason
        evidence = {"reason": told, "forced": forced, "decision": decision.to_dict()}
        declaration = replace(Declaration.from_json(trial.declaration), serves=chosen)
        changed = opened.trials.change(
            name, trial.revision, state=words.DECIDED, declaration=declaration.to_json(),
            decision=words.Decision("promote", by or OPERATOR, json.dumps(evidence, default=str)),
        )  # fmt: skip
        if changed is not None:
            _tell("promote", changed, told, chosen)
            trial = changed
            break
    if opened.aliases is not None:
        opened.aliases.follow(trial, opened.trials.decisions(name))
    opened.controller.tell()
    if opened.aliases is not None:
        conflict = opened.aliases.conflict(opened.trials.decisions(name))
        if conflict is not None:
            raise conflict
    return trial


def remove(trials: Trials, name: str, *, force: bool = False) -> None:
    """Forget an experiment, with all that was measured. Processes that run it give control to everybody.

    It goes before its pairs: what is broken off half-way leaves nothing that goes on and is measured nowhere, only rows
    that nobody reads, which the next removal of any experiment forgets.

    Raises:
        ConfigError: it is running or paused, and `force` is not given.
        StoreUnavailableError: the store cannot be used.
    """
    trial = trials.trial(name)
    if trial is not None and trial.state in (words.RUNNING, words.PAUSED) and not force:
        raise ConfigError(
            f"the experiment {name!r} is {trial.state}, and what was measured would be lost: stop it first, or say "
            "force=True (--force)"
        )
    trials.remove(name)
    try:
        for each in trials.trials():
            if _is_left(trials, each.name):
                trials.remove(each.name)
    except StoreUnavailableError as error:
        _log.warning("The pairs of the experiment %s are forgotten with the next one: %s", name, error)


def _is_left(trials: Trials, kept: str) -> bool:
    """Whether something has the pairs of an experiment that is not there any more."""
    owner = owner_of(kept)
    if owner is None or trials.trial(kept.removesuffix(SUFFIX)) is not None:  # of an earlier release
        return False
    name, salt = owner
    found = trials.trial(name)  # after its pairs were seen: an experiment is made before they are
    its = None if found is None else salt_of(found.declaration)
    return found is None or (salt is not None and its is not None and not its.startswith(salt))


def _tell(what: str, trial: Trial, reason: str, variant: str | None = None) -> None:
    """Let listeners know, as a controller does."""
    if BUS.active:
        name = "experiment_alarm" if what in ("pause", "stop") else "experiment_moved"
        BUS.emit(
            name, time.time(), experiment=trial.name, what=what, reason=reason, stage=trial.stage, variant=variant
        )  # fmt: skip


def _check_same(name: str, serves: str | None, variant: str | None, control: str) -> None:
    if serves is None or serves == control or (variant is not None and serves != variant):
        raise ConfigError(
            f"the experiment {name!r} is decided, and everybody gets {serves!r}: make a new one to measure again, or "
            "move the alias yourself with dspy_prod.registry.promote"
        )


def _checked(name: str, decision: Decision, chosen: str | None, force: bool) -> bool:
    """Whether a promotion overrules the evidence; a PromotionRefusedError where it must not."""
    from dspy_prod.registry.aliases.gates import Check, GateReport, PromotionRefusedError, Result

    about = None if chosen is None else decision.candidates[chosen]
    believed = decision.verdict != "invalid"
    if about is not None and about.verdict == "promote" and believed:
        return False
    worse = believed and (decision if about is None else about).verdict == "rollback"
    if force and chosen is not None and not worse:
        return True
    result: Result = "fail" if worse else "inconclusive"
    reason = decision.reason if about is None or not believed else about.reason
    checks: tuple[Any, ...] = () if about is None else tuple(Check(*each) for each in _said(about))
    remedy = "" if worse else "; a person may overrule it: force (--force), with the variant and a reason"
    raise PromotionRefusedError(
        f"the experiment {name!r} promotes {'nobody' if chosen is None else repr(chosen)}: {reason}{remedy}",
        GateReport(result, checks),
    )


def _said(about: CandidateDecision) -> list[tuple[str, Any, str]]:
    results = {"worse": "fail", "better": "pass", "no_worse": "pass"}
    return [
        (each.metric, results.get(each.status, "inconclusive"), f"{each.metric} is {each.status.replace('_', ' ')}")
        for each in about.metrics
    ]  # fmt: skip

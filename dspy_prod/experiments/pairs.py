"""What pairs prove: control and a candidate that have answered the same call, the candidate unseen.

Each pair bets on the claim that the candidate is worse by more than a guardrail's margin, on the difference of the two
answers; means of bounded differences are compared by betting (Waudby-Smith and Ramdas 2024), so it may be looked at
after every pair. Chance has no part in who answers, so pairs need fewer calls than users do.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from dspy_prod.experiments.betting import Claim, LinearBet
from dspy_prod.options.metrics import Metric

SUFFIX: Final = " (shadow)"
"""How the name ends that the pairs of an experiment are kept under in the store."""

ALPHA: Final = 0.00375
"""How probable it is that a candidate which is no worse is found worse by one metric of the shadow stage."""

CAP: Final = 10.0
"""An amount counts as this many times control's mean at most."""

PAIRED: Final = ("error_rate", "fallback_rate", "cost")
"""What a pair tells of."""


def kept_under(experiment: str, salt: str) -> str:
    """The name that the pairs of an experiment have in the store; one that is made later under its name has its own."""
    return f"{experiment} [{salt[:8]}]{SUFFIX}"


def owner_of(kept: str) -> tuple[str, str | None] | None:
    """Whose pairs have this name in the store: the experiment's, and how its salt begins, None where an earlier release
    has kept them; None where it is the name of no pairs."""
    if not kept.endswith(SUFFIX):
        return None
    found = _KEPT.fullmatch(kept)
    return (kept.removesuffix(SUFFIX), None) if found is None else (found["experiment"], found["salt"])


_KEPT: Final = re.compile(rf"(?P<experiment>.*) \[(?P<salt>[^\]]*)\]{re.escape(SUFFIX)}", re.DOTALL)


@dataclass(frozen=True)
class Pair:
    """A call that both have answered.

    Attributes:
        failed, fell_back, usd: of (control, the candidate); dollars at list price, None unless both are known.
    """

    failed: tuple[bool, bool]
    fell_back: tuple[bool, bool]
    usd: tuple[float, float] | None


class PairClaim:
    """The claim that a candidate is worse on one metric by more than its margin.

    Args:
        metric: a guardrail that a pair tells of.

    Attributes:
        claim: the bets.
    """

    def __init__(self, metric: Metric) -> None:
        self.metric = metric
        self.claim = Claim(LinearBet())
        self._count, self._mean, self._squares = 0, 0.0, 0.0
        self._usual = 0.0

    def see(self, pair: Pair) -> None:
        """One pair more."""
        margin = self.metric.margin or 0.0
        if self.metric.name == "cost":
            if pair.usd is None:
                return
            control, candidate = pair.usd
            cap, ratio = CAP * self._usual, 1.0 + margin
            if cap > 0:
                self._bet((min(candidate, cap) - ratio * min(control, cap)) / cap, -ratio, margin / CAP)
            self._count_in(control)
            return
        before, after = pair.failed if self.metric.name == "error_rate" else pair.fell_back
        self._bet(float(after) - float(before) - margin, -1.0 - margin, margin)

    def _bet(self, gain: float, worst: float, margin: float) -> None:
        variance = (self._squares + 0.05) / (self._count + 1)
        for bet in self.claim.bets:
            assert isinstance(bet, LinearBet)
            bet.bet(gain, worst, margin / variance)
        self.claim.settle()
        if self.metric.name != "cost":
            self._count_in(gain)
        else:
            self._squares += gain * gain

    def _count_in(self, value: float) -> None:
        self._count += 1
        before = self._mean
        self._mean += (value - self._mean) / self._count
        if self.metric.name == "cost":
            self._usual = self._mean
        else:
            self._squares += (value - before) * (value - self._mean)

    def state(self) -> dict[str, Any]:
        """As JSON has it."""
        return {
            "claim": self.claim.state(), "count": self._count, "mean": self._mean, "squares": self._squares,
        }  # fmt: skip

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`."""
        self.claim.restore(state["claim"])
        self._count, self._mean, self._squares = state["count"], state["mean"], state["squares"]
        self._usual = self._mean if self.metric.name == "cost" else 0.0


class Pairs:
    """What is known of the candidates of a shadow stage.

    Args:
        metrics: of the experiment. candidates: their names.

    Attributes:
        counts: pairs of each candidate. failed: those in which it failed. refused: calls that a limit, a budget or
            a deadline kept from being answered, which are no pairs.
    """

    def __init__(self, metrics: Sequence[Metric], candidates: Sequence[str]) -> None:
        told = [each for each in metrics if each.name in PAIRED and each.role == "guardrail"]
        self._claims = {name: [PairClaim(metric) for metric in told] for name in candidates}
        self.counts, self.failed, self.refused = (dict.fromkeys(candidates, 0) for _ in range(3))

    def see(self, candidate: str, pair: Pair | None) -> None:
        """One pair more of a candidate; None: a call of it was refused."""
        if pair is None:
            self.refused[candidate] += 1
            return
        self.counts[candidate] += 1
        self.failed[candidate] += pair.failed[1]
        for each in self._claims[candidate]:
            each.see(pair)

    def worse(self) -> dict[str, str]:
        """The candidates that are proven worse, and on what, in words."""
        found = {}
        for name, claims in self._claims.items():
            told = [
                f"{each.metric.name} (e-value {each.claim.peak:.3g} of {1 / ALPHA:.3g} needed)"
                for each in claims
                if each.claim.peak >= 1 / ALPHA
            ]
            if told:
                found[name] = f"{name} is worse on {' and '.join(told)} in {self.counts[name]} calls that nobody saw"
        return found

    def state(self) -> dict[str, Any]:
        """As JSON has it."""
        return {
            "counts": self.counts,
            "failed": self.failed,
            "refused": self.refused,
            "claims": {name: [each.state() for each in claims] for name, claims in self._claims.items()},
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`."""
        self.counts.update(state["counts"])
        self.failed.update(state.get("failed", {}))
        self.refused.update(state.get("refused", {}))
        for name, claims in state["claims"].items():
            for mine, kept in zip(self._claims[name], claims, strict=True):
                mine.restore(kept)

"""Who gets which variant: a pure function of a unit's name, the stage, and which candidates take no new units.

Two independent numbers in [0, 1) come from one hash of the experiment's salt and the unit. The second says which
candidate a unit would get, whatever the stage; the first says whether the stage's share reaches it yet. So when the
share grows, a unit may move from control to its candidate, and never otherwise; and the propensity of every arm is
known exactly, which is what the statistics need.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import accumulate
from math import isfinite
from typing import Final, NamedTuple

from dspy_prod.errors import ConfigError
from dspy_prod.stores.trials import Arm

MOST_VARIANTS: Final = 8
"""Control and at most seven candidates: with more, each would need too many units before anything is known of it."""

HASH: Final = "hash"
OVERRIDE: Final = "override"
ELSEWHERE: Final = "elsewhere"
HOLDOUT: Final = "holdout"
KEPT: Final = "kept"
UNKNOWN: Final = "unknown"

_SCALE: Final = 2.0**-53


class Assignment(NamedTuple):
    """What a unit gets.

    Attributes:
        variant: its arm.
        propensity: the probability with which a unit that was not exposed yet gets this arm, at this stage.
        stage: the stage, from 0.
        full: which candidates took no new units: bit i stands for candidate i, from 0 in the order of declaration.
        how: `"hash"`; or `"override"`, `"elsewhere"` (by `assign=`), `"holdout"`, `"kept"` (its candidate is full,
            and the unit was in it before), `"unknown"` (whether it was could not be read).
    """

    variant: str
    propensity: float
    stage: int
    full: int
    how: str

    @property
    def random(self) -> bool:
        """Whether chance had a say: only then does the unit tell anything of the variants, and is it an exposure.

        A unit that gets control because nobody could get anything else (a shadow stage, full candidates, the holdout)
        is not taken into the experiment by that. Should it come again later, its position in the hash is as random
        as that of any newcomer.
        """
        return self.propensity < 1.0


class Design:
    """How units are assigned; the same in every process, and after a restart. Does not change once it is made.

    Args:
        salt: tells this experiment's hash from that of others; an experiment that begins anew gets another one.
        variants: the arms, control first; at most 8.
        weights: any positive numbers, one for each arm; equal by default. Without `shares` they are the split; with
            them, those of the candidates say how a stage's share is divided among them.
        shares: for each stage, the share of the units that get any candidate, from 0 (a shadow stage) to 1, never
            falling.
        holdout: share of the units of a program that none of its experiments may use; they get control.
        program: whose holdout it is: the same units are held out in all experiments of one program.
        overrides: the arms of units that are not left to chance.
        assign: decides elsewhere, with the declared weights: takes a unit, returns its arm, the same each time.

    Attributes:
        salt, variants, weights, shares, holdout, overrides: what was given, or its default.

    Raises:
        ConfigError: an argument is impossible; the message names it, and the remedy.

    Example:
        >>> design = Design("triage", ("control", "cot"), shares=(0.0, 0.25, 0.5))
        >>> design.propensities(1)
        (0.75, 0.25)
        >>> design.assign("u1", 0).variant
        'control'
    """

    def __init__(
        self,
        salt: str,
        variants: Sequence[str],
        *,
        weights: Sequence[float] | None = None,
        shares: Sequence[float] | None = None,
        holdout: float = 0.0,
        program: str = "",
        overrides: Mapping[str, str] | None = None,
        assign: Callable[[str], str] | None = None,
    ) -> None:
        if not salt:
            raise ConfigError("salt='' tells no experiment from others; give its name")
        self.salt = salt
        self.variants = tuple(variants)
        _check_variants(self.variants)
        self.weights = (1.0,) * len(self.variants) if weights is None else tuple(weights)
        _check_weights(self.variants, self.weights)
        total = sum(self.weights[1:])
        self.shares = (total / (total + self.weights[0]),) if shares is None else tuple(shares)
        _check_shares(self.shares)
        if not 0 <= holdout < 1:
            raise ConfigError(f"holdout={holdout!r} must be a share of the units: 0 <= holdout < 1")
        self.holdout = holdout
        self.overrides = dict(overrides or {})
        for unit, variant in self.overrides.items():
            if variant not in self.variants:
                raise ConfigError(f"overrides={{{unit!r}: {variant!r}}} names no variant; use one of {self.variants}")
        if assign is not None and len(self.shares) > 1:
            raise ConfigError("assign= decides who gets what, which stages cannot change: leave out rollout=")
        self._assign = assign
        self._parts = tuple(weight / total for weight in self.weights[1:])
        self._bounds = tuple(accumulate(self._parts))[:-1]
        self._salted = hashlib.sha256(_prefix(salt))
        self._held_out = hashlib.sha256(b":" + _prefix(program))  # as no salt begins
        self._propensities = {(stage, 0): self._shared(stage, 0) for stage in range(len(self.shares))}

    def propensities(self, stage: int = 0, full: int = 0) -> tuple[float, ...]:
        """The probability of each arm for a unit that was not exposed yet, in the order of `variants`.

        Args:
            stage: from 0.
            full: the candidates that take no new units, see `Assignment`: theirs is 0, and control has it.
        """
        known = self._propensities.get((stage, full))
        if known is None:
            known = self._propensities[stage, full] = self._shared(stage, full)
        return known

    def assign(
        self, unit: str, stage: int = 0, full: int = 0, known: Callable[[], str | None] | None = None
    ) -> Assignment:
        """What a unit gets.

        Args:
            unit: its name (the targeting key), e.g. a user's id.
            stage: from 0.
            full: the candidates that take no new units, see `Assignment`.
            known: tells the arm in which the unit was seen last; called only where its candidate is full, for a unit
                that was in it before stays there.

        Raises:
            ConfigError: `assign=` returned what is no variant. What it raises itself is raised, too.
        """
        if self.overrides:
            variant = self.overrides.get(unit)
            if variant is not None:
                return Assignment(variant, 1.0, stage, full, OVERRIDE)
        name = unit.encode("utf-8", "surrogatepass")
        if self.holdout and self._is_held_out(name):
            return Assignment(self.variants[0], 1.0, stage, full, HOLDOUT)
        if self._assign is not None:
            return self._from_elsewhere(unit, stage, full, known)
        propensities = self.propensities(stage, full)
        position, choice = self._place(name)
        if position >= self.shares[stage]:
            return Assignment(self.variants[0], propensities[0], stage, full, HASH)
        index = bisect_right(self._bounds, choice)
        return self._let_in(1 + index, stage, full, known, HASH)

    def reaches(self, unit: str, stage: int) -> bool:
        """Whether a stage's share reaches a unit: it gets a candidate in it, or would if that took new units."""
        return self._place(unit.encode("utf-8", "surrogatepass"))[0] < self.shares[stage]

    def full(self, arms: Iterable[Arm], stage: int, most: int | None) -> int:
        """The candidates that take no new units in a stage, a bit for each, see `Assignment`.

        Args:
            arms: what the store has counted (`Trials.counts`).
            most: units that a candidate may have in this stage (`Rollout.most_users`); None: any number.
        """
        if most is None:
            return 0
        found = dict.fromkeys(self.variants[1:], 0)
        for arm in arms:
            if arm.stage == stage and arm.arm in found:
                found[arm.arm] += arm.units
        return sum(1 << index for index, number in enumerate(found.values()) if number >= most)

    def _let_in(
        self, place: int, stage: int, full: int, known: Callable[[], str | None] | None, how: str
    ) -> Assignment:
        """The arm at this place, or control where that takes no new units."""
        propensities = self.propensities(stage, full)
        if place and full >> (place - 1) & 1:
            if known is not None and known() == self.variants[place]:
                return Assignment(self.variants[place], 1.0, stage, full, KEPT)
            place = 0
        return Assignment(self.variants[place], propensities[place], stage, full, how)

    def _shared(self, stage: int, full: int) -> tuple[float, ...]:
        share = self.shares[stage]
        candidates = [0.0 if full >> index & 1 else share * part for index, part in enumerate(self._parts)]
        if not any(candidates):
            return (1.0, *candidates)
        given_up = sum(part for index, part in enumerate(self._parts) if full >> index & 1)
        return (1.0 - share + share * given_up, *candidates)

    def _place(self, name: bytes) -> tuple[float, float]:
        """The unit's two numbers in [0, 1), of 53 bits each."""
        digest = self._salted.copy()
        digest.update(name)
        bits = int.from_bytes(digest.digest()[:16], "big")
        return (bits >> 75) * _SCALE, ((bits & 0xFFFFFFFFFFFFFFFF) >> 11) * _SCALE

    def _is_held_out(self, name: bytes) -> bool:
        digest = self._held_out.copy()
        digest.update(name)
        return (int.from_bytes(digest.digest()[:8], "big") >> 11) * _SCALE < self.holdout

    def _from_elsewhere(self, unit: str, stage: int, full: int, known: Callable[[], str | None] | None) -> Assignment:
        assert self._assign is not None
        variant = self._assign(unit)
        if variant not in self.variants:
            raise ConfigError(f"assign={self._assign!r} returned {variant!r}, which is no variant of {self.variants}")
        return self._let_in(self.variants.index(variant), stage, full, known, ELSEWHERE)


def _prefix(salt: str) -> bytes:
    """`salt:`, so that no salt and unit make the same text as another salt and another unit."""
    return salt.replace("%", "%25").replace(":", "%3A").encode("utf-8", "surrogatepass") + b":"


def _check_variants(variants: tuple[str, ...]) -> None:
    if not 2 <= len(variants) <= MOST_VARIANTS:
        raise ConfigError(
            f"variants={variants!r}: an experiment has control and 1 to {MOST_VARIANTS - 1} candidates; "
            f"{'leave some for a next one' if len(variants) > MOST_VARIANTS else 'name what is to be compared'}"
        )
    for index, variant in enumerate(variants):
        if not isinstance(variant, str) or not variant:
            raise ConfigError(f"variants: {variant!r} must be a name, such as 'candidate'")
        if variant in variants[:index]:
            raise ConfigError(f"variants: {variant!r} is there twice; give each variant a name of its own")


def _check_weights(variants: tuple[str, ...], weights: tuple[float, ...]) -> None:
    if len(weights) != len(variants):
        raise ConfigError(f"weights={weights!r} must be one number for each of {variants}")
    for variant, weight in zip(variants, weights, strict=True):
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not (isfinite(weight) and weight > 0):
            raise ConfigError(f"weights: {variant!r} has {weight!r}; a weight is a positive number, such as 1")


def _check_shares(shares: tuple[float, ...]) -> None:
    if not shares or not all(0 <= share <= 1 for share in shares) or list(shares) != sorted(shares):
        raise ConfigError(f"shares={shares!r} must be shares of the units, 0 to 1, none below the one before it")

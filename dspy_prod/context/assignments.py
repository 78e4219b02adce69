"""Which variants of which experiments a call belongs to: experiments nest, the outermost first."""

from __future__ import annotations

from typing import Final, NamedTuple

TAG: Final = "experiment:"
"""How the tag begins that a call has for each experiment around the innermost: `experiment:<name>` = its variant."""


class Assignment(NamedTuple):
    """One unit's place in one experiment.

    Attributes:
        experiment: its name. variant: the arm; None while only the experiment was said.
        stage: the stage of a rollout, when there are any.
        unit: what is assigned, as a user.
        propensity: how likely this variant was for the unit, at that moment; 0 to 1.
    """

    experiment: str
    variant: str | None = None
    stage: str | None = None
    unit: str | None = None
    propensity: float | None = None


def nested(outer: tuple[Assignment, ...], inner: Assignment) -> tuple[Assignment, ...]:
    """The assignments within one more.

    Raises:
        ValueError: the experiment is one of those around it: its calls would count for two variants at once.
    """
    for each in outer:
        if each.experiment == inner.experiment:
            raise ValueError(
                f"The experiment {inner.experiment!r} is nested in itself: this call belongs to its variant "
                f"{each.variant!r} already and cannot belong to {inner.variant!r} as well. Leave the outer "
                "call_context(experiment=...) first, or give the inner experiment a name of its own"
            )
    return (*outer, inner)


def outer_tags(assignments: tuple[Assignment, ...]) -> dict[str, str]:
    """The tags for all but the innermost, whose names are fields of their own."""
    return {f"{TAG}{each.experiment}": each.variant or "" for each in assignments[:-1]}

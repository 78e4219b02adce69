"""The form of what can be asked: frozen models; and how tracking goes, for who only looks."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Frozen(BaseModel):
    """Base of all answers."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class TrackingHealth(Frozen):
    """How the tracking in MLflow goes.

    Attributes:
        uri: where traces go, without a password. experiment: name of the MLflow experiment.
        exported: traces in MLflow. waiting: not there yet, those of running calls included.
        sampled_out: left out by `sample`. lost: turned away because too many waited, refused by MLflow, or given up.
        failing: why nothing can be delivered at the moment, None when it can.
    """

    uri: str
    experiment: str
    exported: int
    waiting: int
    sampled_out: int
    lost: int
    failing: str | None

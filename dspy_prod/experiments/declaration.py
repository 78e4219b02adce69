"""What an experiment is, as the store keeps it: so that every process assigns alike, and measures the same."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from dspy_prod.errors import ConfigError
from dspy_prod.options.metrics import Metric

if TYPE_CHECKING:
    from dspy_prod.experiments.variants import Variant
    from dspy_prod.stores.trials import Trial, Trials

_OWN: Final = frozenset({"salt", "serves", "pinned", "dropped", "registry"})
"""What the first process decides, or the controller, and nobody has to repeat."""

BUILT_IN: Final = frozenset({"error_rate", "fallback_rate", "cost", "latency"})
"""Metrics that calls tell by themselves."""


@dataclass(frozen=True)
class Declaration:
    """What an experiment is.

    Attributes:
        salt: of its hash, drawn by the process that makes it first.
        variants: what each was given as, see `Variant.exact`, control first. weights: their split.
        pinned: the published version of each that has one, `"triage/3"`, found when the experiment was made.
        metrics: as `Metric.model_dump`. rollout: as `Rollout.model_dump`; None without one.
        unit: `"user"`, `"session"` or `"tenant"`. holdout: share of the units that no experiment may use.
        overrides: arms of units that are not left to chance. elsewhere: whether `assign=` decides.
        alpha: how probable a wrong decision may be.
        judged: share of the units that a judge looks at, by metric.
        hold: whether a sample ratio that is off pauses it; else everybody gets control.
        horizon: when it pauses if it is still undecided, see `Horizon.declared`; None: never.
        registry: the MLflow store with the versions; None without any, or where its address holds a password.
        serves: the variant that everybody gets once it is decided; None while units are assigned.
        dropped: candidates that were found worse than control while others go on: their units get control.
    """

    salt: str
    variants: Mapping[str, str]
    weights: Sequence[float]
    metrics: Sequence[Mapping[str, Any]]
    unit: str = "user"
    rollout: Mapping[str, Any] | None = None
    holdout: float = 0.0
    overrides: Mapping[str, str] = field(default_factory=dict)
    elsewhere: bool = False
    alpha: float = 0.05
    judged: Mapping[str, float] = field(default_factory=dict)
    hold: bool = True
    horizon: Mapping[str, Any] | None = None
    registry: str | None = None
    pinned: Mapping[str, str] = field(default_factory=dict)
    serves: str | None = None
    dropped: Sequence[str] = ()

    @classmethod
    def of(cls, variants: Sequence[Variant], metrics: Sequence[Metric], **more: Any) -> Declaration:
        """A new one, with a salt of its own."""
        return cls(
            salt=secrets.token_hex(8),
            variants={each.name: each.exact for each in variants},
            metrics=[each.model_dump(mode="json") for each in metrics],
            pinned={each.name: each.version for each in variants if each.version is not None},
            **more,
        )

    def to_json(self) -> str:
        """For the store. Variants keep their order, which says who is control and who gets which part of a share."""
        said = asdict(self)
        if self.horizon is None:
            del said["horizon"]  # which earlier releases do not know
        return json.dumps(said)

    @classmethod
    def from_json(cls, text: str) -> Declaration:
        """Read it back."""
        return cls(**json.loads(text))

    def check_same(self, name: str, stored: Declaration) -> None:
        """Refuse to measure something else under the name of an experiment that there is.

        Raises:
            ConfigError: names what differs, and the remedy.
        """
        mine, theirs = (json.loads(json.dumps(asdict(each))) for each in (self, stored))
        for each in (mine, theirs):
            each["variants"] = list(each["variants"].items())
        for key in mine:
            if key not in _OWN and mine[key] != theirs[key]:
                raise ConfigError(
                    f"Experiment({name!r}): there is one of this name with {key}={theirs[key]!r}, not "
                    f"{mine[key]!r}. What was measured would be mixed up: give this one a name of its own, or forget "
                    f"the other with `dspy-prod experiment rm {name}`"
                )

    def windows(self, metrics: Sequence[Metric]) -> dict[str | None, float]:
        """Seconds after its exposure in which a unit's outcomes count, by metric; of calls under None.

        Raises:
            ConfigError: metrics that calls tell have different windows.
        """
        found: dict[str | None, float] = {}
        for metric in metrics:
            source = source_of(metric)
            if found.setdefault(source, metric.window) != metric.window:
                names = ", ".join(each.name for each in metrics if source_of(each) is source)
                raise ConfigError(
                    f"metrics: {names} are read from the same calls: give them one window, not {found[source]:g} and "
                    f"{metric.window:g} seconds"
                )
        found.setdefault(None, 0.0)
        return found


def still_there(trials: Trials, name: str, salt: str) -> tuple[Trial, Declaration] | None:
    """An experiment and what it is; None once it was removed, whatever has its name now.

    Raises:
        StoreUnavailableError: the store cannot be read.
    """
    trial = trials.trial(name)
    if trial is None or salt_of(trial.declaration) != salt:
        return None
    return trial, Declaration.from_json(trial.declaration)


def salt_of(declaration: str) -> str | None:
    """The salt that an experiment's declaration tells; None where it cannot be read, as one of a later release may."""
    try:
        salt = json.loads(declaration)["salt"]
    except (ValueError, KeyError, TypeError):
        return None
    return salt if isinstance(salt, str) else None


def source_of(metric: Metric) -> str | None:
    """Under which name the store has its outcomes; None: it is read from calls."""
    return None if metric.name in BUILT_IN else metric.name


def registry_of(variants: Sequence[Variant], tracking_uri: str | None) -> str | None:
    """The MLflow store with the versions of an experiment, for whoever works without its code; see `Declaration`."""
    if not any(each.kind == "version" for each in variants):
        return None
    from dspy_prod.registry.server import server_at

    server = server_at(tracking_uri)
    if server.place != server.uri:
        return None
    scheme, relative, path = server.uri.partition(":///")
    if relative and scheme.startswith("sqlite") and not path.startswith("/"):
        return f"{scheme}:///{Path(path).absolute()}"  # whoever reads it may stand elsewhere
    return str(server.uri)

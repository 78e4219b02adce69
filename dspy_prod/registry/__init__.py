"""Program versions in MLflow's prompt registry: publish, load, promote, deploy, roll back, and follow.

A version is immutable and numbered; aliases (`staging`, `canary`, `production`, `previous`) point to versions and move.
Importing this module does not import MLflow. Versions themselves are in `published`, moves in `aliases`, whole
deployments in `deployment`; here stands what they share: MLflow's server within bounded time, names, files, errors.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dspy_prod.registry.aliases.gates import Check, Gate, GateReport
    from dspy_prod.registry.aliases.journal import AuditEntry
    from dspy_prod.registry.aliases.listing import programs, versions
    from dspy_prod.registry.aliases.promotion import history, promote, rollback
    from dspy_prod.registry.deployment.deploy import deploy
    from dspy_prod.registry.deployment.report import Deployment, Step
    from dspy_prod.registry.errors import (
        PromotionConflictError,
        PromotionRefusedError,
        RegistryError,
        RegistryUnavailableError,
        SignatureMismatchError,
        UnknownVersionError,
    )
    from dspy_prod.registry.published.difference import PredictorDiff, VersionDiff, diff
    from dspy_prod.registry.published.loading import load
    from dspy_prod.registry.published.manifest import ProgramVersion
    from dspy_prod.registry.published.publishing import publish

_HOME = {
    "publish": "published.publishing",
    "load": "published.loading",
    "promote": "aliases.promotion",
    "rollback": "aliases.promotion",
    "history": "aliases.promotion",
    "deploy": "deployment.deploy",
    "Deployment": "deployment.report",
    "Step": "deployment.report",
    "diff": "published.difference",
    "PredictorDiff": "published.difference",
    "VersionDiff": "published.difference",
    "programs": "aliases.listing",
    "versions": "aliases.listing",
    "AuditEntry": "aliases.journal",
    "Check": "aliases.gates",
    "Gate": "aliases.gates",
    "GateReport": "aliases.gates",
    "ProgramVersion": "published.manifest",
    "PromotionConflictError": "errors",
    "PromotionRefusedError": "errors",
    "RegistryError": "errors",
    "RegistryUnavailableError": "errors",
    "SignatureMismatchError": "errors",
    "UnknownVersionError": "errors",
}

__all__ = [
    "AuditEntry",
    "Check",
    "Deployment",
    "Gate",
    "GateReport",
    "PredictorDiff",
    "ProgramVersion",
    "PromotionConflictError",
    "PromotionRefusedError",
    "RegistryError",
    "RegistryUnavailableError",
    "SignatureMismatchError",
    "Step",
    "UnknownVersionError",
    "VersionDiff",
    "deploy",
    "diff",
    "history",
    "load",
    "programs",
    "promote",
    "publish",
    "rollback",
    "versions",
]


def __getattr__(name: str) -> Any:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module 'dspy_prod.registry' has no attribute {name!r}")
    value = getattr(import_module(f"dspy_prod.registry.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])

"""Program versions in MLflow's prompt registry: publish, load, promote, deploy, roll back, and follow.

A version is immutable and numbered; aliases (`staging`, `canary`, `production`, `previous`) point to versions and move.
Importing this module does not import MLflow. Versions themselves are in `published`, moves in `aliases`, whole
deployments in `deployment`; here stands what they share: MLflow's server within bounded time, names, files, errors.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dspy_prod.runtime.doors import door

if TYPE_CHECKING:
    from dspy_prod.registry.aliases.gates import Check, Gate, GateReport, PromotionRefusedError
    from dspy_prod.registry.aliases.journal import AuditEntry
    from dspy_prod.registry.aliases.listing import history, programs, versions
    from dspy_prod.registry.aliases.promotion import promote, rollback
    from dspy_prod.registry.deployment.deploy import deploy
    from dspy_prod.registry.deployment.report import Deployment, Step
    from dspy_prod.registry.errors import (
        PromotionConflictError,
        RegistryError,
        RegistryUnavailableError,
        SignatureMismatchError,
        UnknownVersionError,
    )
    from dspy_prod.registry.published.difference import PredictorDiff, VersionDiff, diff
    from dspy_prod.registry.published.loading import load
    from dspy_prod.registry.published.manifest import ProgramVersion
    from dspy_prod.registry.published.publishing import publish

__getattr__, __dir__ = door(
    __name__,
    {
        "aliases.gates": "Check Gate GateReport PromotionRefusedError",
        "aliases.journal": "AuditEntry",
        "aliases.listing": "history programs versions",
        "aliases.promotion": "promote rollback",
        "deployment.deploy": "deploy",
        "deployment.report": "Deployment Step",
        "errors": "PromotionConflictError RegistryError RegistryUnavailableError "
        "SignatureMismatchError UnknownVersionError",
        "published.difference": "PredictorDiff VersionDiff diff",
        "published.loading": "load",
        "published.manifest": "ProgramVersion",
        "published.publishing": "publish",
    },
)

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

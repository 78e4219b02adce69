"""Where a version comes from: dataset, git commit, MLflow run, experiment, and who published it."""

from __future__ import annotations

import getpass
import platform
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from dspy.adapters.utils import serialize_for_json

from dspy_prod.compat.mlflow import chosen_experiment
from dspy_prod.errors import ConfigError
from dspy_prod.registry.published.manifest import sha256
from dspy_prod.registry.published.states import to_text


def dataset_name(dataset: str | Sequence[Any] | None) -> str | None:
    """A dataset's name as given, or digest and size of its examples in their order; else a ConfigError."""
    if dataset is None or isinstance(dataset, str):
        return dataset
    try:
        rows = [{key: serialize_for_json(value) for key, value in example.items()} for example in list[Any](dataset)]
    except (TypeError, AttributeError):
        raise ConfigError(f"dataset= takes a name or a list of dspy.Example, got {type(dataset).__name__}") from None
    return f"sha256:{sha256(to_text(rows))[:16]} ({len(rows)} examples)"


def active() -> tuple[str | None, str | None]:
    """The MLflow run that is active in this thread, and the experiment that was chosen in this process."""
    if "mlflow" not in sys.modules:
        return None, None
    import mlflow

    run = mlflow.active_run()
    if run is not None:
        return str(run.info.run_id), str(run.info.experiment_id)
    chosen = chosen_experiment()
    return None, None if chosen is None else str(chosen)


def git_commit() -> str | None:
    """The commit of the working directory, None outside a repository."""
    commit = _git("rev-parse", "HEAD")
    if not commit:
        return None
    return f"{commit}-dirty" if _git("status", "--porcelain", "--untracked-files=no") else commit


def author() -> str:
    """Who runs this process: user@machine."""
    try:
        user = getpass.getuser()
    except Exception:  # a container without a user database
        user = "unknown"
    return f"{user}@{platform.node() or 'localhost'}"


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(("git", *arguments), capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None

"""What the processes that write to MLflow begin with."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.parametrize("module", ["exporter", "runs_exporter"])
def test_they_need_no_dspy_and_load_mlflow_only_when_told_where(module: str) -> None:
    """Loading DSPy took each of them a second of the processor for nothing."""
    code = (
        f"import sys, dspy_prod.tracking.{module}; print(*{{'dspy', 'litellm', 'mlflow', 'numpy'}} & {{*sys.modules}})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.split() == []

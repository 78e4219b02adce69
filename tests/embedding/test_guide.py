"""The code of the guide to embeddings runs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from dspy_prod.testing import Provider

GUIDE = Path(__file__).parents[2] / "docs" / "guide"


def blocks(page: str) -> str:
    """The Python of a page, in order."""
    return "\n\n".join(re.findall(r"^```python\n(.*?)^```", (GUIDE / page).read_text("utf-8"), re.M | re.S))


@pytest.mark.long
def test_embeddings(tmp_path: Path) -> None:
    with Provider() as provider:
        own = {"OPENAI_API_BASE": provider.url, "OPENAI_API_KEY": "test", "PYTHONPATH": str(GUIDE.parents[1])}
        done = subprocess.run(
            [sys.executable, "-W", "error::DeprecationWarning:dspy_prod", "-c", blocks("embeddings.md")],
            cwd=tmp_path, env={**os.environ, **own, "HOME": str(tmp_path)}, capture_output=True, text=True, timeout=280,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "is another model" in done.stdout
    assert [call.body["input"] for call in provider.calls][:2] == [["a text"], ["another"]]

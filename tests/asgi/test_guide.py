"""The guide's page about services does what it says."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from dspy_prod.asgi.refusing import STATUSES
from dspy_prod.testing import Provider

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "guide" / "service.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


@pytest.mark.long
def test_every_block_of_the_page_runs(tmp_path: Path) -> None:
    """From top to bottom, in a fresh process, against a provider; and prints what it says."""
    script = tmp_path / "page.py"
    script.write_text("\n\n".join(BLOCKS), encoding="utf-8")
    with Provider() as provider:
        run = subprocess.run(
            [sys.executable, "-W", "error::DeprecationWarning:dspy_prod", str(script)],
            cwd=tmp_path,
            env={
                "PATH": "",
                "HOME": str(tmp_path),
                "PYTHONPATH": str(ROOT),
                "LITELLM_LOCAL_MODEL_COST_MAP": "True",
                "DSPY_PROD__LM__SMALL__API_BASE": provider.url,
                "DSPY_PROD__LM__SMALL__ENGINE": "lm15",
                "DSPY_PROD__PRICES": '{"openai/gpt-4o-mini": {"input": 0.15, "output": 0.6}}',
                "OPENAI_API_KEY": "test",
            },
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert run.returncode == 0, run.stderr
        assert len(provider.calls) == 1
    printed = re.findall(r"^print\(.*#\s(.+)$", PAGE, re.MULTILINE)
    assert run.stdout.splitlines() == printed == ["200 ok", "400 invalid_header"]


def test_the_page_has_every_reason_with_its_status() -> None:
    """A client's author finds each of them in the table."""
    rows = re.findall(r"^\| (`.+?`) \| (\d{3}) \|", PAGE, re.MULTILINE)
    shown = {reason: int(status) for reasons, status in rows for reason in re.findall(r"`(\w+)`", reasons)}
    assert shown == {**{reason: status for reason, status in STATUSES.items() if reason != "rejected"},
                     "invalid_header": 400, "shutting_down": 503}  # fmt: skip


def test_the_example_is_as_short_as_it_is_said() -> None:
    """A service needs little more than its program."""
    assert len((ROOT / "examples" / "service" / "app.py").read_text(encoding="utf-8").splitlines()) < 60

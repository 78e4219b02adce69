"""The README does what it says: every code block is executed, every command exists."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from dspy_prod.testing import Provider

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    """The README's code blocks in a language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


@pytest.mark.long
def test_every_python_block_runs(tmp_path: Path) -> None:
    """The README's Python, from top to bottom in one fresh process, runs against a provider."""
    script = tmp_path / "readme.py"
    script.write_text("\n\n".join(blocks("python")), encoding="utf-8")
    with Provider() as provider:
        run = subprocess.run(
            [sys.executable, "-W", "error::DeprecationWarning:dspy_prod", str(script)],
            cwd=tmp_path,
            env={
                "PATH": "",
                "HOME": str(tmp_path),
                "PYTHONPATH": str(ROOT),
                "LITELLM_LOCAL_MODEL_COST_MAP": "True",
                "OPENAI_API_BASE": provider.url,
                "OPENAI_API_KEY": "test",
            },
            capture_output=True,
            text=True,
            timeout=280,
        )
        assert run.returncode == 0, run.stderr
        assert len(provider.calls) >= 2
    assert "ok openai/gpt-4o-mini" in run.stdout
    assert "healthy" in run.stdout


@pytest.mark.parametrize("picture", re.findall(r"!\[[^]]+\]\(([^)]+)\)", README))
def test_every_picture_is_there_and_small(picture: str) -> None:
    """The README's pictures exist and are quick to load."""
    size = (ROOT / picture).stat().st_size
    assert 5_000 < size < 200_000


@pytest.mark.parametrize("page", sorted(set(re.findall(r"\]\((?!https?:|#)([^)#]+)", README))))
def test_every_link_resolves(page: str) -> None:
    """The README's links lead to files that exist."""
    assert (ROOT / page).exists()


@pytest.mark.parametrize("target", sorted(set(re.findall(r"(?:`|\$ )make ([a-z-]+)", README))))
def test_every_make_target_exists(target: str) -> None:
    """Each `make` command in the README is a target of the Makefile."""
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE), target


@pytest.mark.parametrize("command", sorted(set(re.findall(r"`dspy-prod ([a-z]+)", README))))
def test_every_command_exists(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Each `dspy-prod` command in the README is known to the parser."""
    from dspy_prod.cli import main

    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    assert end.value.code == 0
    assert command in capsys.readouterr().out

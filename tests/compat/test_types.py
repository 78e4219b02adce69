"""A user's own type checker: DSPy is as usable to it beside this library as without."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

BIN = Path(sys.executable).parent

PLAIN = '''
import dspy


class Answer(dspy.Signature):
    """Answer."""

    question: str = dspy.InputField()
    answer: str = dspy.OutputField()


lm = dspy.LM("openai/gpt-4o-mini")
dspy.configure(lm=lm)
program = dspy.ChainOfThought(Answer)
example = dspy.Example(question="1 + 1?").with_inputs("question")
with dspy.context(lm=lm):
    print(program(question=example.question).answer)
'''

OURS = (
    PLAIN.replace("import dspy\n", "import dspy\n\nimport dspy_prod\n", 1)
    .replace('dspy.LM("openai/gpt-4o-mini")', 'dspy_prod.LM("openai/gpt-4o-mini", budget=dspy_prod.Budget(usd=1))')
    .replace("= dspy.ChainOfThought(Answer)", "= dspy_prod.Production(dspy.ChainOfThought(Answer))")
    + "print(lm.health().status, dspy_prod.wrap(dspy.LM('openai/gpt-4o')).costs())\n"
)


@pytest.fixture
def scripts(tmp_path: Path) -> tuple[Path, Path]:
    """The same script without and with this library, in a directory that knows nothing of its project."""
    plain, ours = tmp_path / "plain.py", tmp_path / "ours.py"
    plain.write_text(PLAIN)
    ours.write_text(OURS)
    return plain, ours


@pytest.mark.slow
def test_mypy_finds_nothing_new(scripts: tuple[Path, Path], tmp_path: Path) -> None:
    """Once every `dspy.X` was "Module has no attribute", because mypy had followed us into DSPy's one typed package.

    Each script is looked at by itself: what one of them makes mypy follow, it follows for the others too.
    """
    without, beside = (_mypy(script, tmp_path / script.stem) for script in scripts)
    assert beside <= without


def _mypy(script: Path, cache: Path) -> set[str]:
    """The errors in a script."""
    command = [BIN / "mypy", "--strict", "--cache-dir", cache, "--no-color-output", script]
    done = subprocess.run(command, cwd=script.parent, capture_output=True, text=True, timeout=110, check=False)
    assert done.stderr == ""
    assert "checked 1 source file" in done.stdout
    return set(re.findall(rf"^{script.name}:\d+: error: (.*)$", done.stdout, re.MULTILINE))


@pytest.mark.slow
def test_pyright_finds_nothing_new(scripts: tuple[Path, Path], tmp_path: Path) -> None:
    """Neither errors, nor a warning about a name of this library."""
    command = [BIN / "basedpyright", "--pythonpath", sys.executable, "--outputjson", *scripts]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=110, check=False)
    found = json.loads(done.stdout)["generalDiagnostics"]
    assert [each["message"] for each in found if each["severity"] == "error" or "dspy_prod" in each["message"]] == []

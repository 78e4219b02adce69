"""A name that is gone: the way round is taken, or an error says which versions fit."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


def run(code: str, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter, in which names can be taken away before the library is imported."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    command = [sys.executable, "-W", "error::DeprecationWarning:__main__", "-c", code]
    return subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60, check=False)


CALLS = """
import asyncio, dspy_prod
from dspy_prod.testing import ScriptedEngine
engine = ScriptedEngine(["one", "two", "three"])
lm = dspy_prod.LM("openai/x", engine=engine, async_engine=engine.asynchronous, store="memory://m",
    namespace="m", prices={"openai/x": dspy_prod.Price(input=1, output=1)})
print(lm("a"), lm("a"), asyncio.run(lm.acall("b")), lm("c", rollout_id=1, temperature=1.0), engine.calls)
print([entry["cached"] for entry in lm.history], [record.cached for record in lm.ledger.records()])
print(lm.preview("d").affordable)
"""


def test_another_executor_of_dspy_s_is_used_as_it_is(tmp_path: Path) -> None:
    """A step with a parameter more is not called by its old ones: DSPy's own executor is, after one warning."""
    taken = """
from dspy.clients import execution
step = execution._result
execution._result = lambda lm, response, call, provider, request=None, *, estimate=True, more=None: step(
    lm, response, call, provider, request, estimate=estimate
)
"""
    usual, other = run(CALLS, tmp_path), run(taken + CALLS, tmp_path)
    assert (usual.returncode, usual.stderr) == (0, "")
    assert other.stdout == usual.stdout
    assert other.stderr.count("executor") == len(other.stderr.strip().splitlines()) == 1
    assert version("dspy") in other.stderr


def test_a_dspy_without_its_deprecations_is_no_obstacle(tmp_path: Path) -> None:
    """DSPy 3.5 takes the module away; messages= is then its own affair, and we warn of nothing."""
    gone = """
import dspy, sys
import dspy.clients.execution
name = "dspy.clients._deprecation"
kept, sys.modules[name] = sys.modules[name], None
import dspy_prod.lm
sys.modules[name] = kept
"""
    done = run(gone + CALLS + "print(lm(messages=[{'role': 'user', 'content': 'e'}]))", tmp_path)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("module", "name"),
    [("dspy.clients.lm", "_check_engines"), ("dspy._vendor.lm15.transports", "StdlibTransport._open")],
)
def test_what_cannot_be_done_without_is_named_with_the_versions_that_have_it(
    tmp_path: Path, module: str, name: str
) -> None:
    """A user learns what to install; without a hook in the transport, deadlines would be silently forgotten."""
    done = run(f"import {module} as module; del module.{name}; import dspy_prod.lm", tmp_path)
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(f"ImportError: dspy_prod needs something that dspy {version('dspy')} does not have: ")
    assert last.endswith(
        f"has no attribute '{name.rpartition('.')[2]}'. It is made for dspy>=3.4.1,<3.5; install such a version: "
        "pip install 'dspy>=3.4.1,<3.5'"
    )

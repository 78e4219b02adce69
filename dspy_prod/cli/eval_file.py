"""The file that tells `dspy-prod deploy` how to judge a candidate."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

from dspy_prod.errors import ConfigError
from dspy_prod.privacy.error_text import error_text

EXAMPLE: Final = """\
import dspy
from myapp import Triage, devset, metric

dspy.configure(lm=dspy.LM("openai/gpt-4o-mini"))
THRESHOLDS = {"accuracy": 0.85}  # ("<=", 0.002) for costs and latencies
BASELINE = "triage@production"  # optional: no worse than what is live
PROGRAM = Triage  # what makes the bare program

def evaluate(program):
    scores = [metric(example, program(**example.inputs())) for example in devset]
    return {"accuracy": sum(scores) / len(scores), "examples": len(scores)}
"""


def read(path: Path) -> SimpleNamespace:
    """Execute an evaluation file. Its folder and the working directory can be imported from.

    Returns:
        What it defines, as arguments of `deploy`: `evaluate`, `program`, `thresholds`, `baseline`, `margin` and
        `min_examples`.

    Raises:
        ConfigError: it is missing, fails, or lacks something; the message shows a file that does not.
    """
    if not path.is_file():
        raise ConfigError(f"there is no file {path}; --eval takes a Python file such as\n\n{EXAMPLE}")
    module = _executed(path)
    evaluate = getattr(module, "evaluate", None)
    program = getattr(module, "program", None) or getattr(module, "PROGRAM", None)
    thresholds, baseline = getattr(module, "THRESHOLDS", None), getattr(module, "BASELINE", None)
    lacks = []
    if not callable(evaluate):
        lacks.append("evaluate(program), which gives a dict of metrics or a list of scores")
    if not callable(program):  # a dspy.Module is callable too
        lacks.append("program() or PROGRAM, which makes the bare program")
    if not thresholds and baseline is None:
        lacks.append("THRESHOLDS (or BASELINE)")
    if lacks:
        raise ConfigError(f"{path} does not define {'; nor '.join(lacks)}. It should look like\n\n{EXAMPLE}")
    return SimpleNamespace(
        evaluate=evaluate, program=program, thresholds=thresholds or {}, baseline=baseline,
        margin=getattr(module, "MARGIN", 0.0), min_examples=getattr(module, "MIN_EXAMPLES", None),
    )  # fmt: skip


def _executed(path: Path) -> Any:
    name = f"dspy_prod_eval_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{path} is no Python file; --eval takes one such as\n\n{EXAMPLE}")
    for folder in (str(Path.cwd()), str(path.parent.resolve())):
        if folder not in sys.path:
            sys.path.insert(0, folder)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # as an import does: dataclasses and pydantic look their module up
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # whatever it does when it is executed
        del sys.modules[name]
        raise ConfigError(f"{path} cannot be executed: {error_text(error)}") from error
    return module

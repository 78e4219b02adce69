"""Runs pieces of code that share nothing: `python -m tests.docs.runner PIECES`, a JSON file, prints how each ended.

Each runs in a child of this process, in a folder of its own; what takes seconds to import is imported once, here.
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, Final

AT_ONCE: Final = 3
LONGEST: Final = 200
"""Seconds for one piece."""

_TABLES: Final = "empty.db"


def run(pieces: Iterable[Mapping[str, Any]], folder: Path, root: Path, **environment: str) -> dict[str, dict[str, Any]]:
    """Name → `code` (0 when it ended well) and `said` of each piece.

    Args:
        pieces: each with a `name` and `blocks`, pairs of a line number and code. With `apart`, what a block but the
            first one names is not known to the others, and they run though one fails.
    """
    listed = folder / "pieces.json"
    listed.write_text(json.dumps(list(pieces)), "utf-8")
    done = subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning:dspy_prod", "-m", "tests.docs.runner", str(listed)],
        cwd=folder,
        env={
            "PATH": "", "HOME": str(folder), "PYTHONPATH": str(root), "LITELLM_LOCAL_MODEL_COST_MAP": "True",
            "MLFLOW_DISABLE_TELEMETRY": "true", **environment,
        },
        capture_output=True,
        text=True,
        timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    ended: dict[str, dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return ended


def main(listed: Path) -> None:
    """Run what the file lists."""
    import dspy  # noqa: F401
    import litellm  # noqa: F401

    import dspy_prod.testing

    for name in dspy_prod.__all__:
        getattr(dspy_prod, name)
    from dspy_prod.pricing.warmup import preload

    preload()
    listing = listed.read_text("utf-8")
    waiting = json.loads(listing)
    if "mlflow.db" in listing:
        import mlflow.store.tracking.sqlalchemy_store  # noqa: F401  (which else most children would, for seconds)

        _make_tables(listed.parent)
    gc.collect()
    gc.freeze()  # a child that looked at it would copy it
    children: dict[int, tuple[str, float]] = {}
    codes: dict[str, int] = {}
    while waiting or children:
        while waiting and len(children) < AT_ONCE:
            piece = waiting.pop(0)
            child = os.fork()
            if not child:
                _child(listed.parent / piece["name"], piece)
            children[child] = piece["name"], time.monotonic()
        child, status = os.waitpid(-1, os.WNOHANG)
        if child in children:
            codes[children.pop(child)[0]] = os.waitstatus_to_exitcode(status)
            continue
        for child, (_, began) in children.items():
            if time.monotonic() - began > LONGEST:
                os.kill(child, 9)
        time.sleep(0.02)
    ended = {
        name: {"code": code, "said": (listed.parent / name / "said").read_text("utf-8", "replace")}
        for name, code in codes.items()
    }
    print(json.dumps(ended))


def _make_tables(folder: Path) -> None:
    """An MLflow database with its tables, for each piece to have: a busy machine takes longer than a page may wait."""
    import mlflow

    maker = os.fork()
    if not maker:
        mlflow.MlflowClient(tracking_uri=f"sqlite:///{folder / _TABLES}").search_experiments()
        os._exit(0)
    assert os.waitpid(maker, 0)[1] == 0


def _child(folder: Path, piece: Mapping[str, Any]) -> None:
    folder.mkdir()
    os.chdir(folder)
    if Path("..", _TABLES).exists():
        shutil.copy(Path("..", _TABLES), "mlflow.db")
    with open("said", "wb", 0) as said:
        os.dup2(said.fileno(), 1)
        os.dup2(said.fileno(), 2)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    sys.modules["__main__"] = ModuleType("__main__")
    scope = sys.modules["__main__"].__dict__
    failed = False
    for number, (line, code) in enumerate(piece["blocks"]):
        try:
            here = dict(scope) if piece.get("apart") and number else scope
            exec(compile("\n" * (line - 1) + code, piece["name"], "exec"), here)  # the page's own line numbers
        except BaseException:
            traceback.print_exc()
            failed = True
            if not piece.get("apart"):
                break
    atexit._run_exitfuncs()  # what is done at a program's end; taking the packages apart would take seconds
    sys.stdout.flush()
    os._exit(failed)


if __name__ == "__main__":
    main(Path(sys.argv[1]))

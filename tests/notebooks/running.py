"""Runs a notebook in a kernel of its own, and tells what its cells show."""

from __future__ import annotations

import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

ROOT: Final = Path(__file__).parents[2]
NOTEBOOKS: Final = sorted((ROOT / "notebooks").glob("*.ipynb"))

_NOISE: Final = (
    (re.compile(r"\d+%\|"), "a raw progress bar"),
    (re.compile(r"\bit/s\]|s/it\]"), "a raw progress bar"),
    (re.compile(r"\bWARNING\b|Warning: "), "a warning"),
    (re.compile(r"(?<![\w.:/])/(?:home|root|tmp|work|Users|usr|opt|var)/\w"), "a path of this machine"),
    (re.compile(r"[A-Z]:\\\\?Users"), "a path of this machine"),
    (re.compile(r"\x1b\["), "an escape sequence"),
)


@contextmanager
def environment(**given: str) -> Iterator[None]:
    """Variables for the kernels that are started within."""
    before = dict(os.environ)
    os.environ.update(given)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def execute(notebook: Any, timeout: int = 900, **variables: str) -> Any:
    """Run a notebook's cells with this interpreter, in an empty folder; raises what a cell raised.

    Args:
        notebook: as nbformat reads it; its outputs are replaced.
        timeout: seconds of one cell.
        variables: environment variables of the kernel.
    """
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    told = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "PYTHONPATH": path, "PYDEVD_DISABLE_FILE_VALIDATION": "1"}
    with tempfile.TemporaryDirectory() as folder, environment(**told, **variables):
        client = NotebookClient(
            notebook, timeout=timeout, kernel_name="python3", resources={"metadata": {"path": folder}},
            record_timing=False,
        )  # fmt: skip
        client.create_kernel_manager()
        client.km.kernel_spec.argv[0] = sys.executable  # whatever python3 the machine's kernels are registered with
        client.execute()
    return notebook


def shown(notebook: Any) -> Iterator[tuple[int, str, str]]:
    """(number of the cell, kind, text) of everything that its cells show; of a picture an empty text."""
    for number, cell in enumerate(notebook.cells):
        for output in cell.get("outputs", ()):
            if output.output_type == "error":
                yield number, "error", f"{output.ename}: {output.evalue}"
            elif output.output_type == "stream":
                yield number, output.name, output.text
            else:
                for kind, data in output.data.items():
                    yield number, kind, "" if kind.startswith("image/") else str(data)


def faults(notebook: Any) -> list[str]:
    """What a reader should not see in a notebook: errors, noise, paths of the machine it ran on."""
    found = []
    for number, kind, text in shown(notebook):
        if kind in ("error", "stderr"):
            found.append(f"cell {number} shows {kind}: {text.strip()[:300]}")
        found += [f"cell {number} shows {what}: {match[0]}" for rule, what in _NOISE if (match := rule.search(text))]
    return found


def pictures(notebook: Any) -> int:
    """How many pictures its cells show, those inside of pages included."""
    return sum(kind.startswith("image/") or "data:image/png" in text for _, kind, text in shown(notebook))


def load(path: Path) -> Any:
    """A notebook as it is in the folder."""
    return nbformat.read(path, as_version=4)


def run(store: bool, path: Path) -> tuple[bool, str]:
    """(whether all is as it should be, what to say of it) of one notebook."""
    began = time.monotonic()
    try:
        notebook = execute(load(path))
        wrong = faults(notebook)
    except CellExecutionError as error:
        notebook, wrong = None, [str(error)]
    if notebook is not None and store:
        nbformat.write(notebook, path)
    seen = "" if notebook is None else f", {pictures(notebook)} pictures"
    said = f"{path.name}: {'; '.join(wrong) or 'as it should be'}{seen}, {time.monotonic() - began:.0f} s"
    return not wrong, said

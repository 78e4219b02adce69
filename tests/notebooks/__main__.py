"""`python -m tests.notebooks [--store] [NOTEBOOK ...]`: run notebooks from top to bottom, and look at what they show.

`--store` writes the outputs back. The exit code is 1 when a cell fails, or shows what a reader should not see.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import nbformat
from nbclient.exceptions import CellExecutionError

from tests.notebooks.running import NOTEBOOKS, execute, faults, load, pictures


def main() -> int:
    """Run them one after the other."""
    parser = argparse.ArgumentParser(prog="python -m tests.notebooks", description=__doc__.split("\n", 1)[0])
    parser.add_argument("notebooks", nargs="*", type=Path, default=NOTEBOOKS)
    parser.add_argument("--store", action="store_true", help="write the outputs into the notebooks")
    chosen = parser.parse_args()
    failed = False
    for path in chosen.notebooks:
        began = time.monotonic()
        try:
            notebook = execute(load(path))
            wrong = faults(notebook)
        except CellExecutionError as error:
            notebook, wrong = None, [str(error)]
        failed = failed or bool(wrong)
        if notebook is not None and chosen.store:
            nbformat.write(notebook, path)
        seen = "" if notebook is None else f", {pictures(notebook)} pictures"
        print(
            f"{path.name}: {'; '.join(wrong) or 'as it should be'}{seen}, {time.monotonic() - began:.0f} s", flush=True
        )
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())

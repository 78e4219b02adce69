"""`python -m tests.notebooks [--store] [--together N] [NOTEBOOK ...]`: run notebooks, and look at what they show.

`--store` writes the outputs back. The exit code is 1 when a cell fails, or shows what a reader should not see.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

from tests.notebooks.running import NOTEBOOKS, run


def main() -> int:
    """Run them."""
    parser = argparse.ArgumentParser(prog="python -m tests.notebooks", description=__doc__.partition(": ")[2])
    parser.add_argument("notebooks", nargs="*", type=Path, default=NOTEBOOKS)
    parser.add_argument("--store", action="store_true", help="write the outputs into the notebooks")
    parser.add_argument("--together", type=int, default=1, metavar="N", help="so many at a time, each in its process")
    chosen = parser.parse_args()
    right = True
    # A process each: the variables of its kernels are those of the process.
    with ProcessPoolExecutor(chosen.together, multiprocessing.get_context("spawn")) as pool:
        for fine, said in pool.map(partial(run, chosen.store), chosen.notebooks):
            right = right and fine
            print(said, flush=True)
    return int(not right)


if __name__ == "__main__":
    sys.exit(main())

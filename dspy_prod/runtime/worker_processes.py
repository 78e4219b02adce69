"""How a worker of multiprocessing ends: by `os._exit`, without `atexit`; it has finalizers of its own."""

from __future__ import annotations

import sys
from collections.abc import Callable


def finish_with_worker(finish: Callable[[], object], priority: int) -> bool:
    """Have `finish` called when this process ends, if it is such a worker; whether it is.

    Args:
        priority: those of a higher one are called before.
    """
    process = sys.modules.get("multiprocessing.process")
    if process is None or process.parent_process() is None:
        return False
    from multiprocessing.util import Finalize

    Finalize(None, finish, exitpriority=priority)
    return True

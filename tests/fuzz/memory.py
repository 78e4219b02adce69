"""How much memory something takes at its peak, as the operating system sees it.

`tracemalloc` would tell more exactly, but `tracemalloc.stop()` crashes Pythons before 3.12.9 while another thread
allocates (python/cpython#128679), and a fuzzed LM has threads.
"""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

_FORGET = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")


def watched() -> Callable[[], int]:
    """Begin; the function tells by how many bytes the process's memory has been above what it is now.

    Where the system cannot forget its last peak (everywhere but on Linux), what stays below that is not seen.
    """
    with suppress(OSError):
        _FORGET.write_text("5")
    before = _peak()
    return lambda: _peak() - before


def _peak() -> int:
    try:
        status = _STATUS.read_text("ascii")
    except OSError:
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most if sys.platform == "darwin" else most * 1024
    return int(status.split("VmHWM:", 1)[1].split(None, 1)[0]) * 1024

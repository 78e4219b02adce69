"""The source of classes and functions, read by one thread at a time.

Python looks a class up by parsing its file, and until 3.12 its parser fails now and then in two threads at once
(SystemError: AST constructor recursion depth mismatch).
"""

from __future__ import annotations

import ast
import inspect
import textwrap
import threading
from typing import Any, Final

_ONE: Final = threading.Lock()


def source(given: Any) -> str:
    """The source of a class or a function, moved to the left edge.

    Raises:
        OSError, TypeError: it has none, as what was made by `exec` or in C.
    """
    with _ONE:
        return textwrap.dedent(inspect.getsource(given))


def tree(given: Any) -> ast.Module:
    """The same, parsed.

    Raises:
        OSError, TypeError, SyntaxError: it has none.
    """
    text = source(given)
    with _ONE:
        return ast.parse(text)

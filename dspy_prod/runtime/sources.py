"""The source of classes and functions, read by one thread at a time.

Python looks a class up by parsing its file, and until 3.11.8 and 3.12.2 its parser fails now and then in two threads at
once (SystemError: AST constructor recursion depth mismatch; python/cpython#106905). Others parse as well, as DSPy does
for a signature: what fails is tried again.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
import threading
from collections.abc import Callable
from typing import Any, Final, TypeVar

T = TypeVar("T")

_ONE: Final = threading.Lock()
_TRIES: Final = 5


def source(given: Any) -> str:
    """The source of a class or a function, moved to the left edge.

    Raises:
        OSError, TypeError: it has none, as what was made by `exec` or in C.
    """
    return textwrap.dedent(_alone(lambda: inspect.getsource(given)))


def tree(given: Any) -> ast.Module:
    """The same, parsed.

    Raises:
        OSError, TypeError, SyntaxError: it has none.
    """
    text = source(given)
    return _alone(lambda: ast.parse(text))


def _alone(parse: Callable[[], T]) -> T:
    with _ONE:
        for _ in range(_TRIES - 1):
            try:
                return parse()
            except SystemError:  # somebody else parsed at that moment
                continue
        return parse()

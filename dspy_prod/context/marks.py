"""Which published version a program is: a mark such as `"triage/7"`, which records of its calls carry.

`dspy_prod.registry` marks what it loads. A copy is not marked: an optimizer's copy is another program.
"""

from __future__ import annotations

import weakref
from typing import Any

from dspy_prod.compat.dspy import thread_local_overrides
from dspy_prod.context.current import CallContext


class Mark(str):
    """A version that was found on a program, and not said by the caller."""

    __slots__ = ()


_MARKS: weakref.WeakKeyDictionary[Any, Mark] = weakref.WeakKeyDictionary()
_used = False


def mark(program: Any, version: str) -> None:
    """Say which version a program is."""
    global _used
    _MARKS[program] = Mark(version)
    _used = True


def mark_of(program: Any) -> Mark | None:
    """The version a program is, as far as known."""
    return _MARKS.get(program) if _used else None


def stamped(context: CallContext) -> CallContext:
    """The context of an LM call, with the version of the innermost marked program that makes it.

    What the caller said in `call_context(prompt_version=...)` stays.
    """
    if not _used:
        return context
    said = context.prompt_version
    if said is not None and type(said) is not Mark:
        return context
    found: str | None = said
    for module in reversed(thread_local_overrides.get().get("caller_modules") or ()):
        own = _MARKS.get(module)
        if own is not None:
            found = own
            break
    return context if found is None else context._replace(prompt_version=str(found))

"""What a forked child does about LiteLLM, which does nothing itself: clients, threads and locks are its parent's."""

from __future__ import annotations

import sys
import threading
from typing import Any, Final

_ABANDONED: Final[list[Any]] = []
"""What a forked child has from its parent and must never use, nor close: even the garbage collector must not."""

_LOCKS: Final = (type(threading.Lock()), type(threading.RLock()))
_FEW: Final = 64
"""A longer table holds no locks."""


def leave_to_the_parent() -> None:
    """In a forked child: have LiteLLM make clients and threads of its own, and find its locks free.

    Its pooled connections are the parent's, and two processes on one socket read each other's answers; a lock that a
    thread of the parent held stays locked for ever.
    """
    litellm = sys.modules.get("litellm")
    if litellm is None:
        return
    cache = vars(litellm).get("in_memory_llm_clients_cache")
    if cache is not None:
        _ABANDONED.append(dict(vars(cache)))
        cache.__init__()
        closer = getattr(cache, "evicted_client_closer", None)
        if closer is not None:  # the one of the whole process may hold clients that it was about to close
            cache.evicted_client_closer = type(closer)()
    for name in ("module_level_client", "module_level_aclient"):  # made again when asked for
        _ABANDONED.append(vars(litellm).pop(name, None))
    pool = sys.modules.get("litellm.litellm_core_utils.thread_pool_executor")
    executor = getattr(pool, "executor", None)
    if executor is not None:
        _ABANDONED.append(dict(vars(executor)))
        executor.__init__(executor._max_workers, executor._max_pending_tasks)
    for name, module in sys.modules.copy().items():
        if name.partition(".")[0] == "litellm" and module is not None:
            for value in list(vars(module).values()):
                _free(value)


def _free(value: Any, inside: bool = False) -> None:
    """Free a lock that another thread of the parent may hold; and those in an object or table that a module has."""
    kind = type(value)
    if kind in _LOCKS:
        if hasattr(value, "_at_fork_reinit") and not (hasattr(value, "_is_owned") and value._is_owned()):
            value._at_fork_reinit()
    elif inside:
        return
    elif kind is dict or kind is tuple:
        for each in list(value.values() if kind is dict else value)[:_FEW]:
            _free(each, inside=True)
    elif str(kind.__module__).startswith("litellm") and hasattr(value, "__dict__"):
        for each in list(vars(value).values()):
            _free(each, inside=True)

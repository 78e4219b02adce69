"""What one public LM call tells the engine beneath it: arguments outside the canonical request, and the cache key.

A `ContextVar` is right here: between `LM.__call__` and the engine everything happens in one thread or task.
"""

from __future__ import annotations

import contextvars
import json
import weakref
from collections.abc import Callable
from typing import Any, Final

import orjson
from dspy.lm15 import Request
from pydantic import BaseModel

from dspy_prod.compat.lm15 import CANONICAL, request_to_dict
from dspy_prod.context.current import CallContext
from dspy_prod.policies.answers import AnswerLog
from dspy_prod.policies.entries import LOCAL
from dspy_prod.policies.purse import Purse
from dspy_prod.records import CallRecord
from dspy_prod.runtime.ids import IDS


class Scope:
    """One public call; `n > 1` makes several engine calls within it. Entering it tells the engine beneath.

    What a cached answer never needs stands in the class until somebody sets it.

    Attributes:
        base: exact JSON of prompt, messages and arguments as the caller gave them, or None when they are not JSON.
        extras, body, refusal, asked: see `upstream.ordinary.Beside`.
        shown: the call's arguments as DSPy's history tells them, where they are others than the engine's.
        index: candidates already asked for.
        missed: the cache was asked for `base` already, in vain.
        records: everything the call did.
        purse: what it has spent, where a budget caps single calls.
        log: where the run that it belongs to keeps its answers, if it does.
    """

    body: dict[str, Any] | None = None
    refusal: Exception | None = None
    asked: Request | None = None
    shown: dict[str, Any] | None = None
    index: int = 0
    missed: bool = False
    purse: Purse | None = None
    log: AnswerLog | None = None
    _token: Any = None

    def __init__(
        self, context: CallContext, base: bytes | None, extras: dict[str, Any] | None, rollout_id: Any, use_cache: bool
    ) -> None:
        self.context = context
        self.base = base
        self.extras = extras
        self.rollout_id = rollout_id
        self.use_cache = use_cache
        self.records: list[CallRecord] = []

    def __enter__(self) -> None:
        self._token = SCOPE.set(self)

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        try:
            SCOPE.reset(self._token)
        except ValueError:  # a call that was never finished is collected in somebody else's context
            pass


SCOPE: contextvars.ContextVar[Scope | None] = contextvars.ContextVar("dspy_prod_scope", default=None)


def engine_identity(engine: Any) -> tuple[Any, bool]:
    """(what tells an engine's answers from another engine's, whether that holds in other processes too).

    An engine object is known elsewhere by its class and a `cache_key`, a `name` or a `dump_state()`; without one, it
    is equal to itself only.
    """
    if isinstance(engine, str):
        return None, True
    path = f"{type(engine).__module__}.{type(engine).__qualname__}"
    names = [getattr(engine, name, None) for name in ("cache_key", "name")]
    given = [name for name in names if isinstance(name, str) and name]
    if given:
        return [path, *given], True
    dump = getattr(engine, "dump_state", None)
    if callable(dump):
        try:
            return [path, orjson.dumps(dump(), option=orjson.OPT_SORT_KEYS).decode()], True
        except Exception:  # whatever a foreign engine raises: then it is known in this process only
            return [path, serial_of(engine)], False
    return [path, serial_of(engine)], False


def identity_of(parts: list[Any], engine: Any) -> bytes:
    """The beginning of every cache key of an LM with this engine."""
    known, everywhere = engine_identity(engine)
    try:
        identity: bytes = orjson.dumps([*parts, known])
    except TypeError:  # half a character, which no UTF-8 can say
        identity = json.dumps([*parts, known]).encode()
    return identity if everywhere else LOCAL + identity


_SERIALS: Final[dict[int, tuple[Callable[[], Any], str]]] = {}


def serial_of(engine: Any) -> str:
    """A name of this very object; unlike `id`, none is given twice, in no other process and no forked child either."""
    known = _SERIALS.get(id(engine))
    if known is not None and known[0]() is engine:
        return known[1]
    serial = IDS.make()
    try:
        find: Callable[[], Any] = weakref.ref(engine)
        weakref.finalize(engine, _SERIALS.pop, id(engine), None).atexit = False
    except TypeError:  # such an object lives on: its `id` must not become another one's

        def find() -> Any:
            return engine

    _SERIALS[id(engine)] = (find, serial)
    return serial


def raw_key(identity: bytes, prompt: Any, messages: Any, kwargs: dict[str, Any], tenant: str | None) -> bytes | None:
    """A key that is exact for what the caller passed, or None when that is not plain JSON."""
    try:
        return identity + orjson.dumps([tenant, prompt, messages, kwargs], option=orjson.OPT_SORT_KEYS)
    except TypeError:
        return None


def request_key(identity: bytes, request: Request, scope: Scope, tenant: str | None) -> bytes | None:
    """The key of a canonical request and everything beside it, or None when it cannot be written as JSON.

    Where the request only stands for what it cannot say, the messages and arguments themselves are in the key.
    """
    whole = None
    if scope.refusal is not None and scope.body is not None:
        whole = {name: value for name, value in scope.body.items() if name in CANONICAL}
    try:
        return identity + orjson.dumps(
            ["request", tenant, request_to_dict(request), scope.extras, scope.rollout_id, *([whole] if whole else ())],
            default=_schema,
            option=orjson.OPT_SORT_KEYS | orjson.OPT_NON_STR_KEYS,
        )
    except TypeError:
        return None


def _schema(value: Any) -> Any:
    if isinstance(value, type) and issubclass(value, BaseModel):
        return [value.__name__, value.model_json_schema()]
    raise TypeError


def candidate_key(key: bytes, index: int) -> bytes:
    """The key of one of `n` candidates."""
    return key if index == 0 else key + b"#%d" % index

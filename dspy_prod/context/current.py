"""Who is calling and under which conditions: `call_context`, and the context each LM call finds.

The context travels in DSPy's own settings (`dspy.context`), because those follow a program into threads,
`dspy.Parallel`, `dspy.Evaluate`, `acall`, `asyncify` and `streamify`; a plain `ContextVar` does not reach the worker
threads of Evaluate and Parallel.
"""

from __future__ import annotations

import datetime as dt
import sys
import uuid
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from math import inf
from typing import Any, Final, Literal, NamedTuple, Protocol, runtime_checkable

import dspy

from dspy_prod.compat.dspy import InForce, thread_local_overrides
from dspy_prod.context.assignments import Assignment, nested, outer_tags
from dspy_prod.options import PRIORITIES
from dspy_prod.privacy.redactor import claimed
from dspy_prod.records import CallRecord
from dspy_prod.runtime.clock import SYSTEM_CLOCK, Clock, earlier

SETTING = "dspy_prod"
"""Name of the DSPy setting that carries the context."""

_PERSONAL: Final = frozenset({"user", "tenant", "session"})
"""What says who is calling."""

CacheMode = Literal["use", "bypass", "refresh"]

PROCESS_RUN = uuid.uuid4().hex
"""The run that `Budget(per="run")` counts when the context names none: this process."""


@runtime_checkable
class Guard(Protocol):
    """What every upstream attempt inside a context needs the leave of, as `dspy_prod.Run`."""

    @property
    def name(self) -> str: ...

    def check(self) -> None:
        """Raise if no attempt may be made any more."""
        ...

    def takes_over(self, other: object) -> bool:
        """Whether it stands in the place of another one from here on, instead of within it."""
        ...


class CallContext(NamedTuple):
    """The conditions of the calls made inside a `call_context`. Immutable; nested contexts build on the outer one."""

    user: str | None = None
    tenant: str | None = None
    session: str | None = None
    priority: str = "normal"
    deadline: float = inf  # on the machine's monotonic clock; as a `Moment` on another one
    tags: tuple[tuple[str, str], ...] = ()
    cache: CacheMode = "use"
    ttl: float | None = None
    run: str | None = None
    program: str | None = None
    experiment: str | None = None
    variant: str | None = None
    prompt_version: str | None = None
    trace_id: str | None = None
    records: list[CallRecord] | None = None  # collects what the calls inside did, for `call_report`
    node: Any = None  # the open piece of a trace (`tap.Node`) that the calls inside belong to
    guards: tuple[Any, ...] = ()  # every `Run` that admits the attempts inside, the outermost first
    sample: float | None = None  # share of the traces that are kept
    assignments: tuple[Assignment, ...] = ()  # of nested experiments, the outermost first
    aside: bool = False  # what nobody waits for: no budget and no queue of a user or tenant has it

    def told(self) -> dict[str, Any]:
        """For whom and for what a call is, in the words of the ledger, as events tell it."""
        return {
            "user": self.user, "tenant": self.tenant, "session": self.session, "tags": dict(self.tags),
            "run": self.run, "program": self.program, "experiment": self.experiment, "variant": self.variant,
            "prompt_version": self.prompt_version, "trace_id": self.trace_id,
        }  # fmt: skip


EMPTY = CallContext()


def current() -> CallContext:
    """The context in force here."""
    overrides = thread_local_overrides.get()  # not its `get`: that of DSPy's own kind of dict is looked up slowly
    if SETTING not in overrides:
        return EMPTY
    context: CallContext = overrides[SETTING]
    return context


@contextmanager
def use(context: CallContext) -> Iterator[CallContext]:
    """Put a ready-made context in force.

    Raises:
        RuntimeError: it ends elsewhere than it began, so that it was in force for nothing in between.
    """
    scope = dspy.context(**{SETTING: context})
    scope.__enter__()
    try:
        yield context
    except BaseException:
        with suppress(ValueError):
            scope.__exit__(*sys.exc_info())
        raise
    try:
        scope.__exit__(None, None, None)
    except ValueError:
        raise RuntimeError(
            "call_context began in one thread or task and ends in another, so the calls in between were made without "
            "it. A `def` dependency of FastAPI does that: make it an `async def` dependency, or put the `with "
            "call_context(...)` into the endpoint itself"
        ) from None


def begin(context: CallContext) -> InForce:
    """Put a ready-made context in force until its `end()`, for callbacks, which begin here and end there."""
    return InForce(**{SETTING: context})


@contextmanager
def call_context(
    *,
    user: str | None = None,
    tenant: str | None = None,
    session: str | None = None,
    priority: Literal["high", "normal", "low"] | None = None,
    deadline: float | dt.timedelta | None = None,
    tags: Mapping[str, str] | None = None,
    cache: CacheMode | None = None,
    ttl: float | dt.timedelta | None = None,
    run: str | Guard | None = None,
    program: str | None = None,
    experiment: str | None = None,
    variant: str | None = None,
    prompt_version: str | None = None,
    trace_id: str | None = None,
    sample: float | None = None,
    clock: Clock = SYSTEM_CLOCK,
) -> Iterator[CallContext]:
    """Say on whose behalf, how urgently and until when the calls inside are made.

    Contexts nest: what is not given is inherited, tags are merged, and of two deadlines the earlier holds.

    Args:
        user, tenant, session: who the call is for; budgets, limits, cache and ledger use them. While a
            `dspy_prod.Redactor` is installed, names that hold personal data become pseudonyms here, and so do the
            values of tags. A name that only looks like a pseudonym becomes one of its own.
        priority: `"high"` calls are admitted before `"normal"` and `"low"` ones, never above a limit.
        deadline: seconds from now for everything inside; a call that cannot finish by then raises
            `DeadlineExceededError`.
        tags: free labels recorded with each call; budgets with `scope="tag:<key>"` count by them.
        cache: `"bypass"` neither reads nor writes the response cache, `"refresh"` writes without reading.
        ttl: seconds for which answers cached inside stay fresh.
        run: name of the run that `Budget(per="run")` counts and the ledger sums; or a `dspy_prod.Run`, which caps what
            everything inside may use together. Within a `Run`, a name leaves its caps in force, and so does another
            `Run`: what it uses counts for both. The ledger has the innermost name. Another object of the same name
            and store is the same run: its caps hold inside.
        program, prompt_version, trace_id: recorded with each call.
        experiment, variant: recorded with each call. Of nested experiments the innermost has these fields, each one
            around it a tag `experiment:<name>` with its variant; none may be nested in itself. A variant alone is
            that of the experiment in force.
        sample: share of the ordinary traces inside that tracking keeps, 0 to 1; never more than it keeps elsewhere.
            What erred, fell back or was dear is kept in any case.
        clock: for tests.

    Raises:
        ValueError, TypeError: an impossible value; the message names the field.

    Example:
        ```python
        with dspy_prod.call_context(user="u1", tenant="acme", deadline=8.0, tags={"feature": "triage"}):
            service(message="The app crashes.")
        ```
    """
    outer = current()
    changed: dict[str, Any] = {}
    if run is not None and not isinstance(run, str):
        if not isinstance(run, Guard):
            raise TypeError(f"call_context(run=...) takes a name or a dspy_prod.Run, got {run!r}")
        changed["guards"] = (*[each for each in outer.guards if not run.takes_over(each)], run)
        run = run.name
    texts = {
        "user": user,
        "tenant": tenant,
        "session": session,
        "run": run,
        "program": program,
        "experiment": experiment,
        "variant": variant,
        "prompt_version": prompt_version,
        "trace_id": trace_id,
    }
    for name, value in texts.items():
        if value is not None:
            if not isinstance(value, str) or not value:
                raise TypeError(f"call_context({name}=...) takes a non-empty string, got {value!r}")
            changed[name] = claimed(value) if name in _PERSONAL else value
    if priority is not None:
        if priority not in PRIORITIES:
            raise ValueError(f"call_context(priority={priority!r}): use one of {', '.join(map(repr, PRIORITIES))}")
        changed["priority"] = priority
    if deadline is not None:
        changed["deadline"] = earlier(outer.deadline, clock, _positive("deadline", deadline))
    if tags is not None:
        changed["tags"] = merged_tags(outer.tags, tags)
    if cache is not None:
        if cache not in ("use", "bypass", "refresh"):
            raise ValueError(f"call_context(cache={cache!r}): use 'use', 'bypass' or 'refresh'")
        changed["cache"] = cache
    if ttl is not None:
        changed["ttl"] = _positive("ttl", ttl)
    if sample is not None:
        if isinstance(sample, bool) or not isinstance(sample, (int, float)) or not 0 <= sample <= 1:
            raise ValueError(f"call_context(sample={sample!r}) is a share of the traces, 0 to 1")
        changed["sample"] = float(sample) if outer.sample is None else min(outer.sample, float(sample))
    inner = outer._replace(**changed)
    if experiment is not None:
        inner = assigned(inner, Assignment(experiment, variant))
    elif variant is not None and outer.assignments:
        *around, innermost = outer.assignments
        inner = inner._replace(assignments=(*around, innermost._replace(variant=variant)))
    with use(inner) as context:
        yield context


def assigned(context: CallContext, assignment: Assignment) -> CallContext:
    """The context within one more experiment.

    Raises:
        ValueError: it is in that experiment already.
    """
    assignments = nested(context.assignments, assignment)
    tags = outer_tags(assignments)
    return context._replace(
        assignments=assignments,
        experiment=assignment.experiment,
        variant=assignment.variant,
        tags=tuple(sorted({**dict(context.tags), **tags}.items())) if tags else context.tags,
    )


def merged_tags(outer: tuple[tuple[str, str], ...], tags: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    """The tags of a context with more of them, in order; a value with personal data as its pseudonym."""
    merged = dict(outer)
    for key, value in tags.items():
        if not isinstance(key, str) or not key:
            raise TypeError(f"call_context(tags=...): a tag's name is a non-empty string, got {key!r}")
        merged[key] = claimed(value if isinstance(value, str) else str(value))
    return tuple(sorted(merged.items()))


def _positive(name: str, value: float | dt.timedelta) -> float:
    seconds = value.total_seconds() if isinstance(value, dt.timedelta) else value
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)):
        raise TypeError(f"call_context({name}=...) takes seconds or a timedelta, got {value!r}")
    if not 0 < seconds < inf:
        raise ValueError(f"call_context({name}={seconds!r}) must be a positive number of seconds")
    return float(seconds)


# Which published version a program is. The registry marks what it loads; an optimizer's copy is another program.
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
